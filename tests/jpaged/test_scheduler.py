# SPDX-License-Identifier: Apache-2.0
"""Small schedules, worked out by hand."""

import types

import pytest

from jpaged.host.queues import Queues
from jpaged.host.sequence import Status
from jpaged.host.step_builder import StepBuilder
from tests.jpaged.schedules import add, make_scheduler, plan, read, sampled, sources


def test_an_idle_scheduler_plans_an_empty_step():
    scheduler = make_scheduler()
    assert not scheduler.has_work
    assert plan(scheduler.schedule()) == ""


def test_a_long_prompt_is_split_into_chunks():
    scheduler = make_scheduler(max_num_batched_tokens=4)
    seq = add(scheduler, "a", 10)
    steps = [scheduler.schedule() for _ in range(3)]
    assert [plan(step) for step in steps] == ["a:4", "a:4", "a:2"]
    assert [sampled(step) for step in steps] == [[], [], ["a"]]
    assert [step.plan.num_prefill_tokens for step in steps] == [4, 4, 2]
    assert seq.num_computed_tokens == 10
    # The token that the last chunk samples is not known yet: it comes from sample slot 0.
    step = scheduler.schedule()
    assert (plan(step), sources(step), step.plan.num_prefill_tokens) == ("a:1", [0], 0)


def test_a_token_that_the_host_knows_is_not_taken_from_the_device():
    scheduler = make_scheduler()
    add(scheduler, "a", 3)
    step = scheduler.schedule()
    assert sources(step) == [-1]
    read(step)
    step = scheduler.schedule()
    assert (plan(step), sources(step)) == ("a:1", [-1])


def test_decode_goes_first_and_prefill_fills_the_rest_of_the_step():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, "a", 3)
    add(scheduler, "b", 2)
    assert plan(scheduler.schedule()) == "a:3 b:2"
    add(scheduler, "c", 9)
    add(scheduler, "d", 2)
    step = scheduler.schedule()
    assert plan(step) == "a:1 b:1 c:6"
    assert sampled(step) == ["a", "b"]
    assert step.plan.num_prefill_tokens == 6
    step = scheduler.schedule()
    assert plan(step) == "a:1 b:1 c:3 d:2"
    assert sampled(step) == ["a", "b", "c", "d"]
    assert list(step.plan.samples.rows) == [0, 1, 2, 3]
    assert step.plan.num_prefill_tokens == 5


def test_the_last_token_of_a_prompt_alone_in_a_chunk_is_prefill():
    scheduler = make_scheduler(max_num_batched_tokens=4)
    add(scheduler, "a", 5)
    scheduler.schedule()
    step = scheduler.schedule()
    assert (plan(step), step.plan.num_prefill_tokens) == ("a:1", 1)


def test_all_that_is_recomputed_is_prefill():
    scheduler = make_scheduler(num_usable_pages=8, page_size=2, max_num_batched_tokens=4)
    first = add(scheduler, "a", 3, max_tokens=12)
    seq = add(scheduler, "b", 3, max_tokens=12)
    while not scheduler.num_preemptions:
        read(scheduler.schedule())
    scheduler.finish(first, "stop")
    known = len(seq.token_ids)
    assert known > 3 + 4  # so that the second chunk starts after the prompt and has two tokens
    steps = [scheduler.schedule(), scheduler.schedule()]
    assert [plan(step) for step in steps] == ["b:4", f"b:{known - 4}"]
    assert [step.plan.num_prefill_tokens for step in steps] == [4, known - 4]


def test_the_samples_of_a_prompt_fork_when_it_has_been_computed():
    scheduler = make_scheduler(max_num_batched_tokens=4)
    seq = add(scheduler, "a", 6, n=3)
    add(scheduler, "b", 2)
    assert plan(scheduler.schedule()) == "a:4"
    assert len(seq.request.sequences) == 1
    step = scheduler.schedule()
    assert plan(step) == "a:2 b:2"
    assert sampled(step) == ["a", "a1", "a2", "b"]
    assert list(step.plan.samples.rows) == [0, 0, 0, 1]
    # Two pages for a, shared by three, and one for b.
    assert scheduler.table.pool.num_used_pages == 3
    assert scheduler.table.pool.num_shared_pages == 2
    step = scheduler.schedule()
    assert plan(step) == "a:1 a1:1 a2:1 b:1"
    assert sources(step) == [0, 1, 2, 3]
    # The last owner of the partial page writes in place.
    (partial,) = {src for src, _ in step.plan.copies}
    assert len(step.plan.copies) == 2
    assert scheduler.table.pages(seq.request.sequences[2].table_id)[1] == partial


def test_forks_to_come_hold_their_places():
    scheduler = make_scheduler(max_num_batched_tokens=4, max_num_seqs=4)
    first = add(scheduler, "a", 5, n=3)
    add(scheduler, "b", 1)
    add(scheduler, "c", 1)
    assert plan(scheduler.schedule()) == "a:4"
    # One token ends a's prompt and b fits; c would be the fifth.
    assert plan(scheduler.schedule()) == "a:1 b:1"
    assert (scheduler.num_running, scheduler.num_waiting) == (4, 1)
    scheduler.finish(first, "stop")
    assert plan(scheduler.schedule()) == "a1:1 a2:1 b:1 c:1"


def test_a_request_ended_before_its_forks_gives_their_places_back():
    scheduler = make_scheduler(max_num_batched_tokens=4, max_num_seqs=3)
    seq = add(scheduler, "a", 9, n=3)
    scheduler.schedule()
    scheduler.finish(seq, "abort")
    assert scheduler.table.pool.num_used_pages == 0
    add(scheduler, "b", 1, n=2)
    add(scheduler, "c", 1)
    assert plan(scheduler.schedule()) == "b:1 c:1"
    assert scheduler.num_running == 3


def test_a_request_that_does_not_fit_holds_up_those_behind_it():
    scheduler = make_scheduler(num_usable_pages=4)
    add(scheduler, "a", 4)
    add(scheduler, "b", 13, max_tokens=2)
    add(scheduler, "c", 1)
    assert plan(scheduler.schedule()) == "a:4"
    assert scheduler.num_waiting == 2


def test_a_little_of_a_large_pool_is_left_for_the_running_to_grow():
    scheduler = make_scheduler(
        num_usable_pages=200, page_size=1, max_num_batched_tokens=500, max_model_len=200
    )
    add(scheduler, "a", 10)
    add(scheduler, "b", 189, max_tokens=5)
    assert plan(scheduler.schedule()) == "a:10"  # 1 of 200 pages would be left

    scheduler = make_scheduler(
        num_usable_pages=200, page_size=1, max_num_batched_tokens=500, max_model_len=200
    )
    add(scheduler, "a", 10)
    add(scheduler, "b", 188, max_tokens=5)
    assert plan(scheduler.schedule()) == "a:10 b:188"  # 2 are

    scheduler = make_scheduler(
        num_usable_pages=200, page_size=1, max_num_batched_tokens=500, max_model_len=201
    )
    add(scheduler, "b", 200, max_tokens=1)
    assert plan(scheduler.schedule()) == "b:200"  # nobody runs who could grow


def test_preemption_takes_the_youngest_and_logs_it(caplog):
    scheduler = make_scheduler(num_usable_pages=4, page_size=2)
    first = add(scheduler, "a", 3, max_tokens=6)
    second = add(scheduler, "b", 3, max_tokens=6)
    for _ in range(2):  # positions 0 to 3 fill the two pages of each
        step = scheduler.schedule()
        read(step)
    assert plan(step) == "a:1 b:1"
    with caplog.at_level("INFO", logger="jpaged.host.scheduler"):
        step = scheduler.schedule()
    assert plan(step) == "a:1"
    assert [record.getMessage() for record in caplog.records] == [
        "preempted request 'b' (sequence 0), as request 'a' needs pages: 2 pages to compute again "
        "(4 tokens)"
    ]
    assert scheduler.num_preemptions == 1
    assert (first.status, second.status) == (Status.RUNNING, Status.WAITING)
    assert (second.table_id, second.num_computed_tokens) == (None, 0)
    # Its five known tokens need three pages, and one is free.
    read(step)
    assert plan(scheduler.schedule()) == "a:1"
    scheduler.finish(first, "stop")
    step = scheduler.schedule()
    assert plan(step) == "b:5"
    # Four of them it had computed before, the fifth it had only sampled.
    assert (step.plan.num_prefill_tokens, step.plan.num_recomputed_tokens) == (5, 4)
    assert sources(step) == [-1]
    read(step)
    assert scheduler.schedule().plan.num_recomputed_tokens == 0


def test_a_preempted_sequence_goes_before_those_that_have_not_started():
    scheduler = make_scheduler(num_usable_pages=4, page_size=2)
    first = add(scheduler, "a", 3, max_tokens=6)
    add(scheduler, "b", 3, max_tokens=6)
    add(scheduler, "c", 1, max_tokens=2)
    for _ in range(3):
        read(scheduler.schedule())
    assert scheduler.num_preemptions == 1
    assert scheduler.num_waiting == 2
    scheduler.finish(first, "stop")
    assert plan(scheduler.schedule()) == "b:5 c:1"


def test_lower_priorities_go_first_and_equal_ones_as_they_came():
    scheduler = make_scheduler(max_num_seqs=2)
    for request_id, priority in (("a", 0), ("b", 3), ("c", -2), ("d", 3), ("e", 0), ("f", -2)):
        add(scheduler, request_id, 1, max_tokens=1, priority=priority)
    assert [plan(scheduler.schedule()) for _ in range(3)] == ["c:1 f:1", "a:1 e:1", "b:1 d:1"]


def test_the_first_in_order_takes_the_tokens_of_a_step_first():
    scheduler = make_scheduler(max_num_batched_tokens=4)
    add(scheduler, "a", 6)
    add(scheduler, "b", 9)
    assert [plan(scheduler.schedule()) for _ in range(2)] == ["a:4", "a:2 b:2"]
    add(scheduler, "urgent", 9, priority=-1)
    assert plan(scheduler.schedule()) == "a:1 b:3"  # those that run go on
    scheduler.schedule()
    step = scheduler.schedule()
    assert plan(step) == "a:1 b:1 urgent:2"
    assert plan(scheduler.schedule()) == "urgent:4"
    assert plan(scheduler.schedule()) == "urgent:3 a:1"


def test_preemption_takes_a_later_priority_before_a_later_arrival():
    scheduler = make_scheduler(num_usable_pages=6, page_size=2)
    later = add(scheduler, "later", 3, max_tokens=6, priority=1)
    first = add(scheduler, "first", 3, max_tokens=6, priority=-1)
    second = add(scheduler, "second", 3, max_tokens=6)
    for _ in range(2):
        read(scheduler.schedule())
    assert plan(scheduler.schedule()) == "first:1 second:1"
    assert [seq.status for seq in (later, first, second)] == [
        Status.WAITING, Status.RUNNING, Status.RUNNING,
    ]  # fmt: skip


def test_an_urgent_request_waits_for_beams_that_others_wait_for():
    """Of two beams one runs and the other has no page: who came between would have them stuck."""
    scheduler, queues = make_scheduler(), Queues(4)
    first = add(scheduler, "beams", 5)
    second = first.request.fork_sequence(first)
    first.request.growth = types.SimpleNamespace(num_rows=2, reserved_places=2)
    urgent = add(scheduler, "urgent", 1, priority=-9)
    queues.start([first])
    queues.queue(second)
    queues.queue(urgent)
    assert list(queues.waiting) == [second, urgent]
    queues.check_invariants()
    # When both of them wait, nobody waits for them any more.
    queues.stop([first])
    assert list(queues.waiting) == [urgent, first, second]
    queues.check_invariants()


def test_what_is_swapped_in_takes_no_page_that_a_copy_of_the_step_reads():
    scheduler = make_scheduler(6, prefix_cache=True, preemption="swap", num_host_pages=3)
    for first in (0, 100):
        seq = add(scheduler, "before", 4, max_tokens=1, first=first)
        read(scheduler.schedule())
        scheduler.finish(seq, "length")
    swapped = add(scheduler, "swapped", 11, first=200)
    read(scheduler.schedule())
    scheduler._preempt([swapped], swapped.request, StepBuilder())
    for request_id, first in (("a", 0), ("b", 100)):
        add(scheduler, request_id, 4, first=first)
    scheduler._queues.waiting.rotate(-1)
    # Both compute their last token again, in copies of the cached pages, which are free again then:
    # with the two that are left there are pages enough, but the device copies last.
    step = scheduler.schedule()
    assert plan(step) == "a:1 b:1"
    assert len(step.plan.copies) == 2 and not step.plan.swap_ins
    assert scheduler.table.pool.num_free_pages == 4
    read(step)
    for seq in step.samples:
        scheduler.finish(seq, "stop")
    step = scheduler.schedule()
    assert plan(step) == "swapped:1" and len(step.plan.swap_ins) == 3
    scheduler.check_invariants()


def test_the_pages_of_a_sequence_that_ends_by_length_are_free_one_step_later():
    scheduler = make_scheduler(num_usable_pages=1, page_size=4)
    first = add(scheduler, "a", 3, max_tokens=2)
    second = add(scheduler, "b", 3, max_tokens=2)
    assert plan(scheduler.schedule()) == "a:3"
    assert plan(scheduler.schedule()) == "a:1"
    assert (first.status, scheduler.num_running) == (Status.DRAINING, 0)
    assert scheduler.table.pool.num_free_pages == 0
    # Before the host has read any of its tokens.
    assert plan(scheduler.schedule()) == "b:3"
    assert first.num_inflight_tokens == 2
    assert second.status is Status.RUNNING
    scheduler.finish(first, "length")
    assert (first.status, first.finish_reason) == (Status.FINISHED, "length")
    assert scheduler.table.pool.num_used_pages == 1
    scheduler.table.check_invariants()


def test_max_reserves_all_pages_when_it_admits():
    scheduler = make_scheduler(num_usable_pages=7, max_model_len=10, reservation="max")
    first = add(scheduler, "a", 2, max_tokens=4)
    second = add(scheduler, "b", 2, max_tokens=4)
    third = add(scheduler, "c", 2, max_tokens=4)
    assert plan(scheduler.schedule()) == "a:2 b:2"
    held = [scheduler.table.pages(seq.table_id) for seq in (first, second)]
    assert [len(pages) for pages in held] == [3, 3]
    assert third.status is Status.WAITING
    for _ in range(3):
        step = scheduler.schedule()
        assert plan(step) == "a:1 b:1"
        assert step.plan.copies == ()
        assert [scheduler.table.pages(seq.table_id) for seq in (first, second)] == held
        read(step)
    assert plan(scheduler.schedule()) == "c:2"
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize("when", ["waiting", "running", "draining", "drained", "preempted"])
def test_finish_frees_the_pages_of_a_sequence_in_every_status(when):
    scheduler = make_scheduler(num_usable_pages=4, page_size=2)
    add(scheduler, "a", 3, max_tokens=6)
    seq = add(scheduler, "b", 3, max_tokens=2 if when.startswith("drain") else 6)
    steps = {"waiting": 0, "running": 1, "draining": 2, "drained": 3, "preempted": 3}[when]
    for _ in range(steps):
        read(scheduler.schedule())
    status = {"waiting": Status.WAITING, "preempted": Status.WAITING, "running": Status.RUNNING}
    assert seq.status is status.get(when, Status.DRAINING)
    holds = when in ("running", "draining")
    assert (seq.table_id is not None) == holds
    used = scheduler.table.pool.num_used_pages
    scheduler.finish(seq, "abort")
    assert (seq.status, seq.finish_reason, seq.table_id) == (Status.FINISHED, "abort", None)
    assert scheduler.table.pool.num_used_pages == used - 2 * holds
    assert scheduler.num_waiting + scheduler.num_running == 1
    scheduler.table.check_invariants()
    # A second time does nothing.
    scheduler.finish(seq, "length")
    assert seq.finish_reason == "abort"
    assert scheduler.table.pool.num_used_pages == used - 2 * holds
    # The other one goes on alone.
    step = scheduler.schedule()
    assert [key[0] for key in step.plan.rows.keys] == ["a"]
    scheduler.table.check_invariants()


def test_finishing_one_sample_leaves_the_others_their_pages():
    scheduler = make_scheduler()
    first = add(scheduler, "a", 6, n=2)
    scheduler.schedule()
    second = first.request.sequences[1]
    pages = scheduler.table.pages(second.table_id)
    scheduler.finish(first, "stop")
    assert scheduler.table.pages(second.table_id) == pages
    assert scheduler.table.pool.num_used_pages == 2
    step = scheduler.schedule()
    assert (plan(step), step.plan.copies) == ("a1:1", ())


def test_a_request_is_finished_when_all_its_samples_are():
    scheduler = make_scheduler()
    first = add(scheduler, "a", 3, n=2)
    request = first.request
    assert not request.finished
    scheduler.schedule()
    scheduler.finish(first, "stop")
    assert not request.finished
    scheduler.finish(request.sequences[1], "stop")
    assert request.finished


def test_a_request_whose_samples_have_not_forked_yet_is_not_finished():
    scheduler = make_scheduler()
    seq = add(scheduler, "a", 3, n=2)
    scheduler.finish(seq, "abort")
    assert not seq.request.finished


def test_an_aborted_waiting_sequence_is_never_scheduled():
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, "a", 3)
    gone = add(scheduler, "b", 3)
    add(scheduler, "c", 3)
    scheduler.schedule()
    assert scheduler.num_waiting == 2
    scheduler.finish(gone, "abort")
    assert scheduler.num_waiting == 1
    assert (gone.status, gone.finish_reason) == (Status.FINISHED, "abort")
    rows = [key[0] for _ in range(20) for key in scheduler.schedule().plan.rows.keys]
    assert set(rows) == {"a", "c"}


def test_more_samples_than_places_start_as_places_become_free():
    scheduler = make_scheduler(max_num_seqs=3)
    request = add(scheduler, "a", 5, n=7, max_tokens=2).request
    add(scheduler, "b", 2)
    step = scheduler.schedule()
    assert (plan(step), sampled(step)) == ("a:5", ["a", "a1", "a2"])
    assert plan(scheduler.schedule()) == "a:1 a1:1 a2:1"
    # The three are done. The next one finds the full page of the prompt, and forks the others.
    step = scheduler.schedule()
    assert (plan(step), sampled(step)) == ("a3:1", ["a3", "a4", "a5"])
    assert (step.plan.num_hit_tokens, step.plan.num_lookup_tokens) == (4, 5)
    assert plan(scheduler.schedule()) == "a3:1 a4:1 a5:1"
    assert len(request.sequences) == 7
    assert plan(scheduler.schedule()) == "a6:1 b:2"
    scheduler.check_invariants()


def test_a_fork_waits_behind_those_whose_request_runs():
    """Else it would stand between the samples of one request."""
    scheduler = make_scheduler(max_num_seqs=3, prefix_cache=True)
    parent = add(scheduler, "p", 3, max_tokens=3).request
    add(scheduler, "a", 2, n=4, max_tokens=9)
    read(scheduler.schedule())
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 1)
    child = add(make_scheduler(), "f", 3).request
    child.sequences[0].token_ids.append(0)
    scheduler.fork(parent, child)
    for _ in range(12):
        read(scheduler.schedule())
        scheduler.check_invariants()
    assert child.sequences[0].num_computed_tokens > 0


class TestForksTakeTheirTurn:
    """`Engine.fork` lets nobody overtake a request that waits."""

    def forked(self, scheduler, parent, name, **params):
        """Forks a running request. Returns: the sequence."""
        child = add(make_scheduler(), name, parent.num_prompt_tokens, **params).request
        child.sequences[0].continue_from(parent)
        scheduler.fork(parent.request, child)
        return child.sequences[0]

    def test_a_stream_of_forks_does_not_starve_who_came_before(self):
        """Two places: one's are forked as often as one is free, and an urgent request waits."""
        scheduler = make_scheduler(max_num_seqs=2, prefix_cache=True)
        parent, other = (add(scheduler, name, 3, max_tokens=20) for name in "pq")
        read(scheduler.schedule())
        urgent = add(scheduler, "urgent", 2, max_tokens=3, priority=-1)
        read(scheduler.schedule())
        assert urgent.status is Status.WAITING
        for number in range(3):
            scheduler.finish(other, "stop")
            other = self.forked(scheduler, parent, f"f{number}", max_tokens=20)
            step = scheduler.schedule()
            scheduler.check_invariants()
            read(step)
            assert urgent.status is not Status.WAITING
            assert other.status is Status.WAITING
        assert [key[0] for key in step.plan.rows.keys] == ["urgent", "p"]
        # It has ended: the fork starts, and finds the page of its parent that is full.
        assert plan(scheduler.schedule()) == "p:1 f2:3"

    def test_nor_where_pages_lack(self):
        scheduler = make_scheduler(num_usable_pages=4, max_num_seqs=8)
        parent = add(scheduler, "p", 3, max_tokens=6)
        read(scheduler.schedule())
        add(scheduler, "large", 13, max_tokens=1, priority=-1)
        forks = [self.forked(scheduler, parent, f"f{i}", max_tokens=6) for i in range(3)]
        while scheduler.num_running:
            assert {fork.status for fork in forks} == {Status.WAITING}
            step = scheduler.schedule()
            read(step)
        assert plan(step) == "p:1"
        assert plan(scheduler.schedule()) == "large:13"
        assert scheduler.num_preemptions == 0

    @pytest.mark.parametrize(("priority", "starts"), [(0, True), (1, False)])
    def test_a_fork_is_as_old_as_what_it_was_forked_from(self, priority, starts):
        scheduler = make_scheduler(num_usable_pages=4)
        parent = add(scheduler, "p", 3, max_tokens=6)
        add(scheduler, "large", 13, max_tokens=1)
        read(scheduler.schedule())
        fork = self.forked(scheduler, parent, "f", max_tokens=6, priority=priority)
        assert (fork.status is Status.RUNNING) == starts
        assert plan(scheduler.schedule()) == ("p:1 f:1" if starts else "p:1")

    def test_samples_fork_whoever_waits(self):
        """A request that runs has had its turn, with all its samples."""
        scheduler = make_scheduler(max_num_batched_tokens=3, max_num_seqs=3)
        add(scheduler, "a", 5, n=3)
        scheduler.schedule()
        urgent = add(scheduler, "urgent", 2, priority=-1)
        assert sampled(scheduler.schedule()) == ["a", "a1", "a2"]
        assert urgent.status is Status.WAITING
