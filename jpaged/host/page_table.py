# SPDX-License-Identifier: Apache-2.0
"""The host's map from each sequence's logical pages to physical ones."""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import numpy as np

from jpaged.host.page_pool import NULL_PAGE, PagePool


class PageTable:
    """Which pages hold which tokens of which sequence.

    A sequence is known by the small integer that `add` or `fork` returned. Forks share every page,
    the partial last one too; the first owner to append to a shared partial page gets a copy of its
    own, and the last owner writes in place (copy-on-write), unless the pool keeps the page for its
    content.

    The map lives in one array so that a step's snapshot is one indexing operation; a sequence keeps
    its line of the array from `add` to `free`.

    Invariants:
      - The references that the pool counts are exactly the entries of this table.
      - Only the last page that holds tokens of a sequence can be partial; a page is not written
        where a token of another sequence, or of its kept content, is.
    """

    def __init__(self, pool: PagePool, page_size: int, pages_per_seq: int):
        """Makes an empty table.

        Args:
          pool: where pages come from; this table is its only client.
          page_size: tokens a page holds.
          pages_per_seq: most pages a sequence may have.
        """
        if page_size < 1 or pages_per_seq < 1:
            raise ValueError(
                f"page_size={page_size} and pages_per_seq={pages_per_seq} must be at least 1"
            )
        self.pool = pool
        self.page_size = page_size
        self.pages_per_seq = pages_per_seq
        self._pages: dict[int, list[int]] = {}
        self._num_tokens: dict[int, int] = {}
        # Per page, how many cells hold a token of any of its owners; 0 if nobody owns it.
        self._fill = [0] * pool.num_pages
        self._array = np.full((8, pages_per_seq), NULL_PAGE, np.int32)
        self._free_lines = list(range(7, -1, -1))
        self._num_live_cells = 0

    @property
    def num_seqs(self) -> int:
        """Sequences that are known."""
        return len(self._pages)

    @property
    def num_live_cells(self) -> int:
        """Cells of used pages that hold a token, a shared cell counted once."""
        return self._num_live_cells

    @property
    def num_saved_cells(self) -> int:
        """Cells that sharing saves: tokens of all sequences, less cells that hold one."""
        return max(sum(self._num_tokens.values()) - self._num_live_cells, 0)

    @property
    def num_allocated_cells(self) -> int:
        """Cells of used pages."""
        return self.pool.num_used_pages * self.page_size

    def num_tokens(self, seq: int) -> int:
        """Tokens that `seq` holds."""
        return self._num_tokens[seq]

    def pages(self, seq: int) -> tuple[int, ...]:
        """Physical pages of `seq`, in order of position."""
        return tuple(self._pages[seq])

    def fills(self) -> list[int]:
        """Per page, how many cells hold a token of any of its owners; 0 if nobody owns it."""
        return list(self._fill)

    def add(self) -> int:
        """Returns a new sequence without tokens."""
        if not self._free_lines:
            lines = len(self._array)
            self._array = np.concatenate([self._array, np.full_like(self._array, NULL_PAGE)])
            self._free_lines = list(range(2 * lines - 1, lines - 1, -1))
        seq = self._free_lines.pop()
        self._pages[seq] = []
        self._num_tokens[seq] = 0
        return seq

    def fork(self, parent: int, num_tokens: int | None = None) -> int:
        """Returns a new sequence with the tokens of `parent`, sharing their pages; copies none.

        Pages that `parent` has reserved beyond its tokens stay its own.

        Args:
          parent: what to fork.
          num_tokens: how many of its tokens the new sequence has; None for all.

        Raises:
          ValueError: if it has fewer.
        """
        held = self._num_tokens[parent]
        if num_tokens is not None:
            if not 0 <= num_tokens <= held:
                raise ValueError(f"{num_tokens} tokens of a sequence that has {held}")
            held = num_tokens
        return self.add_shared(self._pages[parent][: -(-held // self.page_size)], held)

    def add_shared(self, pages: SequenceOf[int], num_tokens: int) -> int:
        """Returns a new sequence whose first tokens are in pages that are in use, or cached.

        Args:
          pages: as many as hold the tokens; cached ones are full.
          num_tokens: how many; all pages but the last are full.
        """
        for page in pages:
            self._fill_cached(page)
        self.pool.share(pages)
        child = self.add()
        self._pages[child] = list(pages)
        self._num_tokens[child] = num_tokens
        self._array[child, : len(pages)] = pages
        return child

    def pages_needed(self, seq: int, num_tokens: int) -> int:
        """Free pages that `append(seq, num_tokens)` would take, a copy-on-write page included."""
        held, pages = self._num_tokens[seq], self._pages[seq]
        needed = -(-(held + num_tokens) // self.page_size) - len(pages)
        return max(needed, 0) + (num_tokens > 0 and self._copy_due(seq))

    def pages_needed_together(self, appends: Iterable[tuple[int, int]]) -> int:
        """Free pages that `append(seq, num_tokens)` would take, one after the other.

        Less than the sum of `pages_needed` where all owners of a partial page append: the last one
        keeps it.
        """
        total = 0
        copies: Counter[int] = Counter()
        for seq, num_tokens in appends:
            held, pages = self._num_tokens[seq], self._pages[seq]
            total += max(-(-(held + num_tokens) // self.page_size) - len(pages), 0)
            if num_tokens > 0 and self._copy_due(seq):
                copies[pages[held // self.page_size]] += 1
        for page, count in copies.items():
            own = count == self.pool.refcount(page) and not self.pool.is_kept(page)
            total += count - own
        return total

    def append(self, seq: int, num_tokens: int) -> list[tuple[int, int]]:
        """Makes room for `num_tokens` more tokens.

        Args:
          seq: the sequence to grow.
          num_tokens: how many tokens it is about to write.

        Returns:
          `(src, dst)` pages that must be copied on the device before those tokens are written: one
          pair if the sequence's partial last page is shared, else none.

        Raises:
          OutOfPagesError: if the pool lacks the pages; then nothing has changed.
          ValueError: if the sequence would exceed `pages_per_seq`, or `num_tokens` is negative.
        """
        held, pages = self._num_tokens[seq], self._pages[seq]
        filled = held % self.page_size
        if num_tokens == 1 and filled:
            page = pages[held // self.page_size]
            if self.pool.is_exclusive(page):
                # Most appends, as short as can be: one more token in a page of its own.
                self._num_live_cells += filled + 1 - self._fill[page]
                self._fill[page] = filled + 1
                self._num_tokens[seq] = held + 1
                return []
        copy_due = num_tokens > 0 and self._copy_due(seq)
        if num_tokens < 0:
            raise ValueError(f"num_tokens={num_tokens} must be at least 0")
        total = held + num_tokens
        copies: list[tuple[int, int]] = []
        if total > len(pages) * self.page_size or copy_due:
            needed = max(-(-total // self.page_size) - len(pages), 0)
            if len(pages) + needed > self.pages_per_seq:
                raise ValueError(
                    f"{total} tokens need {len(pages) + needed} pages of {self.page_size}, more "
                    f"than the {self.pages_per_seq} of a sequence"
                )
            new = self.pool.allocate(needed + copy_due)
            if copy_due:
                copies.append(self._replace_partial_page(seq, new.pop()))
            self._array[seq, len(pages) : len(pages) + needed] = new
            pages += new
        self._num_tokens[seq] = total
        fill, left = self._fill, num_tokens
        while left > 0:
            # The last page is filled up to the total, those before it to the end.
            index = (total - 1) // self.page_size
            cells = total - index * self.page_size
            page = pages[index]
            self._num_live_cells += cells - fill[page]
            fill[page] = cells
            total -= cells
            left -= cells
        return copies

    def reserve(self, seq: int, num_tokens: int) -> None:
        """Takes pages for `num_tokens` in all now, as contiguous preallocation does.

        Raises:
          OutOfPagesError: if the pool lacks the pages; then nothing has changed.
          ValueError: if they are more than `pages_per_seq`.
        """
        pages = self._pages[seq]
        if num_tokens > self.pages_per_seq * self.page_size:
            raise ValueError(
                f"{num_tokens} tokens exceed the {self.pages_per_seq} pages of {self.page_size} "
                "that a sequence may have"
            )
        new = self.pool.allocate(max(-(-num_tokens // self.page_size) - len(pages), 0))
        self._array[seq, len(pages) : len(pages) + len(new)] = new
        pages += new

    def free(self, seq: int) -> None:
        """Forgets `seq`; its pages return to the pool where nobody else refers to them.

        Raises:
          KeyError: if the sequence is not known, for instance because it was freed before.
        """
        pages = self._pages.pop(seq)
        del self._num_tokens[seq]
        # The last one first: what is kept is evicted in this order.
        for page in reversed(pages):
            self._release(page)
        self._array[seq, : len(pages)] = NULL_PAGE
        self._free_lines.append(seq)

    def replace(self, seq: int, index: int, page: int) -> None:
        """Has a sequence use another page that holds the same tokens, and releases its own.

        Args:
          seq: the sequence.
          index: which of its pages, a full one.
          page: in use or cached, and full.
        """
        self._fill_cached(page)
        self.pool.share([page])
        self._release(self._pages[seq][index])
        self._pages[seq][index] = page
        self._array[seq, index] = page

    def take(self, seqs: SequenceOf[int]) -> tuple[list[tuple[list[int], int]], list[int]]:
        """Frees sequences of which the contents are kept elsewhere.

        Returns:
          For each its pages and number of tokens, and the distinct pages that hold tokens.
        """
        size = self.page_size
        held = [
            (self._pages[s][: -(-self._num_tokens[s] // size)], self._num_tokens[s]) for s in seqs
        ]
        for seq in seqs:
            self.free(seq)
        return held, list(dict.fromkeys(page for pages, _ in held for page in pages))

    def put_back(
        self, held: SequenceOf[tuple[list[int], int]], pages: SequenceOf[int]
    ) -> tuple[list[int], list[int]]:
        """Undoes `take`, on other pages; what was shared is shared again.

        Args:
          held: as `take` returned it.
          pages: likewise.

        Returns:
          The sequences, and for each of `pages` the one that now stands for it.

        Raises:
          OutOfPagesError: if the pool lacks the pages; then nothing has changed.
        """
        new = self.pool.allocate(len(pages))
        now = dict(zip(pages, new, strict=True))
        seqs: list[int] = []
        for old, num_tokens in held:
            own = [now[page] for page in old]
            for index, page in enumerate(own):
                cells = min(num_tokens - index * self.page_size, self.page_size)
                self._num_live_cells += max(cells - self._fill[page], 0)
                self._fill[page] = max(cells, self._fill[page])
            seqs.append(self.add_shared(own, num_tokens))
        for page in new:
            self.pool.release(page)  # the reference that `allocate` gave it
        return seqs, new

    def snapshot(self, seqs: SequenceOf[int], num_rows: int) -> np.ndarray:
        """Freezes the map for one step.

        Args:
          seqs: the step's sequences, in order of row.
          num_rows: rows wanted, at least `len(seqs)`.

        Returns:
          i32[num_rows, pages_per_seq], read-only, padded with `NULL_PAGE`; later changes of this
          table do not reach it.
        """
        table = np.full((num_rows, self.pages_per_seq), NULL_PAGE, np.int32)
        np.take(self._array, seqs, axis=0, out=table[: len(seqs)], mode="clip")
        table.flags.writeable = False
        return table

    def check_invariants(self) -> None:
        """Raises AssertionError if the books do not balance. Cost: every page; for tests."""
        self.pool.check_invariants()
        references = Counter(page for pages in self._pages.values() for page in pages)
        for page in range(self.pool.num_pages):
            assert self.pool.refcount(page) == references[page], f"page {page}: count differs"
        fill = [0] * self.pool.num_pages
        for seq, pages in self._pages.items():
            held = self._num_tokens[seq]
            assert held <= len(pages) * self.page_size
            assert len(set(pages)) == len(pages), f"sequence {seq} owns a page twice"
            assert self._array[seq, : len(pages)].tolist() == pages
            assert (self._array[seq, len(pages) :] == NULL_PAGE).all()
            for index, page in enumerate(pages):
                used = min(max(held - index * self.page_size, 0), self.page_size)
                fill[page] = max(fill[page], used)
        # An owner that held more tokens of a page than those that are left may have gone.
        for page, (used, counted) in enumerate(zip(fill, self._fill, strict=True)):
            assert used <= counted <= self.page_size, f"page {page} holds more than is counted"
            assert counted == 0 or references[page], f"page {page} is counted, but nobody's"
        assert self._num_live_cells == sum(self._fill)
        lines = sorted([*self._free_lines, *self._pages])
        assert lines == list(range(len(self._array))), "a line is lost or held twice"

    def _copy_due(self, seq: int) -> bool:
        """Whether the page that the next token goes to is partial and shared."""
        held = self._num_tokens[seq]
        if held % self.page_size == 0:
            return False
        page = self._pages[seq][held // self.page_size]
        return not self.pool.is_exclusive(page)

    def _replace_partial_page(self, seq: int, dst: int) -> tuple[int, int]:
        index, filled = divmod(self._num_tokens[seq], self.page_size)
        src = self._pages[seq][index]
        self._release(src)
        self._pages[seq][index] = dst
        self._array[seq, index] = dst
        self._fill[dst] = filled
        self._num_live_cells += filled
        return src, dst

    def _release(self, page: int) -> None:
        if self.pool.release(page):
            self._num_live_cells -= self._fill[page]
            self._fill[page] = 0

    def _fill_cached(self, page: int) -> None:
        """Counts the cells of a page that comes back from being cached."""
        if not self._fill[page]:
            self._fill[page] = self.page_size
            self._num_live_cells += self.page_size
