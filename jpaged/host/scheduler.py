# SPDX-License-Identifier: Apache-2.0
"""Decides, before each step, which sequences compute how many tokens, and on which pages.

Pure Python: it runs one step ahead of the device, because a step's page assignments do not depend
on the values that are sampled.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Sequence as SequenceOf

from jpaged.host.admission import SchedulerConfig, check_fits
from jpaged.host.beam import continue_beams
from jpaged.host.page_table import PageTable
from jpaged.host.prefix_cache import PrefixCache
from jpaged.host.sequence import Request, Sequence, Status
from jpaged.host.step import ScheduledStep
from jpaged.host.swap import SwapSpace, choose_preemption

logger = logging.getLogger(__name__)


class Scheduler:
    """First come, first served, with continuous batching, chunked prefill and preemption.

    Running sequences go first, oldest first, each with all the tokens it lacks or as many as the
    budget allows; what is left of the budget admits waiting ones. When pages run out, the youngest
    request is preempted, all its sequences together: they give their pages back and wait at the
    head of the queue, to find them in the prefix cache, get them back from host memory, or compute
    them again. The oldest can therefore always go on, and since a request that does not fit the
    empty pool is refused when it is added, everything ends. A request that is alone loses its
    youngest sample only.

    The beams of a request are scheduled together, and only when the host knows where the step
    before has taken them.

    Invariants:
      - Every running sequence is older than every waiting one.
      - The running sequences of a request stand side by side.
      - Running sequences number at most max_num_seqs.
    """

    def __init__(self, config: SchedulerConfig, table: PageTable):
        """Makes an idle scheduler over an empty page table."""
        self.config = config
        self.table = table
        self.cache = PrefixCache(table.pool)
        self.swap_space = SwapSpace(config.num_host_pages)
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

    def add(self, request: Request, salt: object = None) -> None:
        """Queues a request that `admission.check_fits` lets pass.

        Args:
          request: as it was made.
          salt: requests with equal ones share the pages of equal prefixes.
        """
        check_fits(request, self.config, self.table)
        self._set_root(request, salt)
        self._waiting.append(request.sequences[0])

    def fork(self, parent: Request, child: Request) -> None:
        """Starts a request where another is, with the tokens of its only sequence.

        Args:
          parent: live.
          child: `admission.check_fits` lets it pass; its sequence knows the tokens. It shares the
            pages of the parent, but computes the last token again, for what comes after it.
        """
        (source,), (seq,) = parent.sequences, child.sequences
        child.cache_root = self.cache.use_root(parent.cache_root)
        if source.status is Status.WAITING:
            self._waiting.insert(self._waiting.index(source) + 1, seq)
            return
        if source.status is not Status.RUNNING or not self._num_free_places():
            # Behind those that wait for others of their request, which run already.
            last = self._running[-1].request if self._running else None
            self._waiting.insert(sum(other.request is last for other in self._waiting), seq)
            return
        assert source.table_id is not None
        held = min(source.num_computed_tokens, seq.num_known_tokens - 1)
        seq.table_id = self.table.fork(source.table_id, held)
        seq.num_computed_tokens = held
        seq.num_addressed_pages = min(source.num_addressed_pages, held // self.table.page_size)
        seq.status = Status.RUNNING
        self._running.insert(self._running.index(source) + 1, seq)

    def schedule(self) -> ScheduledStep:
        """Plans the next step and assigns its pages; without sequences it has nothing to do."""
        for seq in self._draining:
            if seq.table_id is not None:
                self.cache.address(self.table, seq, seq.num_computed_tokens)
                self._free_pages(seq)
        self._draining.clear()
        step = ScheduledStep()
        budget = self._plan_running(step)
        if not step.num_preemptions:
            self._admit(step, budget)
        if not step.seqs:
            # Of beams that were just admitted, each waited for the others.
            self._plan_running(step)
        for seq in step.samples:
            if seq.num_tokens >= seq.max_total_tokens and seq.request.beam_search is None:
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
        if reason not in ("abort", "error") and seq.table_id is not None:
            # Its last token came from a step that is over, so what is before was computed.
            known = seq.num_known_tokens - 1
            self.cache.address(self.table, seq, known, end=known)
        self._leave_queue(seq)
        seq.status = Status.FINISHED
        seq.finish_reason = reason

    def advance_beams(self, request: Request, parents: SequenceOf[int]) -> None:
        """Has the beams of a request go on from those that a step has chosen.

        Page tables are forked and dropped, no page is copied: that is for the step that writes.

        Args:
          request: whose sequences are the beams before.
          parents: for each beam from now on, which of them it continues, in the order of
            `BeamSearch.nodes`; none if the search has ended.
        """
        before = list(request.sequences)
        first = before[0]
        beams = continue_beams(self.table, request, parents)
        if first.swapped is not None:
            self.swap_space.continue_beams(before, beams, parents)
        self._replace_in_queue(before, beams, first.status)
        for beam in beams:
            beam.status = first.status
        for beam in before[len(beams) :]:
            beam.status = Status.FINISHED
        request.sequences = beams or before[:1]

    def check_invariants(self) -> None:
        """Raises AssertionError if the books do not balance. Cost: every page; for tests."""
        self.table.check_invariants()
        self.cache.check_invariants()
        groups = {id(s.swapped): s.swapped for s in self._waiting if s.swapped is not None}
        self.swap_space.check_invariants(groups.values())
        assert len(self._running) <= self.config.max_num_seqs
        holders = [*self._running, *(seq for seq in self._draining if seq.table_id is not None)]
        assert len({seq.table_id for seq in holders}) == len(holders) == self.table.num_seqs
        assert all(seq.status is Status.RUNNING for seq in self._running)
        assert all(seq.table_id is None for seq in self._waiting)
        seen: list[Request] = []
        for seq in self._running:
            if not seen or seen[-1] is not seq.request:
                assert seq.request not in seen, "sequences of a request stand apart"
                seen.append(seq.request)

    def _plan_running(self, step: ScheduledStep) -> int:
        """Plans all that run, oldest first, and preempts where pages lack.

        Returns:
          How many more tokens the step can compute.
        """
        budget, running = self.config.max_num_batched_tokens, self._running
        pool, size = self.table.pool, self.table.page_size
        index = 0
        while index < len(running) and budget:
            seq = running[index]
            if len(seq.request.sequences) == 1 and seq.request.beam_search is None:
                # Most are alone, and find pages: this is all that a step costs for them.
                num_tokens = min(seq.num_tokens - seq.num_computed_tokens, budget)
                if num_tokens // size + 2 <= pool.num_free_pages:
                    budget -= num_tokens
                    index += 1 + self._plan_row(step, seq, num_tokens)
                    continue
            group = self._group(index)
            tokens = self._tokens_of(group, budget)
            if tokens is None:
                break
            if self._pages_needed(group, tokens) > pool.num_free_pages:
                self._preempt_for(group, step)
                continue
            budget -= sum(tokens)
            index += self._plan(step, group, tokens)
        return budget

    def _group(self, index: int) -> list[Sequence]:
        """The running sequences of a request, of which the first is at `index`."""
        running = self._running
        request = running[index].request
        if len(request.sequences) == 1:
            return running[index : index + 1]
        end = index + 1
        while end < len(running) and running[end].request is request:
            end += 1
        return running[index:end]

    def _tokens_of(self, group: SequenceOf[Sequence], budget: int) -> list[int] | None:
        """How many tokens each of a group computes; None if it must wait for more budget."""
        search = group[0].request.beam_search
        lacking = [seq.num_tokens - seq.num_computed_tokens for seq in group]
        if search is not None:
            if group[0].num_inflight_tokens:
                return [0] * len(group)
            if len(search.nodes) > 1:
                if len(group) == len(search.nodes) and max(lacking) == 1:
                    return lacking if budget >= len(group) else None
                # Some compute again what was preempted; the last token waits for the others'.
                lacking = [count - 1 for count in lacking]
        tokens: list[int] = []
        for count in lacking:
            tokens.append(min(count, budget))
            budget -= tokens[-1]
        return tokens

    def _pages_needed(self, group: SequenceOf[Sequence], tokens: SequenceOf[int]) -> int:
        if len(group) == 1:
            assert group[0].table_id is not None
            return self.table.pages_needed(group[0].table_id, tokens[0])
        return self.table.pages_needed_together(
            (seq.table_id, count)
            for seq, count in zip(group, tokens, strict=True)
            if seq.table_id is not None
        )

    def _admit(self, step: ScheduledStep, budget: int) -> None:
        """Starts waiting sequences, oldest first, while tokens, places and pages last."""
        while self._waiting and budget:
            group = self._swap_in(step) if self._waiting[0].swapped else self._start(step)
            if group and group[0].request.beam_search is not None:
                # With those that run already, if this completes them.
                beams = self._running[self._running.index(group[0]) - group[0].sample_index :]
                group = group if any(beam in step.seqs for beam in beams) else beams
            tokens = self._tokens_of(group, budget) if group else None
            if tokens is None or self._pages_needed(group, tokens) > self.table.pool.num_free_pages:
                return
            budget -= sum(tokens)
            self._plan(step, group, tokens)

    def _start(self, step: ScheduledStep) -> list[Sequence]:
        """Gives the first waiting sequence a place, and the pages of its prefix that are known.

        Returns:
          The sequence, for which there are pages; none if it must wait.
        """
        config, table, seq = self.config, self.table, self._waiting[0]
        if self._num_free_places() < self._places_needed(seq.request, 1):
            return []
        pool, size, total = table.pool, table.page_size, seq.num_known_tokens
        pages: list[int] = []
        held = 0
        if config.reservation == "max":
            needed = -(-config.max_model_len // size)
        else:
            root = seq.request.cache_root
            if root is not None:
                pages = self.cache.match(root, seq.tokens(0, total), size)
            # At least one token is computed, for what comes after it. If it is in a page that is
            # known, that page is copied, unless it is written only now, or there is no other.
            held = min(len(pages) * size, total - 1)
            whole = held // size
            free = pool.num_free_pages - self._spare_pages(seq)
            # The pages of its whole prompt, though the first chunk may take fewer.
            needed = -(-total // size) - sum(pool.refcount(page) > 0 for page in pages[:whole])
            if whole < len(pages):
                cached = pool.refcount(pages[whole]) == 0
                alone = seq.request.beam_search is None  # beams wait, and the copy with them
                if pages[whole] in step.addressed or needed + cached > free or not alone:
                    held = whole * size
                else:
                    needed += cached
            pages = pages[: -(-held // size)]
            needed += self._spare_pages(seq)
        if needed > pool.num_free_pages:
            return []
        self._waiting.popleft()
        seq.table_id = table.add_shared(pages, held)
        seq.num_computed_tokens = held
        seq.num_addressed_pages = held // size
        seq.status = Status.RUNNING
        if config.reservation == "max":
            table.reserve(seq.table_id, config.max_model_len)
        self._running.append(seq)
        step.num_lookup_tokens += total
        step.num_hit_tokens += held
        return [seq]

    def _swap_in(self, step: ScheduledStep) -> list[Sequence]:
        """Gives the first waiting sequence, and all that were swapped with it, their pages back.

        Returns:
          The sequences; none if they must wait.
        """
        first = self._waiting[0]
        swapped = first.swapped
        assert swapped is not None
        group = list(swapped.held)
        if self._num_free_places() < self._places_needed(first.request, len(group)):
            return []
        needed = len(swapped.host_pages) + self._spare_pages(first)
        if self._running:
            # To go on with: pages for all tokens, and a copy for each.
            needed += sum(
                -(-seq.num_tokens // self.table.page_size) - len(pages) + 1
                for seq, (pages, _) in swapped.held.items()
            )
        if needed > self.table.pool.num_free_pages:
            return []
        step.swap_ins += self.swap_space.swap_in(self.table, swapped)
        for seq in group:
            self._waiting.popleft()
            seq.status = Status.RUNNING
        self._running += group
        return group

    def _num_free_places(self) -> int:
        """Sequences that can still start; all beams of a search that runs have their places."""
        places, last = self.config.max_num_seqs, None
        for seq in self._running:
            search = seq.request.beam_search
            if search is None:
                places -= 1
            elif seq.request is not last:
                last = seq.request
                places -= search.width
        return places

    def _places_needed(self, request: Request, count: int) -> int:
        search = request.beam_search
        if search is None:
            return count
        return 0 if any(seq.request is request for seq in self._running) else search.width

    def _spare_pages(self, seq: Sequence) -> int:
        """Pages to leave free: two for each that runs to grow into, as far as the pool can spare.

        So that what is admitted is not preempted soon (measured: docs/decisions.md).
        """
        others = len(self._running)
        if seq.request.beam_search is not None:
            # Beams wait for each other: they must not wait for room beside each other.
            others = sum(other.request is not seq.request for other in self._running)
        return min(2 * others, self.table.pool.num_usable_pages // 16)

    def _plan(
        self, step: ScheduledStep, group: SequenceOf[Sequence], tokens: SequenceOf[int]
    ) -> int:
        """Adds rows to the step: pages for the tokens, and samples where they are the last ones.

        Returns:
          How many running sequences this settles for the step: the group, and its forks.
        """
        settled = len(group)
        first_slot = len(step.samples)
        for seq, num_tokens in zip(group, tokens, strict=True):
            if num_tokens:
                settled += self._plan_row(step, seq, num_tokens)
        search = group[0].request.beam_search
        if search is not None and len(step.samples) > first_slot:
            step.beams.append((group[0].request, first_slot))
        return settled

    def _plan_row(self, step: ScheduledStep, seq: Sequence, num_tokens: int) -> int:
        """Adds one row. Returns: how many samples it forked."""
        assert seq.table_id is not None
        if copies := self.table.append(seq.table_id, num_tokens):
            step.copies += copies
        before = seq.num_computed_tokens
        row = step.add_row(seq, num_tokens)
        computed = seq.num_computed_tokens
        if computed // self.table.page_size > seq.num_addressed_pages:
            step.addressed += self.cache.address(self.table, seq, before)
        if computed < seq.num_tokens:
            return 0
        step.add_sample(seq, row)
        return self._fork_samples(step, seq, row) if seq.num_pending_forks else 0

    def _fork_samples(self, step: ScheduledStep, parent: Sequence, row: int) -> int:
        """Starts as many samples as there are places; the next one waits, and starts the others."""
        assert parent.table_id is not None
        forks = min(parent.num_pending_forks, self._num_free_places())
        at = self._running.index(parent) + 1
        for index in range(forks):
            child = parent.request.fork_sequence(parent)
            child.table_id = self.table.fork(parent.table_id)
            child.status = Status.RUNNING
            self._running.insert(at + index, child)
            step.add_sample(child, row)
        left, parent.num_pending_forks = parent.num_pending_forks - forks, 0
        if left:
            child = parent.request.fork_sequence(parent)
            child.num_computed_tokens = child.num_addressed_pages = 0
            child.num_pending_forks = left - 1
            self._waiting.appendleft(child)
        return forks

    def _set_root(self, request: Request, salt: object) -> None:
        if self.config.reservation == "max":
            return
        if self.config.prefix_cache:
            request.cache_root = self.cache.root(salt)
        elif request.params.num_samples > 1 or request.beam_search is not None:
            # Its samples find each other's pages again after a preemption.
            request.cache_root = self.cache.private_root()

    def _preempt_for(self, group: SequenceOf[Sequence], step: ScheduledStep) -> None:
        """Preempts the youngest request, or its youngest sample if there is no other request."""
        running = self._running
        victim = running[-1].request
        if victim is not running[0].request:
            first = len(running) - 1
            while running[first - 1].request is victim:
                first -= 1
            victims = running[first:]
        else:
            assert victim.beam_search is None, "beams that do not fit the pool were admitted"
            victims = running[-1:]
        self._preempt(victims, group[0].request, step)

    def _preempt(self, victims: list[Sequence], wanted_by: Request, step: ScheduledStep) -> None:
        """Takes the pages of sequences that run, side by side and last; logs what it costs."""
        # What this step swaps in cannot be swapped out before.
        preemption = "recompute" if step.swap_ins else self.config.preemption
        choice = choose_preemption(
            preemption, self.config.costs, self.table, self.swap_space, victims
        )
        for seq in victims:
            self._running.remove(seq)
            seq.status = Status.WAITING
        if choice.swap:
            step.swap_outs += self.swap_space.swap_out(self.table, victims)
        else:
            for seq in victims:
                self._free_pages(seq)
                seq.num_computed_tokens = seq.num_addressed_pages = 0
        self._waiting.extendleft(reversed(victims))
        step.num_preemptions += len(victims)
        self.num_preemptions += len(victims)
        count = len(victims)
        who = f"sequence {victims[0].sample_index}" if count == 1 else f"{count} sequences"
        logger.info(
            "preempted request %r (%s), as request %r needs pages: %s",
            victims[0].request.request_id,
            who,
            wanted_by.request_id,
            choice,
        )

    def _replace_in_queue(
        self, before: SequenceOf[Sequence], after: SequenceOf[Sequence], status: Status
    ) -> None:
        """Puts sequences where others of their request stand, side by side."""
        if status is Status.RUNNING:
            at = self._running.index(before[0])
            self._running[at : at + len(before)] = after
        else:
            at = self._waiting.index(before[0])
            waiting = list(self._waiting)
            waiting[at : at + len(before)] = after
            self._waiting = collections.deque(waiting)

    def _leave_queue(self, seq: Sequence) -> None:
        """Takes a sequence off the queue that it is in and frees its pages."""
        queues = {Status.RUNNING: self._running, Status.WAITING: self._waiting}
        queue = queues.get(seq.status, self._draining)
        if queue is not self._draining or seq in queue:
            queue.remove(seq)
        if seq.swapped is not None:
            self.swap_space.leave(seq)
        self._free_pages(seq)

    def _free_pages(self, seq: Sequence) -> None:
        if seq.table_id is not None:
            self.table.free(seq.table_id)
            seq.table_id = None
