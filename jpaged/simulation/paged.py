# SPDX-License-Identifier: Apache-2.0
"""The host's half of an engine without a device: real scheduler, pool and page table."""

from jpaged.host.admission import SchedulerConfig, check_fits
from jpaged.host.growth.base import Outcome
from jpaged.host.page_pool import PagePool
from jpaged.host.page_table import PageTable
from jpaged.host.params import SamplingParams
from jpaged.host.reader import StepReader
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import Request
from jpaged.host.stats import Counters, EngineStats
from jpaged.host.step import StepPlan
from jpaged.host.step_builder import ScheduledStep
from jpaged.host.step_log import open_log
from jpaged.simulation.costs import Memory, StepWork
from jpaged.simulation.layers import ONE_KIND, LayerGroups
from jpaged.simulation.workload import Item
from jpaged.telemetry.recorder import open_recorder


class PagedSimulator:
    """The host's half of an engine: real scheduler, pool and page table, no model.

    Like `jpaged.engine.Engine`, it schedules a step before it ends the sequences of the one before.

    Attributes:
      table: the pages.
      scheduler: who computes what.
      totals: of all steps.
      clock_s: the time of the next step, which whoever simulates time sets; records tell it.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        num_pages: int,
        page_size: int,
        record_steps: str | None = None,
        layers: LayerGroups = ONE_KIND,
        record: str | None = None,
    ):
        """Makes an empty pool.

        Args:
          config: the scheduler's settings.
          num_pages: of the pool, the reserved one included.
          page_size: tokens a page holds.
          record_steps: as in `EngineConfig`.
          layers: which share pages.
          record: as in `EngineConfig`.

        Raises:
          ValueError: if a file cannot be written.
        """
        pages_per_seq, kinds = -(-config.max_model_len // page_size), layers.table_kinds
        self.table = PageTable(PagePool(num_pages), page_size, pages_per_seq, kinds)
        self._layers = layers
        self.clock_s = 0.0
        self.scheduler = Scheduler(config, self.table)
        self.totals = Counters()
        self._inflight: ScheduledStep | None = None
        self._log = open_log(
            record_steps, config, num_pages, page_size, num_groups=self.table.num_groups
        )
        self._recorder = open_recorder(
            record,
            page_size=page_size,
            num_pages=num_pages,
            kinds=kinds,
            max_model_len=config.max_model_len,
            clock=lambda: self.clock_s,
        )
        if self._recorder is not None:
            self.scheduler.on_preempt = self._recorder.note
        self._num_added = 0

    @property
    def page_size(self) -> int:
        """Tokens a page holds."""
        return self.table.page_size

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return self.scheduler.num_waiting

    @property
    def num_preemptions(self) -> int:
        """Sequences that lost their pages, so far."""
        return self.scheduler.num_preemptions

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do."""
        return self.scheduler.has_work or self._inflight is not None

    def add(self, item: Item) -> None:
        """Queues a request.

        Raises:
          ValueError: if it could never run.
        """
        params = SamplingParams(
            max_tokens=item.num_output_tokens, temperature=0.0, n=item.num_samples, ignore_eos=True
        )
        request = Request(
            str(self._num_added),
            item.prompt_token_ids,
            params.resolve(),
            seed=0,
            max_model_len=self.scheduler.config.max_model_len,
        )
        check_fits(request, self.scheduler.config, self.table)
        self.scheduler.add(request)
        self._num_added += 1

    def step(self) -> StepWork:
        """Schedules a step, and gives every sample of the one before a token.

        The token is the sample's index, so that two samples never hold the same.
        """
        previous, self._inflight = self._inflight, None
        step = ScheduledStep(StepPlan())
        if self.scheduler.has_work:
            step = self.scheduler.schedule()
            plan = step.plan
            idle = not (plan.num_rows or plan.swap_outs or plan.swap_ins)
            assert previous or not idle, "the scheduler has work but schedules none of it"
            if self._log is not None and not idle:
                self._log.write(plan, self.table.snapshot(plan.rows.table_ids, plan.num_rows))
            if plan.num_rows:
                self.totals.record_step(plan, self.table)
                self._inflight = step
                if self._recorder is not None:
                    self._recorder.look(self.scheduler, self.totals)
            else:
                self.totals.record_swaps(plan)
        # Sequences that end below have their pages while the step runs.
        memory, plan = self._memory(), step.plan
        finished, started = list[int](), dict[int, None]()
        if previous is not None:
            new = [s.request for s in previous.samples if s.request.first_token_s is None]
            started = dict.fromkeys(int(request.request_id) for request in new)
            indices = [sample.sample_index for sample in previous.samples]
            outcome = Outcome(indices, [0.0] * len(indices), None, ())
            grown = StepReader(self.scheduler, (), self.totals).take(previous, outcome)
            finished = [int(r.request_id) for r in grown if r.finished]
        return StepWork(
            num_seqs=plan.num_rows,
            num_tokens=plan.num_tokens,
            num_kv_tokens=self._num_kv_tokens(plan),
            num_swapped_pages=self._num_swapped_pages(plan),
            memory=memory,
            finished=tuple(finished),
            started=tuple(started),
            num_samples=plan.num_samples,
        )

    def stats(self) -> EngineStats:
        """A reading like the engine's; a page has no bytes."""
        return EngineStats.read(
            self.scheduler,
            self.totals,
            page_bytes=0,
            num_compilations=0,
            num_unplanned_compilations=0,
        )

    def _num_kv_tokens(self, plan: StepPlan) -> int:
        """Tokens that rows attend to, mean over the layers."""
        if len(self._layers.kinds) == 1 and self._layers.kinds[0].window is None:
            return plan.num_kv_tokens
        rows = zip(plan.rows.starts, plan.rows.num_tokens, strict=True)
        return round(sum(self._layers.needed_tokens(start, start + n) for start, n in rows))

    def _num_swapped_pages(self, plan: StepPlan) -> int:
        """Pages that are swapped, as pages of all layers."""
        count, layers = len(plan.swap_outs) + len(plan.swap_ins), self._layers
        return -(-count * layers.page_layers // layers.total)

    def _memory(self) -> Memory:
        table, needed = self.table, round(self._layers.needed_cells(self.table))
        free = table.pool.num_free_pages * table.page_size
        waits = self.scheduler.num_waiting > 0
        return Memory(
            live=needed,
            internal=table.num_allocated_cells - needed,
            external=free if waits else 0,
            idle=0 if waits else free,
        )
