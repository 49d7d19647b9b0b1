# SPDX-License-Identifier: Apache-2.0
"""The host's half of an engine without a device: real scheduler, pool and page table."""

import time
from collections.abc import Sequence

from jpaged.host.admission import SchedulerConfig
from jpaged.host.page_pool import PagePool
from jpaged.host.page_table import PageTable
from jpaged.host.params import SamplingParams
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import Request, Status
from jpaged.host.stats import Counters, EngineStats
from jpaged.host.step import ScheduledStep
from jpaged.simulation.costs import Memory, StepWork
from jpaged.simulation.workload import Item


class PagedSimulator:
    """The host's half of an engine: real scheduler, pool and page table, no model.

    Like `jpaged.engine.Engine`, it schedules a step before it ends the sequences of the one before.
    """

    def __init__(self, config: SchedulerConfig, num_pages: int, page_size: int):
        """Makes an empty pool of `num_pages` pages, the reserved one included."""
        self.table = PageTable(
            PagePool(num_pages), page_size, -(-config.max_model_len // page_size)
        )
        self.scheduler = Scheduler(config, self.table)
        self.totals = Counters()
        self._inflight: ScheduledStep | None = None
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
        self.scheduler.add(request)
        self._num_added += 1

    def step(self) -> StepWork:
        """Schedules a step, and gives every sample of the one before a token.

        The token is the sample's index, so that two samples never hold the same.
        """
        previous, self._inflight = self._inflight, None
        step = ScheduledStep()
        if self.scheduler.has_work:
            step = self.scheduler.schedule()
            idle = not (step.seqs or step.swap_outs or step.swap_ins)
            assert previous or not idle, "the scheduler has work but schedules none of it"
            if step.seqs:
                self.totals.record_step(step, self.table)
                self._inflight = step
            else:
                self.totals.record_swaps(step)
        # Sequences that end below have their pages while the step runs.
        memory, num_kv_tokens = self._memory(), sum(s.num_computed_tokens for s in step.seqs)
        finished: list[int] = []
        if previous is not None:
            indices = [sample.sample_index for sample in previous.samples]
            logprobs = [0.0] * len(indices)
            finish_step(self.scheduler, previous, indices, logprobs, self.totals)
            ended = (s.request for s in previous.samples if s.status is Status.FINISHED)
            finished = [int(r.request_id) for r in dict.fromkeys(ended) if r.finished]
        return StepWork(
            num_seqs=len(step.seqs),
            num_tokens=sum(step.num_scheduled_tokens),
            num_kv_tokens=num_kv_tokens,
            num_swapped_pages=len(step.swap_outs) + len(step.swap_ins),
            memory=memory,
            finished=tuple(finished),
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

    def _memory(self) -> Memory:
        table = self.table
        free = table.pool.num_free_pages * table.page_size
        waits = self.scheduler.num_waiting > 0
        return Memory(
            live=table.num_live_cells,
            internal=table.num_allocated_cells - table.num_live_cells,
            external=free if waits else 0,
            idle=0 if waits else free,
        )


def finish_step(
    scheduler: Scheduler,
    step: ScheduledStep,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    totals: Counters,
) -> None:
    """Appends a step's tokens and ends sequences, as `jpaged.engine.Engine` does.

    Args:
      scheduler: whose sequences they are.
      step: the step.
      tokens: one a sample.
      logprobs: one a sample.
      totals: is brought up to date.
    """
    now = time.perf_counter()
    for sample, token, logprob in zip(step.samples, tokens, logprobs, strict=True):
        if sample.status is Status.FINISHED:
            continue
        if sample.request.first_token_s is None:
            sample.request.first_token_s = now
        sample.receive(token, logprob)
        totals.num_generated_tokens += 1
        totals.num_decode_tokens += not step.num_prefill_tokens
        if reason := sample.stop_reason(()):
            scheduler.finish(sample, reason)
