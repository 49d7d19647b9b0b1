# SPDX-License-Identifier: Apache-2.0
"""What a scheduler refuses when it is made, and of requests that could never run."""

import re

import pytest

from jpaged.host.admission import RequestTooLongError
from tests.jpaged.schedules import add, make_scheduler, read


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused():
    scheduler = make_scheduler(max_model_len=8)
    message = (
        "request 'a': a prompt of 8 tokens leaves no room for an answer in max_model_len=8; "
        "shorten the prompt or raise max_model_len"
    )
    with pytest.raises(RequestTooLongError, match=re.escape(message)):
        add(scheduler, "a", 8)
    assert not scheduler.has_work
    add(scheduler, "b", 7)
    assert scheduler.num_waiting == 1


def test_a_request_larger_than_the_pool_is_refused():
    scheduler = make_scheduler(num_usable_pages=2)
    message = (
        "request 'a': 5 prompt tokens and up to 5 more need 3 pages of 4 tokens, but the pool has "
        "2; lower max_tokens or raise num_pages"
    )
    with pytest.raises(RequestTooLongError, match=re.escape(message)):
        add(scheduler, "a", 5, max_tokens=5)
    assert not scheduler.has_work
    # Of 9 tokens, 8 need a cell: the last is never attended to.
    seq = add(scheduler, "b", 5, max_tokens=4)
    while scheduler.has_work:
        read(scheduler.schedule())
    assert len(seq.token_ids) == 9


def test_max_model_len_bounds_what_a_request_can_need():
    scheduler = make_scheduler(num_usable_pages=2, max_model_len=9)
    assert add(scheduler, "a", 5, max_tokens=1000).max_total_tokens == 9


def test_a_reservation_larger_than_the_pool_is_refused():
    scheduler = make_scheduler(num_usable_pages=2, max_model_len=9, reservation="max")
    with pytest.raises(RequestTooLongError, match="need 3 pages of 4 tokens, but the pool has 2"):
        add(scheduler, "a", 1, max_tokens=1)


def test_more_beams_than_a_step_computes_are_refused():
    for budgets in ({"max_num_seqs": 3}, {"max_num_batched_tokens": 3}):
        scheduler = make_scheduler(**budgets)
        message = (
            "request 'a': beam_width=4 exceeds the 3 beams that a step computes: lower it, or "
            "raise max_num_seqs and max_num_batched_tokens"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            add(scheduler, "a", 2, beam_width=4)
        assert not scheduler.has_work
        add(scheduler, "b", 2, beam_width=3)


def test_beams_that_could_outgrow_the_pool_are_refused():
    # The full page of the prompt is shared; each beam may need two more.
    scheduler = make_scheduler(num_usable_pages=6)
    message = (
        "request 'a': 5 prompt tokens and up to 8 more for each of 3 beams need 7 pages of 4 "
        "tokens, but the pool has 6; lower max_tokens or raise num_pages"
    )
    with pytest.raises(RequestTooLongError, match=re.escape(message)):
        add(scheduler, "a", 5, max_tokens=8, beam_width=3)
    add(scheduler, "b", 5, max_tokens=8, beam_width=2)


def test_several_samples_cannot_share_what_max_reserves():
    scheduler = make_scheduler(reservation="max")
    message = (
        "request 'a': samples and beams need shared pages, which reservation='max' does not have; "
        "use n=1 or reservation='paged'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        add(scheduler, "a", 2, n=2)
    assert not scheduler.has_work


@pytest.mark.parametrize("budget", ["max_num_batched_tokens", "max_num_seqs", "max_model_len"])
def test_budgets_below_one_are_refused(budget):
    with pytest.raises(ValueError, match=f"{budget}=0 must be at least 1"):
        make_scheduler(**{budget: 0})


def test_an_unknown_reservation_is_refused():
    with pytest.raises(ValueError, match=re.escape("reservation='none' must be 'paged' or 'max'")):
        make_scheduler(reservation="none")
