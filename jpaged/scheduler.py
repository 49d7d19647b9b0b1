# SPDX-License-Identifier: Apache-2.0
"""Decides, before each step, which sequences compute how many tokens, and on which pages.

Pure Python: it runs one step ahead of the device, because a step's page assignments do not depend
on the values that are sampled.
"""

import collections
import dataclasses
import logging

from jpaged.page_table import PageTable
from jpaged.sequence import Request, Sequence, Status

logger = logging.getLogger(__name__)


class RequestTooLongError(ValueError):
    """A request that can never run; the message has both numbers and what to change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Budgets of one step.

    Attributes:
      max_num_batched_tokens: tokens a step computes at most, prefill and decode together.
      max_num_seqs: sequences that run at once at most.
      max_model_len: tokens a sequence has at most, prompt and generated together.
      reservation: "paged" takes pages as a sequence grows; "max" takes those of max_model_len when
        it is admitted, as contiguous preallocation does, for comparison.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    reservation: str = "paged"

    def __post_init__(self):
        for name in ("max_num_batched_tokens", "max_num_seqs", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.reservation not in ("paged", "max"):
            raise ValueError(f"reservation={self.reservation!r} must be 'paged' or 'max'")


@dataclasses.dataclass
class ScheduledStep:
    """One step's work.

    Attributes:
      seqs: sequences that compute tokens, in order of row.
      num_scheduled_tokens: how many tokens each of them computes.
      input_slots: per row, which sample of the step before its one token is, while the host does
        not know it yet; -1 where the host knows the tokens.
      samples: sequences that get a token from this step, in order of sample slot.
      sample_rows: the row whose last token each sample continues.
      copies: `(src, dst)` pages to copy before the step writes.
      num_prefill_tokens: of the tokens, those of rows that are not a plain decode.
      num_preemptions: sequences that lost their pages to it.
    """

    seqs: list[Sequence] = dataclasses.field(default_factory=list[Sequence])
    num_scheduled_tokens: list[int] = dataclasses.field(default_factory=list[int])
    input_slots: list[int] = dataclasses.field(default_factory=list[int])
    samples: list[Sequence] = dataclasses.field(default_factory=list[Sequence])
    sample_rows: list[int] = dataclasses.field(default_factory=list[int])
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list[tuple[int, int]])
    num_prefill_tokens: int = 0
    num_preemptions: int = 0


class Scheduler:
    """First come, first served, with continuous batching, chunked prefill and preemption.

    Running sequences go first, oldest first, each with all the tokens it lacks or as many as the
    budget allows; what is left of the budget admits waiting ones. When pages run out, the youngest
    running sequence is preempted: it gives its pages back and waits at the head of the queue to
    recompute them. The oldest can therefore always go on, and since a request that does not fit the
    empty pool is refused when it is added, everything ends.

    Invariants:
      - Every running sequence is older than every waiting one.
      - Running sequences and forks still to come number at most max_num_seqs.
    """

    def __init__(self, config: SchedulerConfig, table: PageTable):
        """Makes an idle scheduler over an empty page table."""
        self.config = config
        self.table = table
        self.num_preemptions = 0
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._running: list[Sequence] = []
        # Scheduled for the last time in the step before; their pages go back with the next one.
        self._draining: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for pages or for a place."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would have a sequence to look at."""
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> None:
        """Queues a request that `check` lets pass."""
        self.check(request)
        self._waiting.append(request.sequences[0])

    def check(self, request: Request) -> None:
        """Refuses a request that could never run.

        Raises:
          RequestTooLongError: if it could not run even with the whole pool to itself.
          ValueError: if it wants more samples than can run at once.
        """
        config, table = self.config, self.table
        (seq,) = request.sequences
        if seq.num_prompt_tokens >= config.max_model_len:
            raise RequestTooLongError(
                f"request {request.request_id!r}: a prompt of {seq.num_prompt_tokens} tokens "
                f"leaves no room for an answer in max_model_len={config.max_model_len}; shorten "
                "the prompt or raise max_model_len"
            )
        # The last token is returned, never attended to: it needs no cell.
        longest = seq.max_total_tokens - 1
        if config.reservation == "max":
            longest = config.max_model_len
        needed, usable = -(-longest // table.page_size), table.pool.num_usable_pages
        if needed > usable:
            raise RequestTooLongError(
                f"request {request.request_id!r}: {seq.num_prompt_tokens} prompt tokens and up to "
                f"{seq.max_total_tokens - seq.num_prompt_tokens} more need {needed} pages of "
                f"{table.page_size} tokens, but the pool has {usable}; lower max_tokens or raise "
                "num_pages"
            )
        num_samples = request.params.n
        if num_samples > config.max_num_seqs:
            raise ValueError(
                f"request {request.request_id!r}: n={num_samples} samples exceed max_num_seqs="
                f"{config.max_num_seqs}; lower n or raise max_num_seqs"
            )
        if num_samples > 1 and config.reservation == "max":
            raise ValueError(
                f"request {request.request_id!r}: n={num_samples} needs shared pages, which "
                "reservation='max' does not have; use n=1 or reservation='paged'"
            )

    def schedule(self) -> ScheduledStep:
        """Plans the next step and assigns its pages; without sequences it has nothing to do."""
        for seq in self._draining:
            self._free_pages(seq)
        self._draining.clear()
        step = ScheduledStep()
        budget = self.config.max_num_batched_tokens
        running, table = self._running, self.table
        index = 0
        while index < len(running) and budget:
            seq = running[index]
            num_tokens = min(seq.num_tokens - seq.num_computed_tokens, budget)
            assert seq.table_id is not None
            while table.pages_needed(seq.table_id, num_tokens) > table.pool.num_free_pages:
                step.num_preemptions += 1
                self.num_preemptions += 1
                if self._preempt_youngest() is seq:
                    break
            else:
                budget -= num_tokens
                index += self._plan(step, seq, num_tokens)
        if not step.num_preemptions:
            self._admit(step, budget)
        for seq in step.samples:
            if seq.num_tokens >= seq.max_total_tokens:
                # Its last token is on its way. The next step may have its pages: steps run in order
                # on the device, so what writes there comes after what reads.
                self._running.remove(seq)
                self._draining.append(seq)
                seq.status = Status.DRAINING
        return step

    def finish(self, seq: Sequence, reason: str) -> None:
        """Ends a sequence, wherever it is; its pages are free from now on."""
        if seq.status is Status.FINISHED:
            return
        self._leave_queue(seq)
        seq.status = Status.FINISHED
        seq.finish_reason = reason

    def _admit(self, step: ScheduledStep, budget: int) -> None:
        """Starts waiting sequences, oldest first, while tokens, places and pages last."""
        config, table = self.config, self.table
        while self._waiting and budget:
            seq = self._waiting[0]
            # Running sequences have forked by now: one that still computes its prompt has used up
            # the budget.
            if len(self._running) + 1 + seq.num_pending_forks > config.max_num_seqs:
                return
            if config.reservation == "max":
                reserved, spare = config.max_model_len, 0
            else:
                # The pages of its whole prompt, though the first chunk may take fewer; and two for
                # each that runs to grow into, so that it is not preempted soon (measured:
                # docs/decisions.md), as far as the pool can spare them.
                reserved = seq.num_tokens
                spare = min(2 * len(self._running), table.pool.num_usable_pages // 16)
            if -(-reserved // table.page_size) + spare > table.pool.num_free_pages:
                return
            self._waiting.popleft()
            seq.table_id = table.add()
            seq.status = Status.RUNNING
            if config.reservation == "max":
                table.reserve(seq.table_id, config.max_model_len)
            self._running.append(seq)
            num_tokens = min(seq.num_tokens, budget)
            budget -= num_tokens
            self._plan(step, seq, num_tokens)

    def _plan(self, step: ScheduledStep, seq: Sequence, num_tokens: int) -> int:
        """Adds a row to the step: pages for its tokens, and samples if they are its last ones.

        Returns:
          How many running sequences this settles for the step: `seq`, and those forked from it.
        """
        assert seq.table_id is not None
        step.copies += self.table.append(seq.table_id, num_tokens)
        row = len(step.seqs)
        step.seqs.append(seq)
        step.num_scheduled_tokens.append(num_tokens)
        step.input_slots.append(seq.sample_slot if seq.num_inflight_tokens else -1)
        if num_tokens > 1 or seq.num_computed_tokens < seq.num_prompt_tokens:
            step.num_prefill_tokens += num_tokens
        seq.num_computed_tokens += num_tokens
        if seq.num_computed_tokens < seq.num_tokens:
            return 1
        self._plan_sample(step, seq, row)
        forks = seq.num_pending_forks
        while seq.num_pending_forks:
            seq.num_pending_forks -= 1
            child = seq.request.fork_sequence(seq)
            child.table_id = self.table.fork(seq.table_id)
            child.status = Status.RUNNING
            # Nothing is younger than a sequence that has just computed its prompt.
            self._running.append(child)
            self._plan_sample(step, child, row)
        return 1 + forks

    def _plan_sample(self, step: ScheduledStep, seq: Sequence, row: int) -> None:
        seq.sample_slot = len(step.samples)
        seq.num_inflight_tokens += 1
        step.samples.append(seq)
        step.sample_rows.append(row)

    def _preempt_youngest(self) -> Sequence:
        seq = self._running[-1]
        assert seq.table_id is not None
        pages, lost = len(self.table.pages(seq.table_id)), seq.num_computed_tokens
        self._leave_queue(seq)
        seq.status = Status.WAITING
        seq.num_computed_tokens = 0
        self._waiting.appendleft(seq)
        logger.info(
            "preempted request %r sample %d: out of pages; %d pages freed, %d tokens to recompute",
            seq.request.request_id,
            seq.sample_index,
            pages,
            lost,
        )
        return seq

    def _leave_queue(self, seq: Sequence) -> None:
        """Takes a sequence off the queue that it is in and frees its pages."""
        if seq.status is Status.RUNNING:
            self._running.remove(seq)
        elif seq.status is Status.WAITING:
            self._waiting.remove(seq)
        self._free_pages(seq)

    def _free_pages(self, seq: Sequence) -> None:
        if seq.table_id is not None:
            self.table.free(seq.table_id)
            seq.table_id = None
