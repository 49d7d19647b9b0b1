# SPDX-License-Identifier: Apache-2.0
"""Decides, before each step, which sequences compute how many tokens, and on which pages.

Pure Python: it runs one step ahead of the device, because a step's page assignments do not depend
on the values that are sampled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf

from jpaged.host.admission import Admission, SchedulerConfig
from jpaged.host.burst import next_step
from jpaged.host.continuation import continue_sequences
from jpaged.host.page_table import PageTable
from jpaged.host.preemption import Preemption, take_pages
from jpaged.host.prefix_cache import PrefixCache
from jpaged.host.prompt_cache import PromptCache
from jpaged.host.queues import Queues
from jpaged.host.sequence import Request, Sequence, Status
from jpaged.host.step_builder import ScheduledStep, StepBuilder
from jpaged.host.swap import SwapSpace
from jpaged.host.victims import victims_of

logger = logging.getLogger(__name__)


class Scheduler:
    """First come, first served, by priority, with chunked prefill and preemption.

    Running sequences go first, in order (`Sequence.order`), each with all the tokens it lacks or as
    many as the budget allows; what is left of the budget admits waiting ones. When pages run out, a
    request is preempted, all its sequences together (`jpaged.host.victims`): they give their pages
    back and wait where their order says, to find them in the prefix cache, get them back from host
    memory, or compute them again. The first in order always goes on, nobody overtakes who waits,
    and a request that does not fit the empty pool is refused when it is added: so everything ends.
    A request that is alone loses its last sample only.

    What else there is to know of a request is its `growth`: whether its sequences are computed all
    in one step, or none, and whether they wait for the host.
    """

    def __init__(
        self, config: SchedulerConfig, table: PageTable, prompts: PromptCache | None = None
    ):
        """Makes an idle scheduler over an empty page table, and maybe pages on disk."""
        self.config = config
        self.table = table
        self.cache = PrefixCache(table.pool, table.kinds)
        self.swap_space = SwapSpace(config.num_host_pages)
        self.num_preemptions = 0
        # Called with sequences of a request that lost their pages, who needs them, and how.
        self.on_preempt: Callable[[SequenceOf[Sequence], Request, Preemption], object] | None = None
        self._queues = Queues(config.max_num_seqs)
        self._num_added = 0
        self.victims_of = victims_of  # as the next, replaced by who compares: `jpaged.simulation`
        self.admission = Admission(
            config, table, self.cache, self.swap_space, self._queues, prompts
        )
        # What is reserved ahead is kept.
        has_windows = any(kind.window is not None for kind in table.kinds)
        self._releases = has_windows and config.reservation == "paged"

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for pages or for a place."""
        return len(self._queues.waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._queues.running)

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would have a sequence to look at."""
        return bool(self._queues.waiting or self._queues.running)

    def holders(self) -> Iterator[Sequence]:
        """The sequences that have pages."""
        return self._queues.holders()

    def add(self, request: Request, salt: object = None) -> None:
        """Queues a request that `admission.check_fits` lets pass.

        Args:
          request: as it was made; without the check it might wait for ever.
          salt: requests with equal ones share the pages of equal prefixes.
        """
        self._set_root(request, salt)
        self._num_added += 1
        request.order = request.params.priority, self._num_added, 0
        for seq in request.sequences:
            # One that resumes may have several, some of which have ended.
            if seq.status is Status.WAITING:
                self._queues.queue(seq)

    def fork(self, parent: Request, child: Request) -> None:
        """Starts a request where another is, with the tokens of its only sequence.

        Args:
          parent: live.
          child: `admission.check_fits` lets it pass; its sequence knows the tokens. It shares the
            pages of the parent, but computes the last token again, for what comes after it. It
            waits where the parent does, or another that comes before it, or no place is free.
        """
        (source,), (seq,) = parent.sequences, child.sequences
        self._num_added += 1
        child.order = child.params.priority, parent.order[1], self._num_added
        child.cache_root = self.cache.use_root(parent.cache_root)
        if source.status is not Status.RUNNING or not self._queues.has_turn(seq):
            self._queues.queue(seq)
            return
        assert source.table_id is not None
        held = min(source.num_computed_tokens, seq.num_known_tokens - 1)
        seq.table_id = self.table.fork(source.table_id, held)
        seq.num_computed_tokens = held
        seq.num_addressed_pages = min(source.num_addressed_pages, held // self.table.page_size)
        self._queues.start([seq])

    def schedule(self) -> ScheduledStep:
        """Plans the next step and assigns its pages; without sequences it has nothing to do."""
        for seq in self._queues.draining:
            if seq.table_id is not None:
                self.cache.address_pages(self.table, seq, seq.num_computed_tokens)
                self._free_pages(seq)
        self._queues.draining.clear()
        step = StepBuilder()
        budget = self._plan_running(step)
        if not step.num_preemptions:
            self._admit(step, budget)
        if not step.num_rows:
            # Of sequences that were just admitted, each waited for the others of its request.
            self._plan_running(step)
        planned = step.build()
        self._drain(planned)
        return planned

    def extend(self, step: ScheduledStep) -> ScheduledStep | None:
        """Plans a step to be dispatched together with the one planned last, as they burst.

        Returns:
          The step; None where it is for `schedule` to say what comes next, as a sequence waits, or
          one that runs is not in the step, or pages lack.
        """
        num_running = sum(seq.status is Status.RUNNING for seq in step.samples)
        if self._queues.waiting or num_running != len(self._queues.running):
            return None
        after = next_step(step, self.table)
        if after is not None:
            self._drain(after)
        return after

    def finish(self, seq: Sequence, reason: str) -> None:
        """Ends a sequence, wherever it is; its pages are free from now on."""
        if seq.status is Status.FINISHED:
            return
        if reason not in ("abort", "error") and seq.table_id is not None:
            # Its last token came from a step that is over, so what is before was computed.
            known = seq.num_known_tokens - 1
            self.cache.address_pages(self.table, seq, known, end=known)
        self._queues.remove(seq)
        if seq.swapped is not None:
            self.swap_space.leave(seq.swapped, seq)
            seq.swapped = None
        self._free_pages(seq)
        seq.status = Status.FINISHED
        seq.finish_reason = reason

    def continue_from(self, request: Request, parents: SequenceOf[int]) -> None:
        """Has the sequences of a request go on from those that its growth has chosen.

        Page tables are forked and dropped, no page is copied: that is for the step that writes.

        Args:
          request: with the sequences before.
          parents: what `Growth.accept` returned.
        """
        before = list(request.sequences)
        after = continue_sequences(self.table, self.swap_space, request, parents)
        self._queues.replace(before, after)
        request.sequences = after or before[:1]

    def check_invariants(self) -> None:
        """Raises AssertionError if the books do not balance. Cost: every page; for tests."""
        self.table.check_invariants()
        self.cache.check_invariants()
        self._queues.check_invariants()
        swapped = (seq.swapped for seq in self._queues.waiting)
        groups = {id(group): group for group in swapped if group is not None}
        self.swap_space.check_invariants(groups.values())
        holders = list(self.holders())
        assert len({seq.table_id for seq in holders}) == len(holders) == len(self.table.seqs())

    def _drain(self, step: ScheduledStep) -> None:
        for seq in step.samples:
            length = len(seq.token_ids) + seq.num_inflight_tokens  # num_tokens, for every sample
            if length >= seq.max_total_tokens and not seq.request.growth.waits_for_host:
                # Its last token is on its way. The next step may have its pages: steps run in order
                # on the device, so what writes there comes after what reads.
                self._queues.drain(seq)

    def _plan_running(self, step: StepBuilder) -> int:
        """Plans all that run, in order, and preempts where pages lack.

        Returns:
          How many more tokens the step can compute.
        """
        budget, running = self.config.max_num_batched_tokens, self._queues.running
        pool, size, groups = self.table.pool, self.table.page_size, self.table.num_groups
        if self._releases:
            self._release_unseen()
        index = 0
        while index < len(running) and budget:
            seq = running[index]
            if seq.request.is_single:
                # Most are alone, and find pages: this is all that a step costs for them.
                lacking = seq.num_tokens - seq.num_computed_tokens
                num_tokens = min(lacking, budget)
                if seq.request.scored is not None:
                    num_tokens = self._fitting(step, seq, lacking, budget)
                if (num_tokens // size + 2) * groups <= pool.num_free_pages:
                    budget -= num_tokens
                    index += 1 + self._plan_row(step, seq, num_tokens, num_tokens == lacking)
                    continue
            group = self._queues.group(index)
            tokens = self._tokens_of(step, group, budget)
            if tokens is None:
                break
            if self._pages_needed(group, tokens) > pool.num_free_pages:
                self._preempt(self.victims_of(self._queues, self.table, index), seq.request, step)
                continue
            budget -= sum(tokens)
            index += self._plan(step, group, tokens)
        return budget

    def _tokens_of(
        self, step: StepBuilder, group: SequenceOf[Sequence], budget: int
    ) -> list[int] | None:
        """How many tokens each of a group computes; None if it must wait for more budget."""
        growth = group[0].request.growth
        if growth.waits_for_host and group[0].num_inflight_tokens:
            return [0] * len(group)
        lacking = [seq.num_tokens - seq.num_computed_tokens for seq in group]
        if growth.num_rows > 1:
            if len(group) == growth.num_rows and max(lacking) == 1:
                return lacking if budget >= len(group) else None
            # Some compute again what was preempted; the last token waits for the others'.
            lacking = [count - 1 for count in lacking]
        tokens: list[int] = []
        for seq, count in zip(group, lacking, strict=True):
            fitting = min(count, budget)
            if fitting and seq.request.scored is not None:
                fitting = self._fitting(step, seq, count, budget)
            tokens.append(fitting)
            budget -= fitting
        return tokens

    def _fitting(self, step: StepBuilder, seq: Sequence, lacking: int, budget: int) -> int:
        """How many tokens a sequence computes that has tokens scored, each in a sample's place."""
        assert seq.request.scored is not None
        start, room = seq.num_computed_tokens, self._room(step)
        return seq.request.scored.fitting(start, lacking, budget, room)

    def _room(self, step: StepBuilder) -> int:
        """Places of samples that are neither of a sequence that runs nor of a score."""
        return self.config.max_num_seqs - len(self._queues.running) - step.num_extra_places

    def _has_room_for(self, step: StepBuilder, first: Sequence) -> bool:
        return first.swapped is None and first.request.growth.num_rows == 1 and self._room(step) > 0

    def _release_unseen(self) -> None:
        """Gives back pages that neither those that run nor forks of them see from here on.

        All do before the first takes pages: nobody is preempted for what another has left behind.
        A page may have another owner in the step that is planned: those before it, which read it,
        come first on the device. What the host does not know when it plans a step is the newest
        token alone, and that is read before anybody can ask for a fork.
        """
        for seq in self._queues.running:
            assert seq.table_id is not None
            self.table.release_before(seq.table_id, seq.num_computed_tokens)

    def _pages_needed(self, group: SequenceOf[Sequence], tokens: SequenceOf[int]) -> int:
        if len(group) == 1:
            assert group[0].table_id is not None
            return self.table.pages_needed(group[0].table_id, tokens[0])
        return self.table.pages_needed_together(
            (seq.table_id, count)
            for seq, count in zip(group, tokens, strict=True)
            if seq.table_id is not None
        )

    def _admit(self, step: StepBuilder, budget: int) -> None:
        """Starts waiting sequences, in order, while tokens, places and pages last."""
        queues = self._queues
        while queues.waiting and budget:
            if step.num_extra_places and not self._has_room_for(step, queues.waiting[0]):
                return
            group = self.admission.start(step, budget)
            if group and group[0].request.growth.num_rows > 1:
                # With those that run already, if this completes them.
                first = queues.running.index(group[0]) - group[0].sample_index
                together = queues.group(first)
                group = group if any(map(step.has_row, together)) else together
            tokens = self._tokens_of(step, group, budget) if group else None
            if tokens is None or self._pages_needed(group, tokens) > self.table.pool.num_free_pages:
                return
            budget -= sum(tokens)
            self._plan(step, group, tokens)

    def _plan(self, step: StepBuilder, group: SequenceOf[Sequence], tokens: SequenceOf[int]) -> int:
        """Adds rows to the step: pages for the tokens, and samples where they are the last ones.

        Returns:
          How many running sequences this settles for the step: the group, and its forks.
        """
        settled, first_sample = len(group), step.num_samples
        for seq, num_tokens in zip(group, tokens, strict=True):
            if num_tokens:
                last = num_tokens == seq.num_tokens - seq.num_computed_tokens
                settled += self._plan_row(step, seq, num_tokens, last)
        request = group[0].request
        if (chooser := request.growth.chooser) is not None and step.num_samples > first_sample:
            step.add_search(request, chooser, first_sample)
        return settled

    def _plan_row(self, step: StepBuilder, seq: Sequence, num_tokens: int, last: bool) -> int:
        """Adds one row, and its sample if its tokens are the last that it lacks.

        Returns:
          How many samples it forked.
        """
        assert seq.table_id is not None
        if copies := self.table.append(seq.table_id, num_tokens):
            step.copies += copies
        before = seq.num_computed_tokens
        row = step.add_row(seq, num_tokens)
        computed = seq.num_computed_tokens
        if computed // self.table.page_size > seq.num_addressed_pages:
            step.addressed.update(self.cache.address_pages(self.table, seq, before))
        if seq.request.scored is not None:
            step.add_scores(seq, row, last)
        if not last:
            return 0
        step.add_sample(seq, row)
        return self._fork_samples(step, seq, row) if seq.num_pending_forks else 0

    def _fork_samples(self, step: StepBuilder, parent: Sequence, row: int) -> int:
        """Starts as many samples as there are places; the next one waits, and starts the others."""
        assert parent.table_id is not None
        forks = min(parent.num_pending_forks, self._queues.num_free_places(), self._room(step))
        children: list[Sequence] = []
        for _ in range(forks):
            child = parent.request.fork_sequence(parent)
            child.table_id = self.table.fork(parent.table_id)
            step.add_sample(child, row)
            children.append(child)
        self._queues.start(children)
        left, parent.num_pending_forks = parent.num_pending_forks - forks, 0
        if left:
            child = parent.request.fork_sequence(parent)
            child.num_computed_tokens = child.num_addressed_pages = 0
            child.num_pending_forks = left - 1
            self._queues.queue(child)
        return forks

    def _set_root(self, request: Request, salt: object) -> None:
        if self.config.reservation == "max":
            return
        if self.config.prefix_cache:
            request.cache_root = self.cache.root(salt)
        elif request.growth.max_sequences > 1:
            # Its sequences find each other's pages again after a preemption.
            request.cache_root = self.cache.private_root()

    def _preempt(self, victims: list[Sequence], wanted_by: Request, step: StepBuilder) -> None:
        """Takes the pages of sequences of a request, none in the step; logs what it costs."""
        # What this step swaps in cannot be swapped out before.
        way = "recompute" if step.swap_ins else self.config.preemption
        choice, copies = take_pages(way, self.config.costs, self.table, self.swap_space, victims)
        step.swap_outs += copies
        self._queues.stop(victims)
        step.num_preemptions += len(victims)
        self.num_preemptions += len(victims)
        count = len(victims)
        who = f"sequence {victims[0].sample_index}" if count == 1 else f"{count} sequences"
        logger.info(
            "preempted request %r (%s), as request %r needs pages: %s",
            victims[0].request.request_id, who, wanted_by.request_id, choice,
        )  # fmt: skip
        if self.on_preempt is not None:
            self.on_preempt(victims, wanted_by, choice)

    def _free_pages(self, seq: Sequence) -> None:
        if seq.table_id is not None:
            self.table.free(seq.table_id)
            seq.table_id = None
