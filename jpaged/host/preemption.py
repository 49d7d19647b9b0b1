# SPDX-License-Identifier: Apache-2.0
"""How sequences lose their pages: swapped to host memory, or to be computed again."""

import dataclasses
import itertools
from collections.abc import Sequence as SequenceOf

from jpaged.host.page_pool import NULL_PAGE
from jpaged.host.page_table import PageTable
from jpaged.host.sequence import Sequence
from jpaged.host.swap import SwapSpace


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
    victims: SequenceOf[Sequence],
) -> Preemption:
    """Chooses the cheaper way, or the one that is asked for if there is room.

    Args:
      preemption: "swap", "recompute" or "auto"; see `admission.SchedulerConfig`.
      costs: what "auto" compares.
      table: where the victims have pages.
      space: where they would be swapped to.
      victims: running sequences of one request.
    """
    own = [table.bundles(v.table_id) for v in victims if v.table_id is not None]
    distinct = [{page for page in kind if page != NULL_PAGE} for kind in _joined(own)]
    num_pages = sum(len(table.pool.bundle(page)) for pages in distinct for page in pages)
    num_tokens = sum(v.num_computed_tokens for v in victims)
    if table.kinds[0].window is None:
        # What they share is found in the prefix cache by all but the first.
        most = max(v.num_computed_tokens for v in victims)
        num_tokens = max(most, min(num_tokens, len(distinct[0]) * table.page_size))
    swap_s = num_pages * costs.swap_s_per_page
    recompute_s = num_tokens * costs.recompute_s_per_token
    wanted = preemption == "swap" or (preemption == "auto" and swap_s < recompute_s)
    fits = num_pages <= space.num_free_pages
    room = space.num_free_pages if wanted and not fits else None
    return Preemption(wanted and fits, num_pages, num_tokens, swap_s, recompute_s, room)


def _joined(own: SequenceOf[SequenceOf[list[int]]]) -> list[list[int]]:
    """Of each kind the bundles of all sequences."""
    return [list(itertools.chain(*pages)) for pages in zip(*own, strict=True)]


def take_pages(
    preemption: str,
    costs: PreemptionCosts,
    table: PageTable,
    space: SwapSpace,
    victims: SequenceOf[Sequence],
) -> tuple[Preemption, list[tuple[int, int]]]:
    """Takes the pages of sequences as `choose_preemption` says; the arguments are as there.

    Returns:
      What was chosen, and `(page, host_page)` to copy before the pages are written again.
    """
    choice = choose_preemption(preemption, costs, table, space, victims)
    table_ids = {v: v.table_id for v in victims if v.table_id is not None}
    group, copies = None, []
    if choice.swap:
        group, copies = space.swap_out(table, table_ids)
    for victim, table_id in table_ids.items():
        victim.table_id, victim.swapped = None, group
        if group is None:
            table.free(table_id)
            victim.num_lost_tokens = victim.num_computed_tokens
            victim.num_computed_tokens = victim.num_addressed_pages = 0
    return choice, copies
