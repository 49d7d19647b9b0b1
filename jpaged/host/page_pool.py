# SPDX-License-Identifier: Apache-2.0
"""The host's allocator of pages: free list, reference counts, pages kept for their content."""

from collections.abc import Callable, Iterable

# Reserved page that pads page tables on the device: never handed out, always safe to read and to
# write.
NULL_PAGE = 0


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free.

    The scheduler asks `num_free_pages` first and preempts instead, so a run never sees this.
    """


class PagePool:
    """Hands out page ids and counts who refers to them.

    Pages are taken one by one, or as bundles: pages that hold the same tokens for several groups of
    layers (see `jpaged.host.groups`), and live and die together. A bundle goes by its first page,
    and so do its references; a page by itself is a bundle of one.

    A page whose content somebody may ask for again (`keep`) stays as it is when its last reference
    goes: it is cached then, counts as free, and is evicted when there is nothing else to hand out,
    the one released first before the others.

    Invariants:
      - Every page but `NULL_PAGE` is either free, or used: in a bundle of count >= 1. A free one is
        on the free list, or in a cached bundle, which is to be kept.
      - A page becomes free exactly when the count of its bundle falls to 0.
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
        # Called with each bundle that is evicted.
        self.on_evict: Callable[[int], None] = lambda page: None
        self._refcounts = [0] * num_pages
        # A stack: the page freed last is the likeliest to be in a cache still.
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        # Of bundles of several pages, by the first.
        self._bundles: dict[int, tuple[int, ...]] = {}
        self._keep: set[int] = set()
        # In order of release, oldest first; a dict, as it forgets any page at once.
        self._cached: dict[int, None] = {}
        self._num_cached = 0
        self._num_shared = 0
        self._num_references = 0

    @property
    def num_usable_pages(self) -> int:
        """Pages that can be handed out."""
        return self.num_pages - 1

    @property
    def num_free_pages(self) -> int:
        """Pages that nobody refers to, cached ones included."""
        return len(self._free) + self._num_cached

    @property
    def num_cached_pages(self) -> int:
        """Of the free pages, those whose content is kept until they are needed."""
        return self._num_cached

    @property
    def num_used_pages(self) -> int:
        """Pages that somebody refers to, each counted once."""
        return self.num_usable_pages - self.num_free_pages

    @property
    def num_shared_pages(self) -> int:
        """Pages with more than one reference."""
        return self._num_shared

    @property
    def num_references(self) -> int:
        """References to all pages; above `num_used_pages` by what sharing saves."""
        return self._num_references

    def allocate(self, count: int, width: int = 1) -> list[int]:
        """Takes free pages, cached ones only if it must.

        Args:
          count: how many bundles.
          width: pages of each.

        Returns:
          The first page of each bundle, which has one reference.

        Raises:
          OutOfPagesError: if fewer are free; then none is taken.
        """
        if count == 0:
            return []
        total = count * width
        self.check_free(total)
        while total > len(self._free):
            page = next(iter(self._cached))
            self.forget(page)
            self.on_evict(page)
        pages = self._free[-total:]
        del self._free[-total:]
        pages.reverse()
        if width > 1:
            bundles = [tuple(pages[at : at + width]) for at in range(0, total, width)]
            pages = pages[::width]
            self._bundles.update(zip(pages, bundles, strict=True))
        for page in pages:
            self._refcounts[page] = 1
        self._num_references += total
        return pages

    def check_free(self, count: int) -> None:
        """Raises OutOfPagesError if fewer pages are free."""
        if count > self.num_free_pages:
            raise OutOfPagesError(
                f"{count} pages asked for, {self.num_free_pages} of {self.num_usable_pages} free; "
                "free a sequence first or make the pool larger (num_pages)"
            )

    def has_free(self, pages: Iterable[int]) -> bool:
        """Whether one of these pages is free, whichever of its bundle it is."""
        unsure = {page for page in pages if not self._refcounts[page]}
        if not unsure:
            return False
        return not (unsure.isdisjoint(self._free) and unsure.isdisjoint(self.cached_pages()))

    def bundle(self, page: int) -> tuple[int, ...]:
        """The pages of a bundle that is in use or cached, by its first page."""
        return self._bundles.get(page) or (page,)

    def share(self, pages: Iterable[int]) -> None:
        """Adds a reference to each page; a cached one is in use again.

        Raises:
          ValueError: if a page is free and not cached, or reserved.
        """
        counts, bundles = self._refcounts, self._bundles
        for page in pages:
            width = len(bundles[page]) if page in bundles else 1
            if counts[page] == 0:
                if page not in self._cached:
                    raise ValueError(f"page {page} is not in use: it cannot be shared")
                del self._cached[page]
                self._num_cached -= width
            self._num_shared += width * (counts[page] == 1)
            counts[page] += 1
            self._num_references += width

    def release(self, page: int) -> bool:
        """Drops one reference. Returns: whether it was the last, so that the page is free now.

        Raises:
          ValueError: if the page is free already (a double free) or reserved.
        """
        count = self._refcounts[page]
        if count == 0:
            raise ValueError(f"page {page} is not in use: it was freed twice, or never handed out")
        width = len(self._bundles[page]) if page in self._bundles else 1
        self._refcounts[page] = count - 1
        self._num_references -= width
        if count == 1:
            if page in self._keep:
                self._cached[page] = None
                self._num_cached += width
            else:
                self._put_back(page)
            return True
        self._num_shared -= width * (count == 2)
        return False

    def refcount(self, page: int) -> int:
        """References to a page; 0 if it is free, or not the first of its bundle."""
        return self._refcounts[page]

    def keep(self, page: int) -> None:
        """Has a page that is in use cached when its last reference goes.

        Raises:
          ValueError: if it is free or reserved.
        """
        if self._refcounts[page] == 0:
            raise ValueError(f"page {page} is not in use: it has no content to keep")
        self._keep.add(page)

    def is_exclusive(self, page: int) -> bool:
        """Whether a page has one owner and nobody else who wants its content."""
        return self._refcounts[page] == 1 and page not in self._keep

    def is_kept(self, page: int) -> bool:
        """Whether a page's content may be asked for again, so that it must not change."""
        return page in self._keep

    def cached_pages(self) -> set[int]:
        """The pages of all cached bundles."""
        return {page for first in self._cached for page in self.bundle(first)}

    def forget(self, page: int) -> None:
        """Takes `keep` back; a cached page goes to the free list."""
        self._keep.discard(page)
        if page in self._cached:
            del self._cached[page]
            self._num_cached -= len(self.bundle(page))
            self._put_back(page)

    def check_invariants(self) -> None:
        """Raises AssertionError if the books do not balance. Cost: every page; for tests."""
        free = {*self._free, *self.cached_pages()}
        assert len(free) == self.num_free_pages, "a page is free twice"
        assert self._refcounts[NULL_PAGE] == 0 and NULL_PAGE not in free
        counted = list(self._refcounts)
        for first, pages in self._bundles.items():
            assert pages[0] == first and not any(self._refcounts[page] for page in pages[1:])
            assert first not in self._free, f"bundle {first} was freed, but not forgotten"
            for page in pages:
                counted[page] = self._refcounts[first]
        assert len({p for own in self._bundles.values() for p in own}) == sum(
            map(len, self._bundles.values())
        ), "a page is in two bundles"
        for page in range(1, self.num_pages):
            assert (counted[page] == 0) == (page in free), f"page {page} free and in use"
            assert page not in self._free or page not in self._keep, f"page {page} kept and free"
        assert self._keep.issuperset(self._cached)
        assert self._num_shared == sum(count > 1 for count in counted)
        assert self._num_references == sum(counted)

    def _put_back(self, page: int) -> None:
        """Puts the pages of a bundle on the free list."""
        pages = self._bundles.pop(page, None)
        if pages is None:
            self._free.append(page)
        else:
            self._free += reversed(pages)
