# SPDX-License-Identifier: Apache-2.0
"""Room in host memory for the pages of preempted sequences."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from jpaged.host.page_table import PageTable

# Whatever the caller knows a sequence by.
Key: TypeAlias = Any


class SwappedGroup:
    """Sequences that were swapped together, and go on sharing when they come back.

    Attributes:
      held: for each its pages, as they were numbered on the device, and its number of tokens.
      host_pages: for each of these pages where it is in host memory.
    """

    def __init__(self, held: Mapping[Key, tuple[list[int], int]], host_pages: dict[int, int]):
        self.held = dict(held)
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
        held, pages = table.take(list(table_ids.values()))
        host_pages = {page: self._free.pop() for page in pages}
        group = SwappedGroup(dict(zip(table_ids, held, strict=True)), host_pages)
        return group, list(host_pages.items())

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
        ids, pages = table.put_back(list(group.held.values()), list(group.host_pages))
        copies = list(zip(group.host_pages.values(), pages, strict=True))
        self._free += group.host_pages.values()
        return dict(zip(group.held, ids, strict=True)), copies

    def leave(self, group: SwappedGroup, key: Key) -> None:
        """Takes a sequence out of a group, with what only it has there."""
        self.hold(group, {other: held for other, held in group.held.items() if other != key})

    def hold(self, group: SwappedGroup, held: Mapping[Key, tuple[list[int], int]]) -> None:
        """Has a group hold other sequences, on some of its pages, and frees the other pages."""
        group.held = dict(held)
        needed = {page for pages, _ in held.values() for page in pages}
        for page in [page for page in group.host_pages if page not in needed]:
            self._free.append(group.host_pages.pop(page))

    def check_invariants(self, groups: Iterable[SwappedGroup]) -> None:
        """Raises AssertionError if host pages are lost or held twice; for tests."""
        used = [page for group in groups for page in group.host_pages.values()]
        assert sorted([*used, *self._free]) == list(range(self.num_pages)), "host pages are lost"
