# SPDX-License-Identifier: Apache-2.0
"""The steps that are under way: one on the device, and the one that is planned meanwhile."""

import numpy as np

from jpaged.device.runner import ModelRunner, StepResult
from jpaged.host.batch import Batch, ShapeBuckets, build_batch
from jpaged.host.outputs import RequestOutput
from jpaged.host.page_table import PageTable
from jpaged.host.scheduler import Scheduler
from jpaged.host.step import StepPlan
from jpaged.host.step_builder import ScheduledStep
from jpaged.host.step_log import StepLog
from jpaged.profiling import phase
from jpaged.results import ResultReader


class Pipeline:
    """Keeps the device one step ahead of what the host has read.

    It schedules and dispatches the next step before it reads the samples of the one before. A
    sequence that a sample ends may therefore compute one token too many, which is dropped.

    Attributes:
      scheduler: who computes what.
      table: its pages.
      results: reads what was computed.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        results: ResultReader,
        runner: ModelRunner,
        buckets: ShapeBuckets,
        log: StepLog | None = None,
    ):
        """Has no step under way; steps that are dispatched are written to the log."""
        self.scheduler = scheduler
        self.table: PageTable = scheduler.table
        self.results = results
        self._runner = runner
        self._buckets = buckets
        self._log = log
        # A step that is scheduled but not dispatched, and one that is dispatched but not read.
        self._planned: tuple[ScheduledStep, Batch] | None = None
        self._inflight: tuple[ScheduledStep, StepResult] | None = None

    def step(self) -> list[RequestOutput]:
        """Dispatches the next step, then reads the samples of the one before.

        Returns:
          Of the requests that have grown, those that ended and those with `stream=True`.
        """
        previous, self._inflight = self._inflight, None
        if previous is None:
            self.results.start_clock()
        planned, self._planned = self._planned or self._plan(), None
        assert planned or previous, "requests are live, but nothing is scheduled"
        if planned and previous and not self._runner.is_compiled(planned[1]):
            # Samples that are there already do not wait for a compilation.
            self._planned = planned
        elif planned:
            step, batch = planned
            self._begin(step.plan, batch.page_table)
            with phase("dispatch"):
                self._inflight = step, self._runner.run(batch, step.plan.copies)
            self.results.skip(self._inflight[1].compile_s, overlapped=previous is not None)
        return self.results.read(*previous) if previous else []

    def drop(self) -> None:
        """Forgets what is under way, which computes tokens of sequences that have ended."""
        if self._planned is not None:
            # Pages have addresses whose content is never computed.
            self.scheduler.cache.clear()
        self._planned = self._inflight = None

    def _begin(self, step: StepPlan, page_table: np.ndarray) -> None:
        if self._log is not None:
            self._log.write(step, page_table)
        with phase("swap"):
            compile_s = self._runner.swap(step.swap_outs, step.swap_ins)
        self.results.skip(compile_s, overlapped=False)

    def _plan(self) -> tuple[ScheduledStep, Batch] | None:
        if not self.scheduler.has_work:
            return None
        with phase("schedule"):
            step, totals = self.scheduler.schedule(), self.results.totals
        if not step.plan.num_rows:
            totals.record_swaps(step.plan)
            self._begin(step.plan, self.table.snapshot((), 0))
            return None
        with phase("pack"):
            totals.record_step(step.plan, self.table)
            return step, build_batch(step.plan, self.table, self._buckets)
