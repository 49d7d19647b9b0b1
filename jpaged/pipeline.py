# SPDX-License-Identifier: Apache-2.0
"""The steps that are under way: those on the device, and those that are planned meanwhile."""

import dataclasses
import itertools
import logging

import numpy as np

from jpaged.device.runner import ModelRunner
from jpaged.device.step_result import BurstResult, StepResult
from jpaged.host.batch import Batch, ShapeBuckets, build_batch
from jpaged.host.burst import burst_of, can_burst
from jpaged.host.outputs import RequestOutput
from jpaged.host.page_table import PageTable
from jpaged.host.prompt_cache import PromptCache
from jpaged.host.scheduler import Scheduler
from jpaged.host.step_builder import ScheduledStep
from jpaged.host.step_log import StepLog
from jpaged.profiling import phase
from jpaged.results import ResultReader
from jpaged.telemetry.recorder import Recorder

logger = logging.getLogger(__name__)


class Pipeline:
    """Keeps the device one dispatch ahead of what the host has read.

    It schedules and dispatches the next step before it reads the samples of the one before. A
    sequence that a sample ends may therefore compute one token too many, which is dropped. Steps
    that do nothing but decode are dispatched several together (see `jpaged.host.burst`).

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
        recorder: Recorder | None = None,
        prompts: PromptCache | None = None,
    ):
        """Has no step under way; those that are dispatched are written to log and recorder.

        Pages of prompts go to disk when no request is live.
        """
        self.scheduler = scheduler
        self.table: PageTable = scheduler.table
        self.results = results
        self._runner = runner
        self._buckets = buckets
        self._log = log
        self._recorder = recorder
        self._prompts = prompts
        if recorder is not None:
            scheduler.on_preempt = recorder.note
        # Steps that are scheduled but not dispatched, and those that are dispatched but not read.
        self._planned: tuple[list[ScheduledStep], Batch] | None = None
        self._inflight: tuple[list[ScheduledStep], StepResult | BurstResult] | None = None

    def step(self) -> list[RequestOutput]:
        """Dispatches the next step or burst, then reads the samples of the one before.

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
            steps, batch = planned
            for step in steps:
                self._begin(step, batch.page_table)
            self.results.totals.num_dispatches += 1
            with phase("dispatch"):
                self._inflight = steps, self._runner.run(batch, steps[0].plan.copies)
            self.results.skip(self._inflight[1].compile_s, overlapped=previous is not None)
            if self._recorder is not None:
                self._recorder.look(self.scheduler, self.results.totals)
        return self.results.read(*previous) if previous else []

    def drop(self) -> None:
        """Forgets what is under way, which computes tokens of sequences that have ended."""
        if self._planned is not None:
            # Pages have addresses whose content is never computed.
            self.scheduler.cache.clear()
        self._planned = self._inflight = None
        self.save_prompts(at_end=False)

    def save_prompts(self, *, at_end: bool) -> None:
        """Begins to write pages of long prompts to disk; no request is live.

        Args:
          at_end: as in `PromptCache.saves`.
        """
        if self._prompts is None:
            return
        cache, pool = self.scheduler.cache, self.table.pool
        for saves in self._prompts.saves(cache, pool, at_end=at_end):
            ends = list(itertools.accumulate(len(save.pages) for save in saves))
            try:
                found = self._runner.read_pages([p for save in saves for p in save.pages])
            except RuntimeError as e:  # such as no memory for the copies
                logger.warning("prompts are not saved: %s", e)
                return
            self._prompts.write(saves, np.split(found, ends[:-1]))

    def _begin(self, scheduled: ScheduledStep, page_table: np.ndarray) -> None:
        step = scheduled.plan
        if self._log is not None:
            self._log.write(step, page_table)
        with phase("swap"):
            compile_s = self._runner.swap(step.swap_outs, step.swap_ins)
            if scheduled.loads:
                compile_s += self._runner.write_pages(scheduled.loads)
        self.results.skip(compile_s, overlapped=False)

    def _plan(self) -> tuple[list[ScheduledStep], Batch] | None:
        if not self.scheduler.has_work:
            return None
        with phase("schedule"):
            step, totals = self.scheduler.schedule(), self.results.totals
        if not step.plan.num_rows:
            totals.record_swaps(step.plan)
            self._begin(step, self.table.snapshot((), 0))
            return None
        totals.record_step(step.plan, self.table)
        steps, most = [step], self._runner.decode_steps
        bursts = most > 1 and can_burst(step)
        with phase("schedule"):
            while bursts and len(steps) < most and (after := self.scheduler.extend(steps[-1])):
                totals.record_step(after.plan, self.table)
                steps.append(after)
        with phase("pack"):
            batch = build_batch(step.plan, self.table, self._buckets)
            if bursts:
                burst = burst_of(steps, self.results.eos_token_ids, batch.shape.num_rows)
                batch = dataclasses.replace(batch, burst=burst)
        return steps, batch
