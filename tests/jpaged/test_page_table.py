# SPDX-License-Identifier: Apache-2.0
"""Copy-on-write, reservations and snapshots, case by case."""

import re

import numpy as np
import pytest

from jpaged.host.page_pool import NULL_PAGE, OutOfPagesError, PagePool
from jpaged.host.page_table import PageTable


def make_table(num_usable_pages=16, page_size=4, pages_per_seq=8):
    return PageTable(PagePool(num_usable_pages + 1), page_size, pages_per_seq)


def test_two_forks_append_to_a_shared_page_and_only_the_first_copies():
    table = make_table()
    first = table.add()
    assert table.append(first, 6) == []
    full, partial = table.pages(first)
    second = table.fork(first)
    assert table.pages(second) == (full, partial)
    assert table.pool.num_used_pages == 2

    assert table.pages_needed(first, 1) == 1
    ((src, dst),) = table.append(first, 1)
    assert src == partial
    assert table.pages(first) == (full, dst)
    assert dst not in (full, partial)
    assert table.pages(second) == (full, partial)

    # The last owner writes in place.
    assert table.pages_needed(second, 1) == 0
    assert table.append(second, 1) == []
    assert table.pages(second) == (full, partial)
    assert (table.pool.num_used_pages, table.pool.num_shared_pages) == (3, 1)
    assert table.num_live_cells == 4 + 3 + 3


def test_forks_of_full_pages_copy_nothing():
    table = make_table()
    first = table.add()
    table.append(first, 8)
    second = table.fork(first)
    assert table.append(first, 1) == []
    assert table.append(second, 1) == []
    assert table.pages(first)[:2] == table.pages(second)[:2]
    assert table.pages(first)[2] != table.pages(second)[2]


def test_appending_no_tokens_to_a_shared_page_copies_nothing():
    table = make_table()
    first = table.add()
    table.append(first, 3)
    second = table.fork(first)
    assert table.pages_needed(second, 0) == 0
    assert table.append(second, 0) == []
    assert table.pages(second) == table.pages(first)


def test_one_append_can_copy_and_grow():
    table = make_table()
    first = table.add()
    table.append(first, 3)
    second = table.fork(first)
    assert table.pages_needed(second, 6) == 3
    ((src, dst),) = table.append(second, 6)
    assert (src,) == table.pages(first)
    assert table.pages(second)[0] == dst
    assert len({*table.pages(first), *table.pages(second)}) == 4


def test_a_shared_page_is_not_copied_once_the_other_owner_is_gone():
    table = make_table()
    first = table.add()
    table.append(first, 3)
    second = table.fork(first)
    (page,) = table.pages(first)
    table.free(first)
    assert table.append(second, 1) == []
    assert table.pages(second) == (page,)
    assert table.num_live_cells == 4


def test_a_full_pool_refuses_the_copy_too():
    table = make_table(num_usable_pages=1)
    first = table.add()
    table.append(first, 3)
    second = table.fork(first)
    with pytest.raises(OutOfPagesError, match="1 pages asked for, 0 of 1 free"):
        table.append(second, 1)
    assert table.pages(second) == table.pages(first)
    assert table.num_tokens(second) == 3
    table.check_invariants()


def test_a_pool_that_holds_the_new_page_but_not_the_copy_changes_nothing():
    table = make_table(num_usable_pages=2)
    first = table.add()
    table.append(first, 3)
    second = table.fork(first)
    assert table.pages_needed(second, 2) == 2
    with pytest.raises(OutOfPagesError, match="2 pages asked for, 1 of 2 free"):
        table.append(second, 2)
    assert table.pool.num_free_pages == 1
    assert table.pages(second) == table.pages(first)
    table.check_invariants()


def test_a_sequence_cannot_outgrow_its_line():
    table = make_table(pages_per_seq=2)
    seq = table.add()
    table.append(seq, 5)
    message = "9 tokens need 3 pages of 4, more than the 2 of a sequence"
    with pytest.raises(ValueError, match=re.escape(message)):
        table.append(seq, 4)
    assert table.num_tokens(seq) == 5
    assert table.pool.num_used_pages == 2
    assert table.append(seq, 3) == []
    table.check_invariants()


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 1)])
def test_sizes_below_one_are_refused(sizes):
    page_size, pages_per_seq = sizes
    message = f"page_size={page_size} and pages_per_seq={pages_per_seq} must be at least 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        PageTable(PagePool(4), page_size, pages_per_seq)


def test_freeing_an_unknown_sequence_raises():
    table = make_table()
    seq = table.add()
    table.append(seq, 5)
    table.free(seq)
    with pytest.raises(KeyError):
        table.free(seq)
    with pytest.raises(KeyError):
        table.free(seq + 1)
    assert table.pool.num_used_pages == 0
    table.check_invariants()


def test_a_fork_of_a_reserved_sequence_shares_only_pages_with_tokens():
    table = make_table()
    parent = table.add()
    table.reserve(parent, 16)
    assert table.append(parent, 5) == []
    reserved = table.pages(parent)
    assert len(reserved) == 4
    child = table.fork(parent)
    assert table.pages(child) == reserved[:2]
    assert [table.pool.refcount(page) for page in reserved] == [2, 2, 1, 1]
    assert table.num_live_cells == 5
    # The parent's own copy takes the shared page's place in front of what it has reserved.
    ((src, dst),) = table.append(parent, 4)
    assert src == reserved[1]
    assert table.pages(parent) == (reserved[0], dst, *reserved[2:])
    table.free(child)
    table.free(parent)
    assert table.pool.num_used_pages == 0
    assert table.num_live_cells == 0


def test_reserved_pages_are_used_before_new_ones_are_taken():
    table = make_table()
    seq = table.add()
    table.reserve(seq, 9)
    pages = table.pages(seq)
    assert table.pages_needed(seq, 12) == 0
    assert table.append(seq, 12) == []
    assert table.pages(seq) == pages
    assert table.pages_needed(seq, 1) == 1
    table.reserve(seq, 9)  # has them
    assert table.pages(seq) == pages


def test_reserving_more_than_the_pool_changes_nothing():
    table = make_table(num_usable_pages=2)
    seq = table.add()
    table.append(seq, 1)
    with pytest.raises(OutOfPagesError):
        table.reserve(seq, 13)
    assert len(table.pages(seq)) == 1
    table.check_invariants()


def test_the_table_grows_past_eight_sequences():
    table = make_table(num_usable_pages=64)
    seqs = []
    for count in range(1, 21):
        seq = table.add()
        table.append(seq, count)
        seqs.append(seq)
        table.check_invariants()
    assert len(set(seqs)) == 20
    snapshot = table.snapshot(seqs, 20)
    for count, (seq, row) in enumerate(zip(seqs, snapshot, strict=True), 1):
        pages = -(-count // 4)
        assert table.num_tokens(seq) == count
        assert tuple(row[:pages]) == table.pages(seq)
        assert (row[pages:] == NULL_PAGE).all()
    for seq in seqs:
        table.free(seq)
    table.check_invariants()
    assert table.pool.num_used_pages == 0
    again = {table.add() for _ in range(20)}
    assert len(again) == 20


def test_a_fork_that_grows_the_table_is_in_its_snapshot():
    table = make_table()
    seqs = [table.add() for _ in range(8)]
    table.append(seqs[0], 6)
    child = table.fork(seqs[0])
    rows = table.snapshot([child, seqs[0]], 2)
    assert tuple(rows[0][:2]) == tuple(rows[1][:2]) == table.pages(seqs[0])
    table.check_invariants()


def test_a_snapshot_is_read_only():
    table = make_table()
    seq = table.add()
    table.append(seq, 5)
    snapshot = table.snapshot([seq], 1)
    with pytest.raises(ValueError, match="read-only"):
        snapshot[0, 0] = 7
    assert snapshot.dtype == np.int32


def test_a_snapshot_is_immune_to_later_changes():
    table = make_table()
    first = table.add()
    table.append(first, 5)
    second = table.fork(first)
    snapshot = table.snapshot([first, second], 2)
    before = snapshot.copy()
    table.append(first, 9)
    table.append(second, 1)
    table.free(first)
    third = table.add()
    table.append(third, 20)
    np.testing.assert_array_equal(snapshot, before)


def test_a_snapshot_is_padded_with_the_null_page_and_keeps_the_order_of_rows():
    table = make_table(pages_per_seq=3)
    first, second = table.add(), table.add()
    table.append(first, 4)
    table.append(second, 9)
    snapshot = table.snapshot([second, first], 4)
    assert snapshot.tolist() == [
        list(table.pages(second)),
        [*table.pages(first), NULL_PAGE, NULL_PAGE],
        [NULL_PAGE] * 3,
        [NULL_PAGE] * 3,
    ]
    assert table.snapshot([], 2).tolist() == [[NULL_PAGE] * 3] * 2


def test_a_freed_line_is_clean_for_its_next_owner():
    table = make_table()
    old = table.add()
    table.append(old, 20)
    table.free(old)
    seqs = [table.add() for _ in range(8)]
    assert old in seqs
    assert (table.snapshot(seqs, 8) == NULL_PAGE).all()


def test_tokens_are_not_taken_back():
    table = make_table()
    seq = table.add()
    table.append(seq, 3)
    with pytest.raises(ValueError, match="num_tokens=-1 must be at least 0"):
        table.append(seq, -1)
    assert table.num_tokens(seq) == 3
