# SPDX-License-Identifier: Apache-2.0
"""Room in host memory for the pages of preempted sequences."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from jpaged.host.page_pool import NULL_PAGE
from jpaged.host.page_table import PageTable

# Whatever the caller knows a sequence by.
Key: TypeAlias = Any
# What a sequence had: of each kind of groups its bundles, as they were numbered on the device, and
# its number of tokens.
Held: TypeAlias = tuple[tuple[list[int], ...], int]


class SwappedGroup:
    """Sequences that were swapped together, and go on sharing when they come back.

    Attributes:
      held: what each of them had.
      host_pages: for each bundle where its pages are in host memory.
    """

    def __init__(self, held: Mapping[Key, Held], host_pages: dict[int, tuple[int, ...]]):
        self.held = dict(held)
        self.host_pages = host_pages

    @property
    def num_pages(self) -> int:
        """Pages in host memory."""
        return sum(map(len, self.host_pages.values()))


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
        self, table: PageTable, table_ids: Mapping[Key, int]
    ) -> tuple[SwappedGroup, list[tuple[int, int]]]:
        """Frees the pages of sequences.

        Args:
          table: where they have pages.
          table_ids: the sequences, with fewer pages than are free here.

        Returns:
          The sequences as a group, and `(page, host_page)` of what must be copied before the pages
          are written again.
        """
        held: dict[Key, Held] = {}
        for key, table_id in table_ids.items():
            count = table.num_tokens(table_id)
            end = -(-count // table.page_size)
            held[key] = tuple(pages[:end] for pages in table.bundles(table_id)), count
        # In order, each once.
        bundles = {page: table.pool.bundle(page) for page in _bundles(held)}
        for table_id in table_ids.values():
            table.free(table_id)
        host_pages = {
            page: tuple(self._free.pop() for _ in pages) for page, pages in bundles.items()
        }
        copies = [pair for page in bundles for pair in _pairs(bundles[page], host_pages[page])]
        return SwappedGroup(held, host_pages), copies

    def swap_in(
        self, table: PageTable, group: SwappedGroup
    ) -> tuple[dict[Key, int], list[tuple[int, int]]]:
        """Gives a group pages again.

        Args:
          table: where; its pool has as many free as the group has host pages.
          group: is not used any more.

        Returns:
          The table's numbers of the sequences, and `(host_page, page)` of what must be copied
          before the pages are read.
        """
        pool, host_pages = table.pool, group.host_pages
        pool.check_free(group.num_pages)
        now = {NULL_PAGE: NULL_PAGE}
        for width in sorted({len(pages) for pages in host_pages.values()}):
            old = [page for page, pages in host_pages.items() if len(pages) == width]
            now |= zip(old, pool.allocate(len(old), width), strict=True)
        ids: dict[Key, int] = {}
        for key, (old_pages, num_tokens) in group.held.items():
            own = [[now[page] for page in pages] for pages in old_pages]
            places = ((kind, i, page) for kind, p in enumerate(own) for i, page in enumerate(p))
            for kind, index, page in places:
                count = min(num_tokens - index * table.page_size, table.page_size)
                if page != NULL_PAGE and count > table.cells.filled[page]:
                    table.cells.fill(page, count, kind)
            ids[key] = table.add_shared(own, num_tokens)
        copies: list[tuple[int, int]] = []
        for page, held_at in host_pages.items():
            copies += _pairs(held_at, pool.bundle(now[page]))
            pool.release(now[page])  # the reference that `allocate` gave it
            self._free += held_at
        return ids, copies

    def leave(self, group: SwappedGroup, key: Key) -> None:
        """Takes a sequence out of a group, with what only it has there."""
        self.hold(group, {other: held for other, held in group.held.items() if other != key})

    def hold(self, group: SwappedGroup, held: Mapping[Key, Held]) -> None:
        """Has a group hold other sequences, on some of its pages, and frees the other pages."""
        group.held = dict(held)
        needed = _bundles(held)
        for page in [page for page in group.host_pages if page not in needed]:
            self._free += group.host_pages.pop(page)

    def check_invariants(self, groups: Iterable[SwappedGroup]) -> None:
        """Raises AssertionError if host pages are lost or held twice; for tests."""
        used = [p for group in groups for pages in group.host_pages.values() for p in pages]
        assert sorted([*used, *self._free]) == list(range(self.num_pages)), "host pages are lost"


def _bundles(held: Mapping[Key, Held]) -> dict[int, None]:
    """The bundles that sequences have, in order, each once."""
    own = (pages for kinds, _ in held.values() for pages in kinds)
    return dict.fromkeys(page for pages in own for page in pages if page != NULL_PAGE)


def _pairs(src: Iterable[int], dst: Iterable[int]) -> list[tuple[int, int]]:
    return list(zip(src, dst, strict=True))
