# SPDX-License-Identifier: Apache-2.0
"""What a scheduler refuses when it is made, and of requests that could never run."""

import gc
import itertools
import re
import weakref

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from jpaged.host.admission import RequestTooLongError, peak_pages
from jpaged.host.scored import ScoredTokens
from jpaged.host.sequence import Status
from tests.jpaged.schedules import add, make_scheduler, plan, read


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


def peak_by_steps(lengths, page_size, idle=lambda: set()):
    """The most pages of any step, each counted as it is; `idle` says who does not grow next."""
    most, lengths = 0, dict(enumerate(lengths))
    while lengths:
        most = max(most, sum(-(-now // page_size) for now, _ in lengths.values()))
        still = idle()
        lengths = {
            i: (now + (i not in still), end)
            for i, (now, end) in lengths.items()
            if now < end or i in still
        }
    return most


class TestPeak:
    @pytest.mark.parametrize(
        ("lengths", "peak"),
        [
            ([], 0),
            ([(7, 7)], 7),
            ([(1, 10)], 10),
            # 4 + 6 steps later than 9 + 1: together they have 12 at most, the first alone has 10.
            ([(4, 10), (9, 10)], 15),
            ([(1, 10), (9, 10)], 12),
            ([(1, 20), (9, 10)], 20),
        ],
    )
    def test_by_hand(self, lengths, peak):
        assert peak_pages(lengths, 1) == peak_by_steps(lengths, 1) == peak

    @given(
        st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), max_size=12), st.integers(1, 9)
    )
    def test_is_never_less_than_the_steps_take_and_hardly_more(self, lengths, page_size):
        lengths = [(now, now + more) for now, more in lengths]
        peak, steps = peak_pages(lengths, page_size), peak_by_steps(lengths, page_size)
        assert steps <= peak <= steps + len(lengths)
        if page_size == 1:
            assert peak == steps

    @given(
        st.lists(st.tuples(*(st.integers(0, 20) for _ in range(3))), max_size=8),
        st.integers(1, 4),
        st.integers(0, 9),
    )
    @example([(9, 0, 0), (0, 5, 20), (0, 5, 20)], 1, 5)
    def test_is_never_less_whoever_is_idle_when(self, sequences, page_size, most_idle):
        """Each for as long as it may be, from a step of its own on."""
        lengths = [(1 + now, 1 + now + more) for now, more, _ in sequences]
        times = itertools.count()

        def idle():
            time = next(times)
            starts = enumerate(start for *_, start in sequences)
            return {i for i, start in starts if start <= time < start + most_idle}

        peak = peak_pages(lengths, page_size, most_idle)
        assert peak_by_steps(lengths, page_size, idle) <= peak
        assert peak <= peak_by_steps(lengths, page_size) + len(lengths) * (1 + most_idle)


class TestRoomToTheEnd:
    """Pages of a token; 100 // 16 = 6 are left free for others to grow into, two for each."""

    def started(self, growing, lengths=(30, 30, 27), length=9, **first):
        """Whether one more token and so many start beside three, which have 90 after a step."""
        scheduler = make_scheduler(
            100, page_size=1, max_num_batched_tokens=500, max_model_len=100, max_num_seqs=8
        )
        for name, num_tokens in zip("abc", lengths, strict=True):
            add(scheduler, name, num_tokens, max_tokens=growing, **(first if name == "a" else {}))
        assert plan(scheduler.schedule()) == "a:{} b:{} c:{}".format(*lengths)
        last = add(scheduler, "last", length, max_tokens=1)
        scheduler.schedule()
        scheduler.check_invariants()
        return last.status is not Status.WAITING

    def test_who_can_grow_no_more_leaves_pages_to_others(self):
        # The second step has 90 + 9 of 100 pages: those that run end with it.
        assert self.started(growing=2)

    def test_who_can_does_not(self):
        assert not self.started(growing=20)

    def test_samples_are_not_foreseen(self):
        # With two samples of the first there are 91 pages in use in the second step, and 8 more.
        few = {"lengths": (1, 43, 43), "length": 8}
        assert self.started(growing=2, **few)
        assert not self.started(growing=2, n=2, **few)

    def test_beams_are_not_foreseen(self):
        assert not self.started(growing=2, logprobs=None, beam_width=1)

    def test_who_had_no_room_is_not_kept_when_it_has_ended(self):
        scheduler = make_scheduler(100, page_size=1, max_num_batched_tokens=500, max_model_len=100)
        add(scheduler, "a", 87, max_tokens=8)
        last = add(scheduler, "last", 12, max_tokens=8)
        for _ in range(2):
            read(scheduler.schedule())
        assert last.status is Status.WAITING
        request = weakref.ref(last.request)
        scheduler.finish(last, "abort")
        del last
        gc.collect()
        assert request() is None

    def test_it_is_asked_again_when_one_has_ended(self):
        scheduler = make_scheduler(
            100, page_size=1, max_num_batched_tokens=500, max_model_len=100, max_num_seqs=8
        )
        first = add(scheduler, "a", 1, max_tokens=30)
        for name, num_tokens in zip("bcde", (22, 22, 22, 20), strict=True):
            add(scheduler, name, num_tokens, max_tokens=3)
        read(scheduler.schedule())
        add(scheduler, "last", 5, max_tokens=3)
        # 92 pages are used, 97 would be, and 103 a step later.
        step = scheduler.schedule()
        assert plan(step) == "a:1 b:1 c:1 d:1 e:1"
        read(step)
        scheduler.finish(first, "stop")
        # 94 are used, by those that end with this step. Of the 6 that are free 5 are taken.
        assert plan(scheduler.schedule()) == "b:1 c:1 d:1 e:1 last:5"

    def test_what_others_take_while_a_prompt_is_computed_is_counted(self):
        """In ten steps, for of eight tokens a step two are of those that run: 15 each then."""
        scheduler = make_scheduler(
            68, page_size=1, max_num_batched_tokens=8, max_model_len=100, max_num_seqs=8
        )
        others = [add(scheduler, name, 4, max_tokens=20) for name in "ab"]
        read(scheduler.schedule())
        # With the 55 of the last there are 10 + 55 + 3 in the next step, and it ends with that.
        last = add(scheduler, "last", 55, max_tokens=2)
        while scheduler.has_work:
            step = scheduler.schedule()
            read(step)
            for seq in step.samples:
                if len(seq.token_ids) == seq.max_total_tokens:
                    scheduler.finish(seq, "length")
        assert scheduler.num_preemptions == 0
        assert {seq.finish_reason for seq in (*others, last)} == {"length"}

    def test_a_score_takes_steps_that_are_not_foreseen(self):
        """A token a step, where samples take all places but one."""
        started = []
        for has_scores in (False, True):
            scheduler = make_scheduler(
                100, page_size=1, max_num_batched_tokens=500, max_model_len=100, max_num_seqs=4
            )
            for name, num_tokens in zip("abc", (30, 30, 27), strict=True):
                add(scheduler, name, num_tokens, max_tokens=2)
            read(scheduler.schedule())
            last = add(scheduler, "last", 9, max_tokens=1)
            if has_scores:
                last.request.scored = ScoredTokens([*last.token_ids, 0], 0, 1)
            scheduler.schedule()
            started.append(last.status is not Status.WAITING)
        assert started == [True, False]

    @settings(deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.integers(1, 30), st.integers(1, 20), st.integers(0, 6), st.integers(-1, 1)
            ),
            min_size=2,
            max_size=8,
        ),
        st.integers(1, 12),
        st.integers(1, 4),
        st.integers(0, 30),
        st.booleans(),
    )
    def test_who_starts_so_is_not_preempted(self, asked, budget, page_size, more, prefix_cache):
        """Nobody is, where all start so, whatever their priorities."""
        needed = max(-(-(prompt + tokens - 1) // page_size) for prompt, tokens, *_ in asked)
        scheduler = make_scheduler(
            needed + more,
            page_size,
            max_num_batched_tokens=budget,
            max_model_len=50,
            max_num_seqs=8,
            prefix_cache=prefix_cache,
        )
        queues = scheduler._queues
        # More pages to spare than there are: only who has room to the end starts beside others.
        scheduler.admission._spare_pages = lambda seq: 10**6 * bool(queues.running)
        live = []
        most = 0
        for time in range(1000):
            for index, (prompt, tokens, arrival, priority) in enumerate(asked):
                if arrival == time:
                    live.append(add(scheduler, f"{index}", prompt, tokens, priority=priority))
            step = scheduler.schedule()
            scheduler.check_invariants()
            most = max(most, scheduler.num_running)
            read(step)
            for seq in step.samples:
                if len(seq.token_ids) == seq.max_total_tokens:
                    scheduler.finish(seq, "length")
            if time > 6 and not scheduler.has_work:
                break
        assert all(seq.finish_reason == "length" for seq in live)
        event(f"at once: {most}")
        assert scheduler.num_preemptions == 0
