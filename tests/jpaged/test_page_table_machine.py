# SPDX-License-Identifier: Apache-2.0
"""Copy-on-write against a model that knows no pages: each sequence is a list of unique values.

Every write has a value of its own, so two sequences hold the same values at the same positions
exactly if one was forked from the other and neither has written there since. That tells which pages
must be shared, which must be copied, and how many must be in use, without counting references.
Groups of layers differ in what they have released.
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

from jpaged.host.groups import ONE_GROUP, GroupKind
from jpaged.host.page_pool import NULL_PAGE, OutOfPagesError, PagePool
from jpaged.host.page_table import PageTable
from tests.jpaged.expected import first_seen


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
        for group in range(self.table.num_groups):
            for position, value in enumerate(values, start):
                index, slot = divmod(position, self.table.page_size)
                self.cells[self.table.pages(seq, group)[index], slot] = value

    def read(self, seq, group, start, end):
        pages, size = self.table.pages(seq, group), self.table.page_size
        return [self.cells.get((pages[p // size], p % size)) for p in range(start, end)]


KINDS = [
    ONE_GROUP,
    (GroupKind(None, 1), GroupKind(3, 2)),
    (GroupKind(5, 1),),
    (GroupKind(1, 1), GroupKind(None, 2), GroupKind(4, 1)),
]


class PageTableMachine(RuleBasedStateMachine):
    seqs = Bundle("seqs")

    @initialize(
        page_size=st.integers(1, 4),
        num_usable_pages=st.integers(1, 14),
        width=st.integers(1, 6),
        kinds=st.sampled_from(KINDS),
    )
    def make(self, page_size, num_usable_pages, width, kinds):
        self.page_size, self.width, self.kinds = page_size, width, kinds
        self.num_groups = sum(kind.num_groups for kind in kinds)
        num_usable_pages *= self.num_groups
        self.table = PageTable(PagePool(num_usable_pages + 1), page_size, width, kinds)
        self.pool = self.table.pool
        self.device = Device(self.table)
        self.values: dict[int, list[int]] = {}
        self.reserved: dict[int, int] = {}  # pages that the sequence has asked for ahead of tokens
        self.next_query: dict[int, int] = {}
        self.num_written = 0

    @precondition(lambda self: len(self.values) < 12)
    @rule(target=seqs)
    def add(self):
        seq = self.table.add()
        assert seq not in self.values
        self.values[seq], self.reserved[seq], self.next_query[seq] = [], 0, 0
        return seq

    @precondition(lambda self: len(self.values) < 12)
    @rule(target=seqs, parent=seqs)
    def fork(self, parent):
        free = self.pool.num_free_pages
        child = self.table.fork(parent)
        assert child not in self.values
        assert self.pool.num_free_pages == free, "a fork takes no page"
        self.values[child], self.reserved[child] = list(self.values[parent]), 0
        self.next_query[child] = self.next_query[parent]
        return child

    # A small count twice: pages that stay partial are what copy-on-write is about.
    @rule(seq=seqs, count=st.integers(0, 3) | st.integers(0, 3) | st.integers(0, 20))
    def append(self, seq, count):
        held = self.values[seq]
        total_pages = -(-(len(held) + count) // self.page_size)
        new_pages = max(total_pages - self.num_pages(seq), 0)
        shared_by = self.sharers(seq) if count and len(held) % self.page_size else 0
        needed = (new_pages + (shared_by > 1)) * self.num_groups
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
        old_pages = self.pages_of_all(seq)
        copies = self.table.append(seq, count)
        assert free - self.pool.num_free_pages == needed
        if shared_by > 1:
            last = len(held) // self.page_size
            pages = self.pages_of_all(seq)
            assert copies == [(a[last], b[last]) for a, b in zip(old_pages, pages, strict=True)]
            assert {src for src, _ in copies}.isdisjoint(dst for _, dst in copies)
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
        if (pages - self.num_pages(seq)) * self.num_groups > self.pool.num_free_pages:
            before = self.observe()
            with pytest.raises(OutOfPagesError):
                self.table.reserve(seq, pages * self.page_size)
            assert self.observe() == before
        else:
            self.table.reserve(seq, min(count, self.width * self.page_size))
            self.reserved[seq] = max(self.reserved[seq], pages)

    @rule(seq=seqs, back=st.integers(0, 3))
    def release_before(self, seq, back):
        position = max(len(self.values[seq]) - back, 0)
        before, free = self.pages_of_all(seq), self.pool.num_free_pages
        self.table.release_before(seq, position)
        self.next_query[seq] = max(position, self.next_query[seq])
        assert self.pool.num_free_pages >= free
        for was, now, kind in zip(before, self.pages_of_all(seq), self.kind_of, strict=True):
            first = self.first_held(seq, kind)
            assert now == (*[NULL_PAGE] * first, *was[first:])

    @rule(seq=consumes(seqs))
    def free(self, seq):
        self.table.free(seq)
        del self.values[seq], self.reserved[seq], self.next_query[seq]
        before = self.observe()
        with pytest.raises(KeyError):
            self.table.free(seq)
        assert self.observe() == before

    @invariant()
    def each_sequence_reads_back_what_was_written(self):
        for seq, values in self.values.items():
            assert self.table.num_tokens(seq) == len(values)
            for group, kind in enumerate(self.kind_of):
                start = min(self.first_held(seq, kind) * self.page_size, len(values))
                assert start <= first_seen(kind.window, self.next_query[seq]), (
                    "what is seen is gone"
                )
                assert self.device.read(seq, group, start, len(values)) == values[start:]

    @invariant()
    def equal_contents_and_only_they_are_on_one_page(self):
        page_of, contents_of, needs = {}, {}, {}
        num_entries = num_filled = num_needed = 0
        for seq in self.values:
            for group, kind in enumerate(self.kind_of):
                pages, seen = (
                    self.table.pages(seq, group),
                    first_seen(kind.window, self.next_query[seq]),
                )
                assert len(pages) == self.num_pages(seq)
                first = self.first_held(seq, kind)
                assert pages[:first] == (NULL_PAGE,) * first
                num_entries += len(pages) - first
                for index, page in enumerate(pages[first:], first):
                    contents = group, *(self.chunk(seq, index) or ["reserved", seq, index])
                    if contents not in page_of:
                        num_filled += len(self.chunk(seq, index))
                    assert page_of.setdefault(contents, page) == page, "not shared, but could be"
                    assert contents_of.setdefault(page, contents) == contents, "shared in error"
                    unneeded = max(seen - index * self.page_size, 0)
                    needs[page] = min(unneeded, needs.get(page, self.page_size))
        fills = [0] * self.pool.num_pages
        for page, (_, *contents) in contents_of.items():
            fills[page] = 0 if contents[0] == "reserved" else len(contents)
            num_needed += max(fills[page] - needs[page], 0)
        assert NULL_PAGE not in contents_of
        assert self.pool.num_references == num_entries
        assert self.pool.num_used_pages == len(contents_of)
        assert self.pool.num_free_pages + len(contents_of) == self.pool.num_usable_pages
        assert self.table.num_allocated_cells == len(contents_of) * self.page_size
        # Of a page that was shared, all cells count until its last owner gives something back.
        assert num_needed <= self.table.num_live_cells <= num_filled
        assert self.table.cells.of_pages() == fills

    @invariant()
    def the_snapshot_is_the_map(self):
        order = sorted(self.values, reverse=True)
        snapshot = self.table.snapshot(order, len(order) + 1)
        if self.num_groups == 1:
            snapshot = snapshot[None]
        assert snapshot.shape == (self.num_groups, len(order) + 1, self.width)
        for group, rows in enumerate(snapshot):
            for row, seq in zip(rows, order, strict=False):
                pages = self.table.pages(seq, group)
                assert row.tolist() == [*pages, *[NULL_PAGE] * (self.width - len(pages))]
            assert rows[-1].tolist() == [NULL_PAGE] * self.width

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

    @property
    def kind_of(self):
        """The kind of each group."""
        return [kind for kind in self.kinds for _ in range(kind.num_groups)]

    def first_held(self, seq, kind):
        return first_seen(kind.window, self.next_query[seq]) // self.page_size

    def pages_of_all(self, seq):
        return [self.table.pages(seq, group) for group in range(self.num_groups)]

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
            {seq: (self.pages_of_all(seq), self.table.num_tokens(seq)) for seq in self.values},
            [self.pool.refcount(page) for page in range(self.pool.num_pages)],
            (self.pool.num_free_pages, self.pool.num_shared_pages, self.table.num_live_cells),
            self.table.snapshot(sorted(self.values), len(self.values)).tolist(),
        )


TestPageTableMachine = PageTableMachine.TestCase
TestPageTableMachine.settings = settings(deadline=None, max_examples=150, stateful_step_count=40)
