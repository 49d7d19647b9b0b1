# SPDX-License-Identifier: Apache-2.0
"""The host's map from each sequence's logical pages to physical ones."""

import itertools
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import numpy as np

from jpaged.host.cells import CellCounts
from jpaged.host.groups import ONE_GROUP, GroupKind, num_groups
from jpaged.host.page_array import PageArray
from jpaged.host.page_pool import NULL_PAGE, PagePool


class PageTable:
    """Which pages hold which tokens of which sequence.

    A sequence is known by the small integer that `add` or `fork` returned. Forks share every page,
    the partial last one too; the first owner to append to a shared partial page gets a copy of its
    own, and the last owner writes in place (copy-on-write), unless the pool keeps the page for its
    content. Groups of layers have pages of their own (see `jpaged.host.groups`): a sequence has a
    bundle of the pool for each logical page and kind, but for those that `release_before` gave back
    as they are below a window.

    Invariants:
      - The references that the pool counts are exactly the entries of this table.
      - Only the last page that holds tokens of a sequence can be partial; a page is not written
        where a token of another sequence, or of its kept content, is.
      - Of each kind, a sequence has equally many logical pages, of which the first are released.
    """

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        pages_per_seq: int,
        kinds: SequenceOf[GroupKind] = ONE_GROUP,
    ):
        """Makes an empty table.

        Args:
          pool: where pages come from; this table is its only client.
          page_size: tokens a page holds.
          pages_per_seq: most logical pages that a sequence may have.
          kinds: the groups that have pages, those of one kind side by side.
        """
        if page_size < 1 or pages_per_seq < 1:
            raise ValueError(
                f"page_size={page_size} and pages_per_seq={pages_per_seq} must be at least 1"
            )
        self.pool = pool
        self.page_size = page_size
        self.pages_per_seq = pages_per_seq
        self.kinds = tuple(kinds)
        self.num_groups = num_groups(kinds)
        # Of each kind, which groups it has, and how many.
        ends = list(itertools.accumulate(kind.num_groups for kind in kinds))
        self._rows = [slice(end - k.num_groups, end) for k, end in zip(kinds, ends, strict=True)]
        self._widths = [kind.num_groups for kind in kinds]
        # Of each kind the bundles, NULL_PAGE where one was released; and how many were.
        self._pages: dict[int, tuple[list[int], ...]] = {}
        self._released: dict[int, list[int]] = {}
        self._num_tokens: dict[int, int] = {}
        self.cells = CellCounts(pool, page_size, self.kinds)
        # A sequence keeps its line of it from `add` to `free`.
        self._array = PageArray(self.num_groups, pages_per_seq)

    @property
    def num_live_cells(self) -> int:
        """Cells of used pages that hold a token that is needed, a shared cell counted once.

        Below a window tokens are not needed. Of a page that several sequences use, all are counted.
        """
        return self.cells.num_live

    @property
    def num_saved_cells(self) -> int:
        """Cells that sharing saves: tokens that sequences hold, less cells that hold one."""
        total = 0
        for seq, own in self._pages.items():
            for pages, first, width in zip(own, self._released[seq], self._widths, strict=True):
                if first < len(pages):
                    held = self._num_tokens[seq] - first * self.page_size
                    total += width * max(held - self.cells.unneeded[pages[first]], 0)
        return max(total - self.cells.num_live, 0)

    @property
    def num_allocated_cells(self) -> int:
        """Cells of used pages."""
        return self.pool.num_used_pages * self.page_size

    def seqs(self) -> list[int]:
        """The sequences that are known."""
        return list(self._pages)

    def num_tokens(self, seq: int) -> int:
        """Tokens that `seq` has, those that were released included."""
        return self._num_tokens[seq]

    def pages(self, seq: int, group: int = 0) -> tuple[int, ...]:
        """Physical pages of `seq`, in order of position; `NULL_PAGE` where one was released."""
        return self._array.pages(group, seq, len(self._pages[seq][0]))

    def bundles(self, seq: int) -> tuple[list[int], ...]:
        """Of each kind the bundles of `seq`, as `pages`; not to be changed."""
        return self._pages[seq]

    def add(self) -> int:
        """Returns a new sequence without tokens."""
        seq = self._array.add()
        self._pages[seq] = tuple([] for _ in self.kinds)
        self._released[seq] = [0] * len(self.kinds)
        self._num_tokens[seq] = 0
        return seq

    def fork(self, parent: int, num_tokens: int | None = None) -> int:
        """Returns a new sequence with the tokens of `parent`, sharing their pages; copies none.

        Pages that `parent` has reserved beyond its tokens stay its own.

        Args:
          parent: what to fork.
          num_tokens: how many of its tokens the new sequence has; None for all.

        Raises:
          ValueError: if it has fewer, or has released what a token after them sees.
        """
        held = self._num_tokens[parent]
        if num_tokens is not None:
            if not 0 <= num_tokens <= held:
                raise ValueError(f"{num_tokens} tokens of a sequence that has {held}")
            held = num_tokens
        for kind, first in zip(self.kinds, self._released[parent], strict=True):
            if kind.first_seen(held) < first * self.page_size:
                raise ValueError(
                    f"{num_tokens} tokens of a sequence that has released {first} pages of "
                    f"{self.page_size}, of which a window of {kind.window} sees some"
                )
        end = -(-held // self.page_size)
        return self.add_shared([pages[:end] for pages in self._pages[parent]], held)

    def add_shared(self, pages: SequenceOf[SequenceOf[int]], num_tokens: int) -> int:
        """Returns a new sequence whose first tokens are in pages that are in use, or cached.

        Args:
          pages: of each kind as many bundles as hold the tokens, the first of which may be
            `NULL_PAGE`; cached ones are full.
          num_tokens: how many; all pages but the last are full.
        """
        firsts = [next((i for i, page in enumerate(own) if page), len(own)) for own in pages]
        for kind, (own, first) in enumerate(zip(pages, firsts, strict=True)):
            self.cells.share(own[first:], kind)
            self.pool.share(own[first:])
        child = self.add()
        for kind, (own, first) in enumerate(zip(pages, firsts, strict=True)):
            self._pages[child][kind].extend(own)
            self._released[child][kind] = first
            self._map(child, kind, first)
        self._num_tokens[child] = num_tokens
        return child

    def pages_needed(self, seq: int, num_tokens: int) -> int:
        """Free pages that `append(seq, num_tokens)` would take, a copy-on-write page included."""
        needed = self._new_pages(seq, num_tokens) * self.num_groups
        if num_tokens > 0:
            needed += sum(self._widths[kind] for kind in self._copies_due(seq))
        return needed

    def pages_needed_together(self, appends: Iterable[tuple[int, int]]) -> int:
        """Free pages that `append(seq, num_tokens)` would take, one after the other.

        Less than the sum of `pages_needed` where all owners of a partial page append: the last one
        keeps it.
        """
        total = 0
        copies: Counter[tuple[int, int]] = Counter()
        for seq, num_tokens in appends:
            total += self._new_pages(seq, num_tokens) * self.num_groups
            if num_tokens > 0:
                index = self._num_tokens[seq] // self.page_size
                for kind in self._copies_due(seq):
                    copies[kind, self._pages[seq][kind][index]] += 1
        for (kind, page), count in copies.items():
            own = count == self.pool.refcount(page) and not self.pool.is_kept(page)
            total += (count - own) * self._widths[kind]
        return total

    def append(self, seq: int, num_tokens: int) -> list[tuple[int, int]]:
        """Makes room for `num_tokens` more tokens.

        Args:
          seq: the sequence to grow.
          num_tokens: how many tokens it is about to write.

        Returns:
          `(src, dst)` pages that must be copied on the device before those tokens are written: a
          pair for each group in which the sequence's partial last page is shared, mostly none.

        Raises:
          OutOfPagesError: if the pool lacks the pages; then nothing has changed.
          ValueError: if the sequence would exceed `pages_per_seq`, or `num_tokens` is negative.
        """
        held, own = self._num_tokens[seq], self._pages[seq]
        filled = held % self.page_size
        if num_tokens == 1 and filled:
            index, is_exclusive = held // self.page_size, self.pool.is_exclusive
            for pages in own:
                if not is_exclusive(pages[index]):
                    break
            else:
                # Most appends, as short as can be: one more token in pages of its own.
                counts, live = self.cells.filled, self.cells.live
                for kind, pages in enumerate(own):
                    live[kind] += filled + 1 - counts[pages[index]]
                    counts[pages[index]] = filled + 1
                self._num_tokens[seq] = held + 1
                return []
        if num_tokens < 0:
            raise ValueError(f"num_tokens={num_tokens} must be at least 0")
        copies_due = self._copies_due(seq) if num_tokens else []
        copies: list[tuple[int, int]] = []
        needed, total = self._new_pages(seq, num_tokens), held + num_tokens
        if needed or copies_due:
            if len(own[0]) + needed > self.pages_per_seq:
                raise ValueError(
                    f"{total} tokens need {len(own[0]) + needed} pages of {self.page_size}, more "
                    f"than the {self.pages_per_seq} of a sequence"
                )
            self.pool.check_free(self.pages_needed(seq, num_tokens))
            for kind, width in enumerate(self._widths):
                new = self.pool.allocate(needed + (kind in copies_due), width)
                if kind in copies_due:
                    copies += self._replace_partial_page(seq, kind, new.pop())
                self._extend(seq, kind, new)
        self._num_tokens[seq] = total
        for kind, pages in enumerate(own):
            end, left = total, num_tokens
            while left > 0:
                # The last page is filled up to the total, those before it to the end.
                index = (end - 1) // self.page_size
                cells = end - index * self.page_size
                self.cells.fill(pages[index], cells, kind)
                end -= cells
                left -= cells
        return copies

    def reserve(self, seq: int, num_tokens: int) -> None:
        """Takes pages for `num_tokens` in all now, as contiguous preallocation does.

        Raises:
          OutOfPagesError: if the pool lacks the pages; then nothing has changed.
          ValueError: if they are more than `pages_per_seq`.
        """
        if num_tokens > self.pages_per_seq * self.page_size:
            raise ValueError(
                f"{num_tokens} tokens exceed the {self.pages_per_seq} pages of {self.page_size} "
                "that a sequence may have"
            )
        needed = self._new_pages(seq, num_tokens - self._num_tokens[seq])
        self.pool.check_free(needed * self.num_groups)
        for kind, width in enumerate(self._widths):
            self._extend(seq, kind, self.pool.allocate(needed, width))

    def release_before(self, seq: int, position: int) -> None:
        """Gives back what no query from a position on sees: the whole pages below each window.

        Args:
          seq: the sequence.
          position: at most its number of tokens.
        """
        size = self.page_size
        for kind, pages in enumerate(self._pages[seq]):
            if self.kinds[kind].window is None:
                continue
            index, offset = divmod(self.kinds[kind].first_seen(position), size)
            first = self._released[seq][kind]
            if index > first:
                # The last one first, as in `free`.
                for at in range(index - 1, first - 1, -1):
                    self._release(pages[at], kind)
                    pages[at] = NULL_PAGE
                self._array.clear(self._rows[kind], seq, first, index)
                self._released[seq][kind] = index
            if index >= first and index < len(pages) and self.pool.refcount(pages[index]) == 1:
                self.cells.skip(pages[index], offset, kind)

    def free(self, seq: int) -> None:
        """Forgets `seq`; its pages return to the pool where nobody else refers to them.

        Raises:
          KeyError: if the sequence is not known, for instance because it was freed before.
        """
        own = self._pages.pop(seq)
        del self._num_tokens[seq]
        released = self._released.pop(seq)
        # The last one first: what is kept is evicted in this order.
        for index in range(len(own[0]) - 1, min(released) - 1, -1):
            for kind, pages in enumerate(own):
                if index >= released[kind]:
                    self._release(pages[index], kind)
        self._array.free(seq, len(own[0]))

    def replace(self, seq: int, kind: int, index: int, page: int) -> None:
        """Has a sequence use another bundle that holds the same tokens, and releases its own.

        Args:
          seq: the sequence.
          kind: of which groups.
          index: which of its pages, a full one.
          page: in use or cached, and full.
        """
        self.cells.share([page], kind)
        self.pool.share([page])
        self._release(self._pages[seq][kind][index], kind)
        self._pages[seq][kind][index] = page
        self._map(seq, kind, index, index + 1)

    def snapshot(self, seqs: SequenceOf[int], num_rows: int) -> np.ndarray:
        """Freezes the map for one step.

        Args:
          seqs: the step's sequences, in order of row.
          num_rows: rows wanted, at least `len(seqs)`.

        Returns:
          i32[num_groups, num_rows, pages_per_seq], without the first axis if there is one group;
          read-only, padded with `NULL_PAGE`; later changes of this table do not reach it.
        """
        return self._array.snapshot(seqs, num_rows)

    def check_invariants(self) -> None:
        """Raises AssertionError if the books do not balance. Cost: every page; for tests."""
        self.pool.check_invariants()
        references: Counter[int] = Counter()
        filled, needed = [0] * self.pool.num_pages, 0
        for seq, own in self._pages.items():
            held = self._num_tokens[seq]
            for pages, first, rows in zip(own, self._released[seq], self._rows, strict=True):
                assert len(pages) == len(own[0]) and held <= len(pages) * self.page_size
                assert not any(pages[:first]) and all(pages[first:])
                references.update(pages[first:])
                assert len(set(pages[first:])) == len(pages) - first, f"{seq} owns a page twice"
                for place, group in enumerate(range(rows.start, rows.stop)):
                    bundles = (self.pool.bundle(page)[place] if page else page for page in pages)
                    assert tuple(bundles) == self.pages(seq, group)
                for index, page in enumerate(pages[first:], first):
                    used = min(max(held - index * self.page_size, 0), self.page_size)
                    filled[page] = max(filled[page], used)
        for page in range(1, self.pool.num_pages):
            assert self.pool.refcount(page) == references[page], f"page {page}: count differs"
            # An owner that held more tokens of a page than those that are left may have gone.
            counted, unneeded = self.cells.filled[page], self.cells.unneeded[page]
            assert filled[page] <= counted <= self.page_size, f"page {page}: more is held"
            assert counted == 0 or references[page], f"page {page} is counted, but nobody's"
            assert 0 <= unneeded <= counted and (not unneeded or references[page] == 1)
            needed += (counted - unneeded) * len(self.pool.bundle(page))
        assert self.cells.num_live == needed
        self._array.check_invariants({seq: len(own[0]) for seq, own in self._pages.items()})

    def _new_pages(self, seq: int, num_tokens: int) -> int:
        """Logical pages that a sequence lacks for so many more tokens."""
        total = self._num_tokens[seq] + num_tokens
        return max(-(-total // self.page_size) - len(self._pages[seq][0]), 0)

    def _copies_due(self, seq: int) -> list[int]:
        """The kinds of which the page that the next token goes to is partial and shared."""
        index, filled = divmod(self._num_tokens[seq], self.page_size)
        if not filled:
            return []
        own = enumerate(self._pages[seq])
        return [kind for kind, pages in own if not self.pool.is_exclusive(pages[index])]

    def _replace_partial_page(self, seq: int, kind: int, dst: int) -> list[tuple[int, int]]:
        """Has a sequence write to another bundle. Returns: which pages to copy to which."""
        index, filled = divmod(self._num_tokens[seq], self.page_size)
        pages = self._pages[seq][kind]
        src, pages[index] = pages[index], dst
        copies = list(zip(self.pool.bundle(src), self.pool.bundle(dst), strict=True))
        self._release(src, kind)
        self._map(seq, kind, index, index + 1)
        self.cells.fill(dst, filled, kind)
        return copies

    def _extend(self, seq: int, kind: int, new: list[int]) -> None:
        pages = self._pages[seq][kind]
        pages += new
        self._map(seq, kind, len(pages) - len(new))

    def _map(self, seq: int, kind: int, start: int, end: int | None = None) -> None:
        """Puts the pages of some of a sequence's bundles into the array."""
        pages = [self._pages[seq][kind][start:end]]
        if self._widths[kind] > 1:
            pages = list(zip(*map(self.pool.bundle, pages[0]), strict=True))
        self._array.put(self._rows[kind], seq, start, pages)

    def _release(self, page: int, kind: int) -> None:
        if self.pool.release(page):
            self.cells.clear(page, kind)
