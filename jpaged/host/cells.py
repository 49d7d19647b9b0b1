# SPDX-License-Identifier: Apache-2.0
"""How many cells of which page hold a token that somebody needs."""

from collections.abc import Sequence

from jpaged.host.groups import GroupKind
from jpaged.host.page_pool import PagePool


class CellCounts:
    """Counts, for each bundle of pages in use, the cells that hold a token of any of its owners.

    A bundle goes by its first page, as in `PagePool`; each of its pages holds the same tokens.

    Attributes:
      filled: per bundle, cells that hold a token; 0 if nobody owns it.
      unneeded: of these, how many at its beginning its only owner needs no more.
      live: of each kind of groups, cells of one group's pages that hold a token that is needed.
    """

    def __init__(self, pool: PagePool, page_size: int, kinds: Sequence[GroupKind]):
        self.filled = [0] * pool.num_pages
        self.unneeded = [0] * pool.num_pages
        self.live = [0] * len(kinds)
        self._kinds = kinds
        self._pool = pool
        self._page_size = page_size

    @property
    def num_live(self) -> int:
        """Cells of all pages in use that hold a token that is needed."""
        counts = zip(self.live, self._kinds, strict=True)
        return sum(count * kind.num_groups for count, kind in counts)

    def fill(self, page: int, count: int, kind: int) -> None:
        """Has a bundle of a kind hold so many tokens, no less than before."""
        self.live[kind] += count - self.filled[page]
        self.filled[page] = count

    def share(self, pages: Sequence[int], kind: int) -> None:
        """Counts bundles that get another owner, who may need all of them; cached ones are full."""
        filled, unneeded = self.filled, self.unneeded
        for page in pages:
            if not filled[page]:
                filled[page] = self._page_size
                self.live[kind] += self._page_size
            elif unneeded[page]:
                self.live[kind] += unneeded[page]
                unneeded[page] = 0

    def skip(self, page: int, count: int, kind: int) -> None:
        """Leaves the first cells of a bundle out, which its only owner needs no more."""
        more = min(count, self.filled[page]) - self.unneeded[page]
        if more > 0:
            self.unneeded[page] += more
            self.live[kind] -= more

    def clear(self, page: int, kind: int) -> None:
        """Counts no cell of a bundle that became free."""
        self.live[kind] -= self.filled[page] - self.unneeded[page]
        self.filled[page] = self.unneeded[page] = 0

    def of_pages(self) -> list[int]:
        """Per page, how many cells hold a token; 0 if nobody owns it."""
        counts = list(self.filled)
        for first in [page for page, count in enumerate(counts) if count]:
            for page in self._pool.bundle(first):
                counts[page] = counts[first]
        return counts
