# SPDX-License-Identifier: Apache-2.0
"""Copy-on-write against a model that knows no pages: each sequence is a list of unique values.

Every write has a value of its own, so two sequences hold the same values at the same positions
exactly if one was forked from the other and neither has written there since. That tells which pages
must be shared, which must be copied, and how many must be in use, without counting references.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from jpaged.host.page_pool import NULL_PAGE, OutOfPagesError, PagePool
from jpaged.host.page_table import PageTable


class Device:
    """The memory behind the pages: a value for each (page, slot)."""

    def __init__(self, table):
        self.table = table
        self.cells = {}

    def copy(self, pairs):
        slots = range(self.table.page_size)
        read = [[self.cells.get((src, slot)) for slot in slots] for src, _ in pairs]
        for (_, dst), values in zip(pairs, read, strict=True):
            for slot in slots:
                self.cells[dst, slot] = values[slot]

    def write(self, seq, start, values):
        for position, value in enumerate(values, start):
            index, slot = divmod(position, self.table.page_size)
            self.cells[self.table.pages(seq)[index], slot] = value

    def read(self, seq, length):
        pages, size = self.table.pages(seq), self.table.page_size
        return [self.cells.get((pages[p // size], p % size)) for p in range(length)]


class PageTableMachine(RuleBasedStateMachine):
    seqs = Bundle("seqs")

    @initialize(
        page_size=st.integers(1, 4), num_usable_pages=st.integers(1, 14), width=st.integers(1, 6)
    )
    def make(self, page_size, num_usable_pages, width):
        self.page_size, self.width = page_size, width
        self.table = PageTable(PagePool(num_usable_pages + 1), page_size, width)
        self.pool = self.table.pool
        self.device = Device(self.table)
        self.values: dict[int, list[int]] = {}
        self.reserved: dict[int, int] = {}  # pages that the sequence has asked for ahead of tokens
        self.num_written = 0

    @precondition(lambda self: len(self.values) < 12)
    @rule(target=seqs)
    def add(self):
        seq = self.table.add()
        assert seq not in self.values
        self.values[seq], self.reserved[seq] = [], 0
        return seq

    @precondition(lambda self: len(self.values) < 12)
    @rule(target=seqs, parent=seqs)
    def fork(self, parent):
        free = self.pool.num_free_pages
        child = self.table.fork(parent)
        assert child not in self.values
        assert self.pool.num_free_pages == free, "a fork takes no page"
        self.values[child], self.reserved[child] = list(self.values[parent]), 0
        return child

    # A small count twice: pages that stay partial are what copy-on-write is about.
    @rule(seq=seqs, count=st.integers(0, 3) | st.integers(0, 3) | st.integers(0, 20))
    def append(self, seq, count):
        held = self.values[seq]
        total_pages = -(-(len(held) + count) // self.page_size)
        new_pages = max(total_pages - self.num_pages(seq), 0)
        shared_by = self.sharers(seq) if count and len(held) % self.page_size else 0
        needed = new_pages + (shared_by > 1)
        free = self.pool.num_free_pages
        assert self.table.pages_needed(seq, count) == needed
        refusals = []
        if total_pages > self.width:
            refusals.append(ValueError)
        if needed > free:
            refusals.append(OutOfPagesError)
        if refusals:
            before = self.observe()
            with pytest.raises(tuple(refusals)):
                self.table.append(seq, count)
            assert self.observe() == before
            return
        old_pages = self.table.pages(seq)
        copies = self.table.append(seq, count)
        assert free - self.pool.num_free_pages == needed
        if shared_by > 1:
            last = len(held) // self.page_size
            assert copies == [(old_pages[last], self.table.pages(seq)[last])]
            assert copies[0][0] != copies[0][1]
        else:
            assert copies == []
        self.device.copy(copies)
        new = list(range(self.num_written, self.num_written + count))
        self.num_written += count
        self.device.write(seq, len(held), new)
        held += new

    @rule(seq=seqs, count=st.integers(0, 24))
    def reserve(self, seq, count):
        pages = -(-min(count, self.width * self.page_size) // self.page_size)
        if pages - self.num_pages(seq) > self.pool.num_free_pages:
            before = self.observe()
            with pytest.raises(OutOfPagesError):
                self.table.reserve(seq, pages * self.page_size)
            assert self.observe() == before
        else:
            self.table.reserve(seq, min(count, self.width * self.page_size))
            self.reserved[seq] = max(self.reserved[seq], pages)

    @rule(seq=consumes(seqs))
    def free(self, seq):
        self.table.free(seq)
        del self.values[seq], self.reserved[seq]
        before = self.observe()
        with pytest.raises(KeyError):
            self.table.free(seq)
        assert self.observe() == before

    @invariant()
    def each_sequence_reads_back_what_was_written(self):
        for seq, values in self.values.items():
            assert self.table.num_tokens(seq) == len(values)
            assert self.device.read(seq, len(values)) == values

    @invariant()
    def equal_contents_and_only_they_are_on_one_page(self):
        page_of, contents_of = {}, {}
        num_entries = num_live_cells = 0
        for seq in self.values:
            pages = self.table.pages(seq)
            assert len(pages) == self.num_pages(seq)
            num_entries += len(pages)
            for index, page in enumerate(pages):
                contents = tuple(self.chunk(seq, index)) or ("reserved", seq, index)
                if contents not in page_of:
                    num_live_cells += len(self.chunk(seq, index))
                assert page_of.setdefault(contents, page) == page, "not shared, but could be"
                assert contents_of.setdefault(page, contents) == contents, "shared in error"
        assert NULL_PAGE not in contents_of
        refcounts = [self.pool.refcount(page) for page in range(self.pool.num_pages)]
        assert sum(refcounts) == num_entries
        assert self.pool.num_used_pages == len(contents_of)
        assert self.pool.num_free_pages + len(contents_of) == self.pool.num_usable_pages
        assert self.table.num_allocated_cells == len(contents_of) * self.page_size
        assert self.table.num_live_cells == num_live_cells
        values = {page: c for page, c in contents_of.items() if c[0] != "reserved"}
        fills = [len(values.get(page, ())) for page in range(self.pool.num_pages)]
        assert self.table.fills() == fills

    @invariant()
    def the_snapshot_is_the_map(self):
        order = sorted(self.values, reverse=True)
        snapshot = self.table.snapshot(order, len(order) + 1)
        for row, seq in zip(snapshot, order, strict=False):
            pages = self.table.pages(seq)
            assert row.tolist() == [*pages, *[NULL_PAGE] * (self.width - len(pages))]
        assert snapshot[-1].tolist() == [NULL_PAGE] * self.width

    @invariant()
    def the_books_balance(self):
        self.table.check_invariants()

    def teardown(self):
        if not hasattr(self, "values"):
            return
        for seq in list(self.values):
            self.table.free(seq)
        assert self.pool.num_free_pages == self.pool.num_usable_pages
        assert self.table.num_live_cells == 0
        self.table.check_invariants()

    def chunk(self, seq, index):
        return self.values[seq][index * self.page_size : (index + 1) * self.page_size]

    def num_pages(self, seq):
        return max(-(-len(self.values[seq]) // self.page_size), self.reserved[seq])

    def sharers(self, seq):
        """Sequences with the very contents of `seq`'s last page, itself included."""
        index = (len(self.values[seq]) - 1) // self.page_size
        return sum(self.chunk(other, index) == self.chunk(seq, index) for other in self.values)

    def observe(self):
        return (
            {seq: (self.table.pages(seq), self.table.num_tokens(seq)) for seq in self.values},
            [self.pool.refcount(page) for page in range(self.pool.num_pages)],
            (self.pool.num_free_pages, self.pool.num_shared_pages, self.table.num_live_cells),
            self.table.snapshot(sorted(self.values), len(self.values)).tolist(),
        )


TestPageTableMachine = PageTableMachine.TestCase
TestPageTableMachine.settings = settings(deadline=None, max_examples=150, stateful_step_count=40)
