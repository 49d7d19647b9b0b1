# SPDX-License-Identifier: Apache-2.0
"""How many cells of which page hold a token that somebody needs."""

from jpaged.host.page_pool import PagePool


class CellCounts:
    """Counts, for each bundle of pages in use, the cells that hold a token of any of its owners.

    A bundle goes by its first page, as in `PagePool`; each of its pages holds the same tokens.

    Attributes:
      filled: per bundle, cells that hold a token; 0 if nobody owns it.
      unneeded: of these, how many at its beginning its only owner needs no more.
      num_live: of all pages in use, cells that hold a token that is needed.
    """

    def __init__(self, pool: PagePool, page_size: int):
        self.filled = [0] * pool.num_pages
        self.unneeded = [0] * pool.num_pages
        self.num_live = 0
        self._pool = pool
        self._page_size = page_size

    def fill(self, page: int, count: int, width: int) -> None:
        """Has a bundle of `width` pages hold so many tokens, no less than before."""
        self.num_live += (count - self.filled[page]) * width
        self.filled[page] = count

    def share(self, page: int, width: int) -> None:
        """Counts a bundle that gets another owner, who may need all of it; a cached one is full."""
        more = self.unneeded[page]
        if not self.filled[page]:
            more = self.filled[page] = self._page_size
        self.num_live += more * width
        self.unneeded[page] = 0

    def skip(self, page: int, count: int, width: int) -> None:
        """Leaves the first cells of a bundle out, which its only owner needs no more."""
        more = min(count, self.filled[page]) - self.unneeded[page]
        if more > 0:
            self.unneeded[page] += more
            self.num_live -= more * width

    def clear(self, page: int, width: int) -> None:
        """Counts no cell of a bundle that became free."""
        self.num_live -= (self.filled[page] - self.unneeded[page]) * width
        self.filled[page] = self.unneeded[page] = 0

    def of_pages(self) -> list[int]:
        """Per page, how many cells hold a token; 0 if nobody owns it."""
        counts = list(self.filled)
        for first in [page for page, count in enumerate(counts) if count]:
            for page in self._pool.bundle(first):
                counts[page] = counts[first]
        return counts
