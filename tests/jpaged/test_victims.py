# SPDX-License-Identifier: Apache-2.0
"""Who loses pages: the choice by hand, and crowds in which it matters."""

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from jpaged.host.groups import ONE_GROUP, GroupKind
from jpaged.host.preemption import PreemptionCosts
from jpaged.host.sequence import Status
from jpaged.host.victims import Loss, choose_victim, loss_of, victims_of
from tests.jpaged.expected import Job
from tests.jpaged.schedules import add, make_scheduler, plan, read
from tests.jpaged.simulated_device import Simulation

FULL, WINDOW = GroupKind(None, 1), GroupKind(4, 2)


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ([Loss(0, 4, 4)], 0),
        # As many pages for each page of tokens: the one that came last.
        ([Loss(0, 1, 1), Loss(0, 9, 9), Loss(0, 3, 3)], 2),
        # 9 pages for 3 against 14 for 6 and 11 for 5.
        ([Loss(0, 14, 6), Loss(0, 9, 3), Loss(0, 11, 5)], 1),
        ([Loss(0, 9, 3), Loss(0, 14, 6), Loss(0, 6, 2)], 2),
        # 1/3 and 2/6 are the same, which floats of both are here, and 100/300 too.
        ([Loss(0, 2, 6), Loss(0, 1, 3), Loss(0, 100, 300)], 2),
        # Priority first, however dear.
        ([Loss(0, 9, 1), Loss(1, 1, 9), Loss(1, 2, 9), Loss(1, 1, 8)], 2),
        ([Loss(-5, 9, 1), Loss(-2, 1, 9)], 1),
        # Who frees nothing is no help, unless nobody is.
        ([Loss(0, 1, 8), Loss(0, 0, 1)], 0),
        ([Loss(0, 0, 1), Loss(0, 0, 1)], 1),
        ([Loss(0, 3, 1), Loss(1, 0, 1)], 1),
    ],
)
def test_the_choice_by_hand(losses, chosen):
    assert choose_victim(losses) == chosen


def losses_of(scheduler):
    groups = {}
    for seq in scheduler.holders():
        groups.setdefault(seq.key[0], []).append(seq)
    return {name: loss_of(scheduler.table, group)[1:] for name, group in groups.items()}


class TestLosses:
    """Pages of 4 tokens."""

    def test_alone_a_sequence_frees_what_it_loses(self):
        scheduler = make_scheduler()
        add(scheduler, "a", 9)
        add(scheduler, "b", 4)
        scheduler.schedule()
        assert losses_of(scheduler) == {"a": (3, 3), "b": (1, 1)}

    def test_what_others_hold_is_neither_freed_nor_lost(self):
        scheduler = make_scheduler(prefix_cache=True)
        add(scheduler, "a", 9)
        add(scheduler, "b", 12)
        add(scheduler, "c", 8)
        scheduler.schedule()
        # Of c's eight tokens the last is computed in a page of its own, as a writes the other.
        assert losses_of(scheduler) == {"a": (1, 1), "b": (1, 1), "c": (1, 1)}

    def test_samples_count_together(self):
        scheduler = make_scheduler()
        add(scheduler, "a", 6, n=3)
        for _ in range(2):
            read(scheduler.schedule())
        # The first page is all three's, and each has one that is not full.
        assert losses_of(scheduler) == {"a": (4, 4)}
        (first, *_) = scheduler.holders()
        assert loss_of(scheduler.table, [first])[1:] == (1, 1)

    def test_windows_make_long_ones_dear(self):
        scheduler = make_scheduler(64, kinds=(FULL, WINDOW), max_num_batched_tokens=32)
        add(scheduler, "long", 20)
        add(scheduler, "short", 5)
        for _ in range(2):
            read(scheduler.schedule())
        # 21 and 6 tokens: six and two pages; of two groups those that the next token sees, from
        # positions 17 and 2 on: two and two.
        assert losses_of(scheduler) == {"long": (6 + 2 * 2, 6), "short": (2 + 2 * 2, 2)}

    def test_without_a_layer_that_sees_everything_all_is_lost(self):
        scheduler = make_scheduler(64, kinds=(WINDOW,), max_num_batched_tokens=32)
        add(scheduler, "a", 20)
        for _ in range(2):
            read(scheduler.schedule())
        assert losses_of(scheduler) == {"a": (2 * 2, 6)}


def test_a_fork_without_pages_of_its_own_is_no_victim():
    """It would free nothing, and the next one would lose its pages as well."""
    scheduler = make_scheduler()
    for name, length in (("a", 1), ("b", 4), ("parent", 4), ("fork", 4)):
        add(scheduler, name, length)
    scheduler.schedule()
    seqs = {seq.key[0]: seq for seq in scheduler.holders()}
    scheduler.table.free(seqs["fork"].table_id)
    seqs["fork"].table_id = scheduler.table.fork(seqs["parent"].table_id)
    (victim,) = victims_of(scheduler._queues, scheduler.table, 0)
    assert victim is seqs["b"]


def test_a_short_one_loses_its_pages_before_a_long_one_that_came_later():
    """With windows: all free the same of these, and b has fewest tokens to compute again."""
    scheduler = make_scheduler(
        29, kinds=(FULL, WINDOW), max_num_batched_tokens=40, max_model_len=40
    )
    a = add(scheduler, "a", 12, max_tokens=25)
    b = add(scheduler, "b", 2, max_tokens=25)
    c = add(scheduler, "c", 19, max_tokens=18)
    order = []
    scheduler.on_preempt = lambda victims, *_: order.append(victims[0].key[0])
    while not order:
        step = scheduler.schedule()
        read(step)
        scheduler.check_invariants()
    assert order == ["b"]
    assert [seq.status for seq in (a, b, c)] == [Status.RUNNING, Status.WAITING, Status.RUNNING]
    assert plan(step) == "a:1 c:1"
    # It comes back before c.
    scheduler.finish(a, "stop")
    assert plan(scheduler.schedule()) == f"c:1 b:{b.num_known_tokens}"
    assert plan(scheduler.schedule()) == "b:1 c:1"


@pytest.mark.parametrize("n", [1, 2])
def test_nobody_is_preempted_for_what_a_window_has_left_behind(n):
    """What is below the window of one that comes later is there before it is that one's turn."""
    scheduler = make_scheduler(2 + n, kinds=(GroupKind(4, 1),))
    first = add(scheduler, "a", 4, max_tokens=2, n=n)
    last = add(scheduler, "b", 3 + 4 * n, max_tokens=2)
    step = scheduler.schedule()
    assert plan(step) == f"a:4 b:{3 + 4 * n}"
    assert scheduler.table.pool.num_free_pages == 0
    read(step)
    behind = scheduler.table.pages(last.table_id)[:n]
    # The next token of b sees its last page, which it fills; each sample of a needs a new one.
    step = scheduler.schedule()
    assert plan(step) == ("a:1 b:1" if n == 1 else "a:1 a1:1 b:1")
    taken = [scheduler.table.pages(seq.table_id)[1] for seq in first.request.sequences]
    assert sorted(taken) == sorted(behind)
    assert (step.plan.num_preemptions, scheduler.num_preemptions) == (0, 0)
    scheduler.check_invariants()


@st.composite
def crowds(draw):
    """Many requests of one sequence or two, in a pool that holds few of them."""
    page_size = draw(st.integers(1, 3))
    kinds = draw(
        st.sampled_from([ONE_GROUP, (FULL, WINDOW), (GroupKind(3, 1),), (FULL, GroupKind(2, 5))])
    )
    width = sum(kind.num_groups for kind in kinds)
    jobs = [
        Job(
            prompt_len=draw(st.integers(1, 9)),
            max_tokens=draw(st.integers(1, 12)),
            n=draw(st.sampled_from([1, 1, 1, 2])),
            arrival=draw(st.integers(0, 6)),
            aborted_at=draw(st.none() | st.none() | st.integers(0, 20)),
            family=draw(st.integers(0, 2)),
            priority=draw(st.integers(-1, 1)),
        )
        for _ in range(draw(st.integers(3, 9)))
    ]
    longest = max(-(-(job.prompt_len + job.max_tokens - 1) // page_size) for job in jobs)
    return Simulation(
        jobs,
        num_usable_pages=(longest + draw(st.integers(0, 6))) * width,
        page_size=page_size,
        kinds=kinds,
        max_num_batched_tokens=draw(st.integers(8, 40)),
        max_num_seqs=8,
        max_model_len=24,
        prefix_cache=draw(st.booleans()),
        preemption=draw(st.sampled_from(["recompute", "swap", "auto"])),
        num_host_pages=draw(st.integers(0, 20)) * width,
        costs=PreemptionCosts(1.0, 0.5),
        decode_steps=draw(st.sampled_from([1, 4])),
    )


@settings(deadline=None, max_examples=150)
@given(crowds())
def test_all_end_with_the_tokens_that_are_theirs_whatever_the_priorities(simulation):
    simulation.run()
    event(f"preempted: {simulation.scheduler.num_preemptions > 0}")
    event(f"another than the last: {simulation.num_middle > 0}")
