# SPDX-License-Identifier: Apache-2.0
"""How much of a known prefix a sequence can start with."""

import bisect
from collections.abc import Sequence

from jpaged.host.groups import GroupKind
from jpaged.host.page_pool import NULL_PAGE


class Prefix:
    """Pages that the prefix cache has of a sequence's first tokens.

    A sequence that starts behind some of them needs every page of layers that see everything, and
    of layers that see a window those that it sees from there on; others may be gone.
    """

    def __init__(self, kinds: Sequence[GroupKind], page_size: int, found: Sequence[Sequence[int]]):
        """Looks at what was found.

        Args:
          kinds: of groups.
          page_size: tokens a page holds.
          found: of each logical page from the first on, and of it of each kind, the bundle, or
            `NULL_PAGE`.
        """
        self._kinds = kinds
        self._page_size = page_size
        self._pages = list(map(list, zip(*found, strict=True))) or [[] for _ in kinds]
        # Of each kind, which pages are missing.
        self._missing = [
            [index for index, page in enumerate(pages) if page == NULL_PAGE]
            for pages in self._pages
        ]

    def usable_tokens(self, limit: int) -> int:
        """The most tokens, up to a limit, that a sequence can start with.

        The end of a page is tried, or the limit, in which case the last page is used in part.
        """
        size = self._page_size
        end = min(len(self._pages[0]) * size, limit)
        while end > 0:
            gaps = [self._gap(kind, end) for kind in range(len(self._kinds))]
            if max(gaps) < 0:
                return end
            # Every end between the gap and this one sees the gap.
            end = min(gap for gap in gaps if gap >= 0) * size
        return 0

    def pages(self, num_tokens: int) -> list[list[int]]:
        """Of each kind the bundles that hold what such a sequence has, `NULL_PAGE` before."""
        end = -(-num_tokens // self._page_size)
        found: list[list[int]] = []
        for kind, pages in zip(self._kinds, self._pages, strict=True):
            first = kind.first_seen(num_tokens) // self._page_size
            found.append([NULL_PAGE] * min(first, end) + pages[first:end])
        return found

    def _gap(self, kind: int, end: int) -> int:
        """A missing page that a sequence which starts at `end` sees; -1 if there is none.

        Of layers that see everything the first one, of those that see a window the last.
        """
        window, missing = self._kinds[kind], self._missing[kind]
        at = bisect.bisect_left(missing, -(-end // self._page_size)) - 1
        if at < 0 or missing[at] < window.first_seen(end) // self._page_size:
            return -1
        return missing[0] if window.window is None else missing[at]
