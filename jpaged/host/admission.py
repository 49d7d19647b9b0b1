# SPDX-License-Identifier: Apache-2.0
"""The budgets of a scheduler, which requests could never run within them, and how others start."""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from jpaged.host.groups import most_pages
from jpaged.host.page_table import PageTable
from jpaged.host.preemption import NO_COSTS, PreemptionCosts
from jpaged.host.prefix_cache import PrefixCache
from jpaged.host.prompt_cache import PromptCache
from jpaged.host.queues import Queues
from jpaged.host.sequence import Request, Sequence
from jpaged.host.step_builder import StepBuilder
from jpaged.host.swap import SwappedGroup, SwapSpace


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
      prefix_cache: whether requests share the pages of equal prefixes; samples and beams of one
        request do in any case.
      preemption: "recompute" computes preempted tokens again, "swap" copies their pages to host
        memory and back where there is room, "auto" does what costs less.
      num_host_pages: pages that host memory has room for.
      costs: what "auto" compares.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    reservation: str = "paged"
    prefix_cache: bool = True
    preemption: str = "recompute"
    num_host_pages: int = 0
    costs: PreemptionCosts = NO_COSTS

    def __post_init__(self):
        for name in ("max_num_batched_tokens", "max_num_seqs", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.reservation not in ("paged", "max"):
            raise ValueError(f"reservation={self.reservation!r} must be 'paged' or 'max'")
        if self.preemption not in ("recompute", "swap", "auto"):
            raise ValueError(
                f"preemption={self.preemption!r} must be 'recompute', 'swap' or 'auto'"
            )


def check_fits(request: Request, config: SchedulerConfig, table: PageTable) -> None:
    """Refuses a request that could never run.

    Args:
      request: as it was made.
      config: its budgets.
      table: its pages.

    Raises:
      RequestTooLongError: if it could not run even with the whole pool to itself.
      ValueError: if it wants more beams than can run at once.
    """
    (seq,), growth, scored = request.sequences, request.growth, request.scored
    # Of a score all tokens are given, and nothing is generated.
    num_given = 0 if scored is None else len(scored.token_ids)
    is_score = num_given > seq.num_prompt_tokens
    if seq.num_prompt_tokens >= seq.max_total_tokens:
        if is_score:
            raise RequestTooLongError(
                f"request {request.request_id!r}: prompt and completion have {num_given} tokens, "
                f"more than the {config.max_model_len + 1} that can be scored with "
                f"max_model_len={config.max_model_len}; shorten them or raise max_model_len"
            )
        raise RequestTooLongError(
            f"request {request.request_id!r}: a prompt of {seq.num_prompt_tokens} tokens "
            f"leaves no room for an answer in max_model_len={config.max_model_len}; shorten "
            "the prompt or raise max_model_len"
        )
    width = growth.reserved_places or 1
    most = min(config.max_num_seqs, config.max_num_batched_tokens)
    if width > most:
        raise ValueError(
            f"request {request.request_id!r}: beam_width={width} exceeds the {most} beams that "
            "a step computes: lower it, or raise max_num_seqs and max_num_batched_tokens"
        )
    if config.reservation == "max" and growth.max_sequences > 1:
        raise ValueError(
            f"request {request.request_id!r}: samples and beams need shared pages, which "
            "reservation='max' does not have; use n=1 or reservation='paged'"
        )
    # The last token is returned, never attended to: it needs no cell.
    needed = _pages_alone(config, table, seq.num_prompt_tokens, seq.max_total_tokens - 1, width)
    usable = table.pool.num_usable_pages
    if needed > usable:
        more = seq.max_total_tokens - seq.num_prompt_tokens
        each = f" for each of {width} beams" if width > 1 else ""
        tokens = f"{seq.num_prompt_tokens} prompt tokens and up to {more} more{each}"
        advice = "lower max_tokens"
        if is_score:
            tokens, advice = f"the {num_given} tokens of prompt and completion", "shorten them"
        raise RequestTooLongError(
            f"request {request.request_id!r}: {tokens} need {needed} pages of {table.page_size} "
            f"tokens, but the pool has {usable}; {advice} or raise num_pages"
        )


def max_tokens_in(
    config: SchedulerConfig, table: PageTable, num_prompt_tokens: int, width: int = 1
) -> int:
    """Tokens, prompt and generated ones, of a sequence or `width` beams alone in the pool.

    What `check_fits` takes at most, as far as pages and max_model_len go.
    """
    usable = table.pool.num_usable_pages

    def exceeds(num_tokens: int) -> bool:
        return _pages_alone(config, table, num_prompt_tokens, num_tokens, width) > usable

    # The last token needs no cell.
    return bisect.bisect_left(range(config.max_model_len), True, key=exceeds)


def _pages_alone(
    config: SchedulerConfig, table: PageTable, num_prompt_tokens: int, longest: int, width: int
) -> int:
    """Pages that a sequence of up to so many tokens, or `width` beams, holds at most."""
    size, total = table.page_size, 0
    if config.reservation == "max":
        return -(-config.max_model_len // size) * table.num_groups
    for kind in table.kinds:
        # Beams share the full pages of the prompt at least, until these are below a window.
        pages = -(-longest // size)
        shared = min(num_prompt_tokens // size, pages) if width > 1 else 0
        together = shared + width * (pages - shared)
        apart = width * most_pages(kind, size, longest, config.max_num_batched_tokens)
        total += kind.num_groups * min(together, apart)
    return total


def peak_pages(lengths: Iterable[tuple[int, int]], page_size: int, most_idle: int = 0) -> int:
    """Pages that sequences hold at most, together, until all have ended.

    Args:
      lengths: of each the tokens that it has and those at its end. Each grows by one a step, and
        holds nothing once it has ended.
      page_size: tokens a page holds.
      most_idle: steps in which one may not grow, whichever these are, while others do.
    """
    most = held = 0
    by_end = sorted(lengths, key=lambda own: own[0] - own[1])
    for count, (now, end) in enumerate(by_end, 1):
        # Before this one ends, those are there that have as many to go or more.
        held += now
        most = max(most, held + count * (end - now + most_idle + page_size - 1))
    return most // page_size


def _last_usable(seq: Sequence) -> int:
    """How many tokens of a sequence may be found, not computed."""
    usable = seq.num_known_tokens - 1
    if (scored := seq.request.scored) is not None:
        usable = min(usable, scored.next_position)  # which must be computed, to be scored
    return usable


class Admission:
    """Starts the sequences that wait, oldest first: gives them places, and pages to begin with."""

    def __init__(
        self,
        config: SchedulerConfig,
        table: PageTable,
        cache: PrefixCache,
        space: SwapSpace,
        queues: Queues,
        prompts: PromptCache | None = None,
    ):
        """Remembers where sequences wait and run, and where there are pages for them."""
        self._config = config
        self._table = table
        self._cache = cache
        self._space = space
        self._queues = queues
        self._prompts = prompts
        # For whose order, beside whom, and with what to compute later there was no room to the end.
        self._no_room: tuple[tuple[int, ...], int, int] | None = None

    def start(self, step: StepBuilder, budget: int) -> list[Sequence]:
        """Has the first waiting sequence run, with all that were swapped to host memory with it.

        Args:
          step: learns what is swapped in, and what the prefix cache had.
          budget: tokens that the step can still compute.

        Returns:
          The sequences, which hold pages now; none if they must wait.
        """
        swapped = self._queues.waiting[0].swapped
        return self._admit(step, budget) if swapped is None else self._swap_in(step, swapped)

    def _admit(self, step: StepBuilder, budget: int) -> list[Sequence]:
        """Gives the first waiting sequence a place, and the pages of its prefix that are known.

        Returns:
          The sequence, for which there are pages; none if it must wait.
        """
        config, table, seq = self._config, self._table, self._queues.waiting[0]
        if not self._have_places(seq.request, 1):
            return []
        pool, size, total = table.pool, table.page_size, seq.num_known_tokens
        pages: list[list[int]] = [[] for _ in table.kinds]
        held = 0
        if config.reservation == "max":
            needed = -(-config.max_model_len // size) * table.num_groups
        else:
            spare = self._spare_pages(seq)
            root, free = seq.request.cache_root, pool.num_free_pages - spare
            if root is not None:
                # What was computed beside known pages has them only once it is written, and those
                # that wait for this one are not planned again before it starts.
                together = seq.request.growth.num_rows > 1
                for other in seq.request.sequences if together else ():
                    if other.table_id is not None and not step.has_row(other):
                        self._cache.address_pages(table, other, other.num_computed_tokens)
                found = self._cache.match(root, seq.token_ids[:], size)
                # At least one token is computed, for what comes after it. If it is in a page that
                # is known, that page is copied, unless it is written only now, or there is no
                # other.
                held = found.usable_tokens(_last_usable(seq))
                pages = found.pages(held)
                if held % size:
                    last = [own[-1] for own in pages]
                    waits = seq.request.growth.waits_for_host  # and the copy with it
                    needed = self._pages_needed(total, held, pages)
                    if waits or needed > free or not step.addressed.isdisjoint(last):
                        held = found.usable_tokens(held // size * size)
                        pages = found.pages(held)
            needed = self._pages_needed(total, held, pages)
            if needed + spare > pool.num_free_pages:
                if not self.has_room_to_the_end(seq, needed, total - held - budget):
                    return []
        if needed > pool.num_free_pages:
            return []
        if self._prompts is not None:
            most = _last_usable(seq)
            more = self._prompts.extend(self._cache, pool, seq, held, most, pool.num_free_pages)
            if more is not None:
                # Whoever starts further behind needs no more pages than before, and has room.
                step.num_disk_tokens += more[0] - held
                held, pages, loads = more
                step.loads += loads
        self._queues.waiting.popleft()
        seq.table_id = table.add_shared(pages, held)
        seq.num_computed_tokens = held
        seq.num_addressed_pages = held // size
        if config.reservation == "max":
            table.reserve(seq.table_id, config.max_model_len)
        self._queues.start([seq])
        step.num_lookup_tokens += total
        step.num_hit_tokens += held
        step.num_recomputed_tokens += max(seq.num_lost_tokens - held, 0)
        seq.num_lost_tokens = 0
        return [seq]

    def _swap_in(self, step: StepBuilder, swapped: SwappedGroup) -> list[Sequence]:
        """Gives the first waiting sequence, and all that were swapped with it, their pages back.

        Returns:
          The sequences; none if they must wait.
        """
        first = self._queues.waiting[0]
        group = list(itertools.takewhile(swapped.held.__contains__, self._queues.waiting))
        if not self._have_places(first.request, len(group)):
            return []
        needed = swapped.num_pages + self._spare_pages(first)
        if self._queues.running:
            # To go on with: pages for all tokens, and a copy for each.
            size = self._table.page_size
            pages = sum(
                -(-seq.num_tokens // size) - len(swapped.held[seq][0][0]) + 1 for seq in group
            )
            needed += pages * self._table.num_groups
        if needed > self._table.pool.num_free_pages:
            return []
        if self._table.pool.has_free(src for src, _ in step.copies):
            # Copies come after what is swapped in, which must not take a page that they read.
            return []
        table_ids, copies = self._space.swap_in(self._table, swapped)
        step.swap_ins += copies
        for seq in group:
            self._queues.waiting.popleft()
            seq.table_id, seq.swapped = table_ids[seq], None
            # Its pages have other numbers now than the cache knows.
            seq.num_addressed_pages = 0
        self._queues.start(group)
        return group

    def _pages_needed(self, total: int, held: int, pages: SequenceOf[SequenceOf[int]]) -> int:
        """Free pages that a sequence takes which starts behind what is held.

        Args:
          total: tokens that it has; of all of them, though the first chunk may take fewer.
          held: of them, those that pages are known for.
          pages: of each kind the bundles of these.
        """
        table, pool, needed = self._table, self._table.pool, 0
        chunk = self._config.max_num_batched_tokens
        for kind, own in zip(table.kinds, pages, strict=True):
            first = kind.first_seen(held) // table.page_size
            in_use = sum(pool.refcount(page) > 0 for page in own[first : held // table.page_size])
            count = -(-total // table.page_size) - first - in_use
            # What is below a window is given back on the way.
            count = min(count, most_pages(kind, table.page_size, total, chunk))
            # Cached ones are free now; the last one of a partial page is copied.
            if held % table.page_size:
                count += pool.refcount(own[-1]) == 0
            needed += kind.num_groups * count
        return needed

    def _have_places(self, request: Request, count: int) -> bool:
        return self._queues.num_free_places() >= self._queues.places_needed(request, count)

    def has_room_to_the_end(self, seq: Sequence, needed: int, later: int) -> bool:
        """Whether a sequence can start without pages to spare, as those that run leave them free.

        That is so where all have pages up to their `max_tokens`, as far as that is plain: not with
        windows, samples and beams that are still to come, or tokens to score. Its prompt takes the
        `needed` pages, and steps to come compute the `later` last tokens of it. Of those that run
        no prompt is left to compute where a step has tokens for another one.
        """
        table, queues = self._table, self._queues
        state = seq.order, queues.num_changes, max(later, 0)
        if needed > table.pool.num_free_pages or self._no_room == state:
            return False
        seqs, is_plain = [*queues.running, seq], seq.request.scored is None
        is_plain &= all(kind.window is None for kind in table.kinds)
        if is_plain and all(each.request.is_single for each in seqs):
            # While it computes what this step does not, beside a token of each that runs, it does
            # not grow as they do, nor they as it does where it comes before them.
            rest = max(1, self._config.max_num_batched_tokens - len(queues.running))
            most_idle = -(-state[-1] // rest)
            # The newest token of those that run has no cell yet, and the last one needs none.
            lengths = (
                (s.num_tokens - (s.num_inflight_tokens > 0), s.max_total_tokens - 1) for s in seqs
            )
            peak = peak_pages(lengths, table.page_size, most_idle) * table.num_groups
            if peak <= table.pool.num_usable_pages:
                return True
        self._no_room = state
        return False

    def _spare_pages(self, seq: Sequence) -> int:
        """Pages to leave free: two for each that runs to grow into, as far as the pool can spare.

        So that what is admitted is not preempted soon (measured: docs/decisions.md).
        """
        others = len(self._queues.running)
        if seq.request.growth.num_rows > 1:
            # They wait for each other: they must not wait for room beside each other.
            others = sum(other.request is not seq.request for other in self._queues.running)
        return min(2 * others * self._table.num_groups, self._table.pool.num_usable_pages // 16)
