# SPDX-License-Identifier: Apache-2.0
"""Room in host memory for the pages of preempted sequences, and whether to use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from jpaged.host import sequence
from jpaged.host.page_table import PageTable


@dataclasses.dataclass(frozen=True)
class PreemptionCosts:
    """What the two ways of preemption cost.

    Attributes:
      swap_s_per_page: seconds to copy a page to host memory and back.
      recompute_s_per_token: seconds to compute a token of a prompt.
    """

    swap_s_per_page: float
    recompute_s_per_token: float


NO_COSTS = PreemptionCosts(0.0, 0.0)


class SwappedGroup:
    """Sequences that were swapped together, and go on sharing when they come back.

    Attributes:
      held: for each its pages, as they were numbered on the device, and its number of tokens.
      host_pages: for each of these pages where it is in host memory.
    """

    def __init__(
        self,
        held: dict[sequence.Sequence, tuple[list[int], int]],
        host_pages: dict[int, int],
    ):
        self.held = held
        self.host_pages = host_pages


class SwapSpace:
    """Which pages of host memory are free.

    Invariants:
      - A host page is free, or in exactly one `SwappedGroup`.
    """

    def __init__(self, num_pages: int):
        """Makes an empty space."""
        self.num_pages = num_pages
        self._free = list(range(num_pages))

    @property
    def num_free_pages(self) -> int:
        """Host pages that hold nothing."""
        return len(self._free)

    def swap_out(
        self, table: PageTable, seqs: Sequence[sequence.Sequence]
    ) -> list[tuple[int, int]]:
        """Frees the pages of sequences, which become one `SwappedGroup`.

        Args:
          table: where they have pages.
          seqs: with pages, fewer distinct ones than are free here.

        Returns:
          `(page, host_page)` of what must be copied before the pages are written again.
        """
        ids = [seq.table_id for seq in seqs if seq.table_id is not None]
        assert len(ids) == len(seqs)
        held, pages = table.take(ids)
        host_pages = {page: self._free.pop() for page in pages}
        group = SwappedGroup(dict(zip(seqs, held, strict=True)), host_pages)
        for seq in seqs:
            seq.table_id = None
            seq.swapped = group
        return list(host_pages.items())

    def swap_in(self, table: PageTable, group: SwappedGroup) -> list[tuple[int, int]]:
        """Gives a group pages again.

        Args:
          table: where; its pool has as many free as the group has host pages.
          group: is not used any more.

        Returns:
          `(host_page, page)` of what must be copied before the pages are read.
        """
        ids, pages = table.put_back(list(group.held.values()), list(group.host_pages))
        copies = list(zip(group.host_pages.values(), pages, strict=True))
        for seq, table_id in zip(group.held, ids, strict=True):
            seq.table_id = table_id
            seq.swapped = None
            # Its pages have other numbers now than the cache knows.
            seq.num_addressed_pages = 0
        self._free += group.host_pages.values()
        return copies

    def leave(self, seq: sequence.Sequence) -> None:
        """Takes a sequence out of the group that it is in, with what only it has there."""
        group, seq.swapped = seq.swapped, None
        assert group is not None
        del group.held[seq]
        self.hold(group, group.held)

    def hold(
        self, group: SwappedGroup, held: dict[sequence.Sequence, tuple[list[int], int]]
    ) -> None:
        """Has a group hold other sequences, on some of its pages, and frees the other pages."""
        group.held = held
        needed = {page for pages, _ in held.values() for page in pages}
        for page in [page for page in group.host_pages if page not in needed]:
            self._free.append(group.host_pages.pop(page))

    def check_invariants(self, groups: Iterable[SwappedGroup]) -> None:
        """Raises AssertionError if host pages are lost or held twice; for tests."""
        used = [page for group in groups for page in group.host_pages.values()]
        assert sorted([*used, *self._free]) == list(range(self.num_pages)), "host pages are lost"

    def continue_beams(
        self,
        before: Sequence[sequence.Sequence],
        after: Sequence[sequence.Sequence],
        parents: Sequence[int],
    ) -> None:
        """Has swapped beams hold what those hold that they continue; see `beam.continue_beams`."""
        group = before[0].swapped
        assert group is not None
        held = [group.held[before[parent]] for parent in parents]
        for beam in before:
            beam.swapped = None
        for beam in after:
            beam.swapped = group
        self.hold(group, dict(zip(after, held, strict=True)))


@dataclasses.dataclass(frozen=True)
class Preemption:
    """How sequences are preempted, and why so.

    Attributes:
      swap: whether their pages are copied to host memory; else their tokens are computed again.
      num_pages: distinct pages that they hold.
      num_tokens: tokens to compute again, shared ones counted once.
      swap_s: what the first way costs, both copies counted, in seconds.
      recompute_s: what the second costs.
      num_free_host_pages: room in host memory, where that is why they are not swapped.
    """

    swap: bool
    num_pages: int
    num_tokens: int
    swap_s: float
    recompute_s: float
    num_free_host_pages: int | None

    def __str__(self) -> str:
        way = "pages swapped to host memory" if self.swap else "pages to compute again"
        costs = room = ""
        if self.swap_s or self.recompute_s:
            costs = (
                f"; swapping costs {1e3 * self.swap_s:.1f} ms, computing "
                f"{1e3 * self.recompute_s:.1f} ms"
            )
        if self.num_free_host_pages is not None:
            room = f"; host memory has room for {self.num_free_host_pages} pages"
        return f"{self.num_pages} {way} ({self.num_tokens} tokens{costs}{room})"


def choose_preemption(
    preemption: str,
    costs: PreemptionCosts,
    table: PageTable,
    space: SwapSpace,
    victims: Sequence[sequence.Sequence],
) -> Preemption:
    """Chooses the cheaper way, or the one that is asked for if there is room.

    Args:
      preemption: "swap", "recompute" or "auto"; see `admission.SchedulerConfig`.
      costs: what "auto" compares.
      table: where the victims have pages.
      space: where they would be swapped to.
      victims: running sequences of one request.
    """
    pages = {page for v in victims if v.table_id is not None for page in table.pages(v.table_id)}
    # What they share is found in the prefix cache by all but the first.
    num_tokens = max(
        max(v.num_computed_tokens for v in victims),
        min(sum(v.num_computed_tokens for v in victims), len(pages) * table.page_size),
    )
    swap_s = len(pages) * costs.swap_s_per_page
    recompute_s = num_tokens * costs.recompute_s_per_token
    wanted = preemption == "swap" or (preemption == "auto" and swap_s < recompute_s)
    fits = len(pages) <= space.num_free_pages
    room = space.num_free_pages if wanted and not fits else None
    return Preemption(wanted and fits, len(pages), num_tokens, swap_s, recompute_s, room)
