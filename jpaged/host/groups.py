# SPDX-License-Identifier: Apache-2.0
"""Groups of layers that have pages of their own, as far as the host needs to know them.

Layers that see everything and layers that see a window need different pages. A model's layers are
put into groups of one size, so that a page, which holds the keys and values of some tokens for the
layers of one group, serves any group (`jpaged.models.cache_groups`). Groups whose layers see
equally far need the same tokens at any time: they are of one kind, and take their pages together,
as bundles of `jpaged.host.page_pool.PagePool`.

Source: Zhang et al. 2025 (Jenga, arXiv:2503.18292), and the hybrid cache manager of vLLM.
"""

import typing
from collections.abc import Iterable


class GroupKind(typing.NamedTuple):
    """Groups whose layers see equally far.

    Attributes:
      window: a query sees itself and the `window - 1` tokens before it; with None, all before it.
      num_groups: how many.
    """

    window: int | None
    num_groups: int

    def first_seen(self, position: int) -> int:
        """The first position that queries from this one on see."""
        return 0 if self.window is None else max(position - self.window + 1, 0)


# Of a model whose layers all see everything.
ONE_GROUP = (GroupKind(None, 1),)


def num_groups(kinds: Iterable[GroupKind]) -> int:
    """Groups of all kinds: what the pages of one logical page number."""
    return sum(kind.num_groups for kind in kinds)


def most_pages(kind: GroupKind, page_size: int, num_tokens: int, chunk: int) -> int:
    """Logical pages of a kind that a sequence holds at most while it grows.

    Args:
      kind: which.
      page_size: tokens a page holds.
      num_tokens: up to how many.
      chunk: tokens that a step adds at most.
    """
    pages = -(-num_tokens // page_size)
    if kind.window is None:
        return pages
    # What the first query of a step sees before itself, and the step: wherever that begins in a
    # page.
    span = kind.window - 1 + chunk
    return min(pages, -(-(span - 1) // page_size) + 1)


def pages_of(kinds: Iterable[GroupKind], page_size: int, num_tokens: int, chunk: int) -> int:
    """Pages of all groups that a sequence holds at most while it grows; see `most_pages`."""
    return sum(kind.num_groups * most_pages(kind, page_size, num_tokens, chunk) for kind in kinds)
