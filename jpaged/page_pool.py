# SPDX-License-Identifier: Apache-2.0
"""The host's allocator of pages: a free list and reference counts."""

from collections.abc import Iterable

# Reserved page that pads page tables on the device: never handed out, always safe to read and to
# write.
NULL_PAGE = 0


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free.

    The scheduler asks `num_free_pages` first and preempts instead, so a run never sees this.
    """


class PagePool:
    """Hands out page ids and counts who refers to them.

    Invariants:
      - Every page but `NULL_PAGE` is either free, with count 0, or used, with count >= 1.
      - A page returns to the free list exactly when its count falls to 0.
    """

    def __init__(self, num_pages: int):
        """Makes a pool of `num_pages` pages, of which `NULL_PAGE` is never handed out.

        Raises:
          ValueError: if there would be no page to hand out.
        """
        if num_pages < 2:
            raise ValueError(
                f"num_pages={num_pages} must be at least 2: page {NULL_PAGE} is kept for padding"
            )
        self.num_pages = num_pages
        self._refcounts = [0] * num_pages
        # A stack: the page freed last is the likeliest to be in a cache still.
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._num_shared = 0

    @property
    def num_usable_pages(self) -> int:
        """Pages that can be handed out."""
        return self.num_pages - 1

    @property
    def num_free_pages(self) -> int:
        """Pages that nobody refers to."""
        return len(self._free)

    @property
    def num_used_pages(self) -> int:
        """Pages that somebody refers to, each counted once."""
        return self.num_usable_pages - len(self._free)

    @property
    def num_shared_pages(self) -> int:
        """Pages with more than one reference."""
        return self._num_shared

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages, each with one reference.

        Raises:
          OutOfPagesError: if fewer are free; then none is taken.
        """
        if count > len(self._free):
            raise OutOfPagesError(
                f"{count} pages asked for, {len(self._free)} of {self.num_usable_pages} free; free "
                "a sequence first or make the pool larger (num_pages)"
            )
        if count == 0:
            return []
        pages = self._free[-count:]
        del self._free[-count:]
        pages.reverse()
        for page in pages:
            self._refcounts[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds a reference to each page.

        Raises:
          ValueError: if a page is free or reserved.
        """
        counts = self._refcounts
        for page in pages:
            if counts[page] == 0:
                raise ValueError(f"page {page} is not in use: it cannot be shared")
            self._num_shared += counts[page] == 1
            counts[page] += 1

    def release(self, page: int) -> bool:
        """Drops one reference. Returns: whether it was the last, so that the page is free now.

        Raises:
          ValueError: if the page is free already (a double free) or reserved.
        """
        count = self._refcounts[page]
        if count == 0:
            raise ValueError(f"page {page} is not in use: it was freed twice, or never handed out")
        self._refcounts[page] = count - 1
        if count == 1:
            self._free.append(page)
            return True
        self._num_shared -= count == 2
        return False

    def refcount(self, page: int) -> int:
        """References to a page; 0 if it is free."""
        return self._refcounts[page]

    def check_invariants(self) -> None:
        """Raises AssertionError if the books do not balance. Cost: every page; for tests."""
        assert self._refcounts[NULL_PAGE] == 0 and NULL_PAGE not in self._free
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        free = set(self._free)
        for page in range(1, self.num_pages):
            assert (self._refcounts[page] == 0) == (page in free), f"page {page} free and in use"
        assert self._num_shared == sum(count > 1 for count in self._refcounts)
