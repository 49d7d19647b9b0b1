# SPDX-License-Identifier: Apache-2.0
"""Whose pages are taken when pages run out."""

import itertools
import typing
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from jpaged.host.page_pool import NULL_PAGE
from jpaged.host.page_table import PageTable
from jpaged.host.queues import Queues
from jpaged.host.sequence import Sequence


class Loss(typing.NamedTuple):
    """What a preemption of a request would free, and what it would lose.

    Attributes:
      priority: of the request; a higher one is served later.
      num_freed: pages of all groups that become free; what others share does not.
      num_lost: logical pages of tokens to compute again, at least 1: a part counts as a whole, and
        what others hold is found again.
    """

    priority: int
    num_freed: int
    num_lost: int


def choose_victim(losses: SequenceOf[Loss]) -> int:
    """Chooses the request that is preempted.

    Of those that are served last by priority, the one that frees most pages for each page of tokens
    lost; of equal ones the last, which has come last. Where all layers see everything, all are
    equal that free a page: who shares pages frees less and loses less. A fork that has none of its
    own frees nothing.

    Args:
      losses: of the requests, in the order in which they are served; at least one.

    Returns:
      Its index.
    """
    last = max(loss.priority for loss in losses)
    best = next(index for index, loss in enumerate(losses) if loss.priority == last)
    for index in range(best + 1, len(losses)):
        loss, least = losses[index], losses[best]
        # Products, not quotients: equal ones must be equal.
        if loss.num_freed * least.num_lost >= least.num_freed * loss.num_lost:
            best = index
    return best


def loss_of(table: PageTable, group: SequenceOf[Sequence]) -> Loss:
    """What preempting sequences of a request, which hold pages, would free and lose.

    Args:
      table: where they have them.
      group: the sequences.
    """
    held = [table.bundles(seq.table_id) for seq in group if seq.table_id is not None]
    size, num_freed, num_lost = table.page_size, 0, 0
    for kind, pages in enumerate(zip(*held, strict=True)):
        own = _alone(table, itertools.chain(*(_unreleased(each) for each in pages)))
        num_freed += own * table.kinds[kind].num_groups
        if table.kinds[kind].window is None:
            num_lost = own
    if all(kind.window is not None for kind in table.kinds):
        # What is below the windows is gone: nothing that others hold begins at the first token.
        num_lost = sum(-(-seq.num_computed_tokens // size) for seq in group)
    return Loss(group[0].request.params.priority, num_freed, max(num_lost, 1))


def victims_of(queues: Queues, table: PageTable, index: int) -> list[Sequence]:
    """The running sequences whose pages are taken for one that runs, or for others.

    Args:
      queues: who runs, in order.
      table: where they have pages.
      index: of the first of its request that needs pages; those before are in the step already.

    Returns:
      A request's sequences, not of the one that is first in order, which always goes on; of that
      one, where it is alone, its last sequence.
    """
    running = queues.running
    last = queues.last()
    if last[0] is running[0]:
        assert not running[0].request.growth.reserved_places, "what does not fit was admitted"
        return last[-1:]
    if all(kind.window is None for kind in table.kinds) and loss_of(table, last).num_freed:
        return last  # as it would be chosen
    groups: list[list[Sequence]] = []
    start = index or len(queues.group(0))
    while start < len(running):
        groups.append(queues.group(start))
        start += len(groups[-1])
    return groups[choose_victim([loss_of(table, group) for group in groups])]


def _unreleased(pages: list[int]) -> Iterable[int]:
    """The pages of a sequence but the first ones, which fell out of a window."""
    return itertools.dropwhile(NULL_PAGE.__eq__, pages)


def _alone(table: PageTable, pages: Iterable[int]) -> int:
    """How many distinct bundles nobody else refers to."""
    refcount = table.pool.refcount
    return sum(refcount(page) == count for page, count in Counter(pages).items())
