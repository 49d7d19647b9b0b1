# SPDX-License-Identifier: Apache-2.0
"""The pool's promises: no page is lost, handed out twice, or freed behind an owner's back."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.host.page_pool import NULL_PAGE, OutOfPagesError, PagePool


@pytest.mark.parametrize("num_pages", [-1, 0, 1])
def test_a_pool_without_a_page_to_hand_out_is_refused(num_pages):
    message = f"num_pages={num_pages} must be at least 2: page 0 is kept for padding"
    with pytest.raises(ValueError, match=re.escape(message)):
        PagePool(num_pages)


def test_the_smallest_pool_hands_out_its_one_page():
    pool = PagePool(2)
    assert (pool.num_usable_pages, pool.num_free_pages, pool.num_used_pages) == (1, 1, 0)
    assert pool.allocate(1) == [1]
    assert (pool.num_usable_pages, pool.num_free_pages, pool.num_used_pages) == (1, 0, 1)


def test_the_reserved_page_is_never_handed_out():
    pool = PagePool(9)
    for _ in range(3):
        pages = pool.allocate(pool.num_usable_pages)
        assert sorted(pages) == list(range(1, 9))
        assert NULL_PAGE not in pages
        for page in pages:
            assert pool.release(page)
    pool.check_invariants()


def test_allocated_pages_have_one_reference_each():
    pool = PagePool(6)
    pages = pool.allocate(3)
    assert len(set(pages)) == 3
    assert [pool.refcount(page) for page in pages] == [1, 1, 1]
    assert pool.num_used_pages == 3
    assert pool.num_shared_pages == 0


def test_allocating_none_takes_none():
    pool = PagePool(3)
    assert pool.allocate(0) == []
    assert pool.num_free_pages == 2
    pool.allocate(2)
    assert pool.allocate(0) == []


def test_too_large_an_allocation_leaves_the_pool_unchanged():
    pool = PagePool(6)
    held = pool.allocate(2)
    message = (
        "4 pages asked for, 3 of 5 free; free a sequence first or make the pool larger (num_pages)"
    )
    with pytest.raises(OutOfPagesError, match=re.escape(message)):
        pool.allocate(4)
    assert (pool.num_free_pages, pool.num_used_pages) == (3, 2)
    assert [pool.refcount(page) for page in held] == [1, 1]
    pool.check_invariants()
    assert set(pool.allocate(3)).isdisjoint(held)


def test_a_page_is_free_exactly_when_its_last_reference_is_gone():
    pool = PagePool(4)
    (page,) = pool.allocate(1)
    pool.share([page])
    pool.share([page])
    assert (pool.refcount(page), pool.num_shared_pages) == (3, 1)
    assert not pool.release(page)
    assert (pool.refcount(page), pool.num_shared_pages, pool.num_used_pages) == (2, 1, 1)
    assert not pool.release(page)
    assert (pool.refcount(page), pool.num_shared_pages, pool.num_used_pages) == (1, 0, 1)
    assert page not in pool.allocate(2)
    assert pool.release(page)
    assert (pool.refcount(page), pool.num_free_pages) == (0, 1)
    assert pool.allocate(1) == [page]


def test_a_page_shared_twice_counts_as_one_used_and_one_shared():
    pool = PagePool(5)
    pages = pool.allocate(2)
    pool.share(pages)
    assert (pool.num_used_pages, pool.num_shared_pages, pool.num_free_pages) == (2, 2, 2)


def test_a_double_free_raises_and_changes_nothing():
    pool = PagePool(4)
    (page,) = pool.allocate(1)
    pool.release(page)
    message = f"page {page} is not in use: it was freed twice, or never handed out"
    with pytest.raises(ValueError, match=re.escape(message)):
        pool.release(page)
    assert pool.num_free_pages == 3
    pool.check_invariants()
    assert sorted(pool.allocate(3)) == [1, 2, 3]


def test_a_page_that_was_never_handed_out_cannot_be_freed():
    with pytest.raises(ValueError, match="page 2 is not in use"):
        PagePool(4).release(2)


def test_a_free_page_cannot_be_shared():
    pool = PagePool(4)
    (page,) = pool.allocate(1)
    pool.release(page)
    message = f"page {page} is not in use: it cannot be shared"
    with pytest.raises(ValueError, match=re.escape(message)):
        pool.share([page])
    pool.check_invariants()


@pytest.mark.parametrize("operation", [PagePool.release, lambda pool, page: pool.share([page])])
def test_the_reserved_page_can_be_neither_freed_nor_shared(operation):
    pool = PagePool(4)
    pool.allocate(3)
    with pytest.raises(ValueError, match="page 0 is not in use"):
        operation(pool, NULL_PAGE)
    pool.check_invariants()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_pool_agrees_with_a_multiset_of_references(data):
    num_pages = data.draw(st.integers(2, 7))
    pool, references = PagePool(num_pages), Counter()
    for _ in range(data.draw(st.integers(1, 30))):
        operation = data.draw(st.sampled_from(["allocate", "share", "release"]))
        free = num_pages - 1 - len(references)
        if operation == "allocate":
            count = data.draw(st.integers(0, num_pages))
            if count > free:
                with pytest.raises(OutOfPagesError):
                    pool.allocate(count)
            else:
                pages = pool.allocate(count)
                assert len(set(pages)) == count
                assert NULL_PAGE not in pages and references.keys().isdisjoint(pages)
                references.update(pages)
        elif references:
            page = data.draw(st.sampled_from(sorted(references)))
            if operation == "share":
                pool.share([page])
                references[page] += 1
            else:
                references[page] -= 1
                references += Counter()  # forgets what has no reference left
                assert pool.release(page) == (page not in references)
        assert [pool.refcount(page) for page in range(num_pages)] == [
            references[page] for page in range(num_pages)
        ]
        assert pool.num_used_pages == len(references)
        assert pool.num_free_pages + pool.num_used_pages == pool.num_usable_pages
        assert pool.num_shared_pages == sum(count > 1 for count in references.values())
        pool.check_invariants()
