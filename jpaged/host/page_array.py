# SPDX-License-Identifier: Apache-2.0
"""Page ids in one array, so that a step's snapshot is one indexing operation."""

from collections.abc import Sequence

import numpy as np

from jpaged.host.page_pool import NULL_PAGE


class PageArray:
    """A line of pages a sequence, for each group of layers; grows as lines are wanted.

    Invariants:
      - Where nothing was put, and on lines that are free, there is `NULL_PAGE`.
      - What was put on a line is before its entry of `_ends`.
    """

    def __init__(self, num_groups: int, pages_per_seq: int):
        self._array = np.full((num_groups, 8, pages_per_seq), NULL_PAGE, np.int32)
        self._free = list(range(7, -1, -1))
        self._ends = [0] * 8

    def add(self) -> int:
        """Takes a free line. Returns: its number."""
        if not self._free:
            lines = self._array.shape[1]
            more = np.full_like(self._array, NULL_PAGE)
            self._array = np.concatenate([self._array, more], axis=1)
            self._free = list(range(2 * lines - 1, lines - 1, -1))
            self._ends += [0] * lines
        return self._free.pop()

    def free(self, line: int, count: int) -> None:
        """Gives a line back, of which the first `count` places were put."""
        self._array[:, line, :count] = NULL_PAGE
        self._ends[line] = 0
        self._free.append(line)

    def put(self, groups: slice, line: int, start: int, pages: Sequence[Sequence[int]]) -> None:
        """Puts pages in places from `start` on: of each group, those of all places."""
        if pages:
            end = start + len(pages[0])
            self._array[groups, line, start:end] = pages
            self._ends[line] = max(self._ends[line], end)

    def clear(self, groups: slice, line: int, start: int, end: int) -> None:
        """Takes pages away."""
        self._array[groups, line, start:end] = NULL_PAGE

    def pages(self, group: int, line: int, count: int) -> tuple[int, ...]:
        """The first `count` places of a line."""
        return tuple(self._array[group, line, :count].tolist())

    def snapshot(self, lines: Sequence[int], num_rows: int) -> np.ndarray:
        """Copies lines; see `PageTable.snapshot`."""
        num_groups, _, pages_per_seq = self._array.shape
        # NULL_PAGE everywhere, in memory that is not touched yet: of a long context, and of many
        # groups, nearly all is padding.
        table = np.zeros((num_groups, num_rows, pages_per_seq), np.int32)
        end = max(map(self._ends.__getitem__, lines), default=0)
        table[:, : len(lines), :end] = self._array[:, lines, :end]
        table = table[0] if num_groups == 1 else table
        table.flags.writeable = False
        return table

    def check_invariants(self, counts: dict[int, int]) -> None:
        """Raises AssertionError if lines are lost, or hold what they should not; for tests.

        Args:
          counts: of the lines that are taken, how many places were put.
        """
        for line, count in counts.items():
            end = self._ends[line]
            assert end <= count and (self._array[:, line, end:] == NULL_PAGE).all()
        assert (self._array[:, self._free] == NULL_PAGE).all()
        lines = sorted([*self._free, *counts])
        assert lines == list(range(self._array.shape[1])), "a line is lost or held twice"
