# SPDX-License-Identifier: Apache-2.0
"""What serves without a device, with pages and without."""

import hypothesis
import pytest
from hypothesis import strategies as st

from jpaged.host.admission import RequestTooLongError, SchedulerConfig
from jpaged.simulation.buddy import BuddyAllocator
from jpaged.simulation.contiguous import CONTIGUOUS_POLICIES, ContiguousSimulator, reserved_slots
from jpaged.simulation.costs import Memory, StepWork
from jpaged.simulation.paged import PagedSimulator
from jpaged.simulation.workload import Item


def config(**changes):
    return SchedulerConfig(
        **{"max_num_batched_tokens": 64, "max_num_seqs": 8, "max_model_len": 16, **changes}
    )


def item(num_prompt, num_output, **options):
    return Item(list(range(num_prompt)), num_output, **options)


class TestReservedSlots:
    def test_of_the_papers_example(self):
        # 25 output tokens are given room for 32.
        assert reserved_slots("contiguous-pow2", 10, 25, 2048) == 42
        assert reserved_slots("contiguous-pow2", 10, 32, 2048) == 42
        assert reserved_slots("contiguous-pow2", 10, 33, 2048) == 74
        assert reserved_slots("contiguous-pow2", 10, 1, 2048) == 11
        assert reserved_slots("contiguous-pow2", 1000, 1025, 2048) == 2048
        assert reserved_slots("contiguous-oracle", 10, 25, 2048) == 35
        assert reserved_slots("contiguous-max", 10, 25, 2048) == 2048

    def test_other_policies_are_refused(self):
        with pytest.raises(ValueError, match="'paged' must be one of contiguous-max, "):
            ContiguousSimulator("paged", config(), 16)


class TestContiguousSimulator:
    def test_by_hand(self):
        sim = ContiguousSimulator("contiguous-oracle", config(), 16)
        for num_prompt, num_output in ((3, 2), (5, 4), (2, 1)):
            sim.add(item(num_prompt, num_output))
        # The first has 5 slots in a block of 8. The second needs 16; the third waits behind it.
        assert sim.step() == StepWork(1, 3, 3, 0, Memory(3, 2, 0, 3 + 8, 0))
        assert sim.step() == StepWork(1, 1, 4, 0, Memory(4, 1, 0, 3 + 8, 0), (), (0,))
        assert sim.num_waiting == 2
        assert sim.step() == StepWork(1, 5, 5, 0, Memory(5, 4, 0, 7, 0), (0,))
        works = [sim.step() for _ in range(3)]
        assert [(work.num_tokens, work.started) for work in works] == [(1, (1,)), (1, ()), (1, ())]
        # Nobody waits any more: what is free is idle.
        assert sim.step() == StepWork(1, 2, 2, 0, Memory(2, 1, 0, 1, 12), (1,))
        assert sim.has_unfinished_requests
        assert sim.step() == StepWork(0, 0, 0, 0, Memory(0, 0, 0, 0, 16), (2,), (2,))
        assert not sim.has_unfinished_requests

    def test_what_is_never_filled_is_internal(self):
        sim = ContiguousSimulator("contiguous-max", config(), 32)
        sim.add(item(2, 3))
        assert sim.step().memory == Memory(2, 3, 11, 0, 16)
        sim = ContiguousSimulator("contiguous-pow2", config(), 32)
        sim.add(item(2, 3))
        assert sim.step().memory == Memory(2, 3, 1, 2, 24)

    def test_budgets_hold(self):
        budgets = config(max_num_batched_tokens=6, max_num_seqs=2)
        sim = ContiguousSimulator("contiguous-oracle", budgets, 256)
        for _ in range(3):
            sim.add(item(4, 4))
        assert [sim.step().num_tokens for _ in range(4)] == [4, 1 + 4, 2, 2]
        assert sim.num_waiting == 1

    @pytest.mark.parametrize(
        ("own", "message"),
        [
            (item(10, 7), "request 0: 17 tokens, max_model_len is 16"),
            (item(9, 1), "request 0: 9 prompt tokens, max_num_batched_tokens is 8"),
            (item(4, 5), "request 0: 9 slots to reserve, the largest block is 8"),
        ],
    )
    def test_what_never_fits_is_refused(self, own, message):
        sim = ContiguousSimulator("contiguous-oracle", config(max_num_batched_tokens=8), 15)
        with pytest.raises(RequestTooLongError, match=message):
            sim.add(own)

    def test_samples_are_refused(self):
        with pytest.raises(ValueError, match="num_samples=2: contiguous-max cannot share"):
            ContiguousSimulator("contiguous-max", config(), 32).add(item(1, 1, num_samples=2))


class TestPagedSimulator:
    def test_by_hand(self):
        sim = PagedSimulator(config(), num_pages=6, page_size=4)
        sim.add(item(5, 3))
        assert sim.step() == StepWork(1, 5, 5, 0, Memory(5, 0, 3, 0, 12))
        assert sim.step() == StepWork(1, 1, 6, 0, Memory(6, 0, 2, 0, 12), (), (0,))
        assert sim.step() == StepWork(1, 1, 7, 0, Memory(7, 0, 1, 0, 12))
        last = sim.step()
        assert (last.num_seqs, last.finished) == (0, (0,))
        assert not sim.has_unfinished_requests

    def test_free_pages_count_as_external_while_a_request_waits(self):
        sim = PagedSimulator(config(prefix_cache=False), num_pages=4, page_size=4)
        sim.add(item(5, 3))
        sim.add(item(5, 3))
        assert sim.step().memory == Memory(5, 0, 3, 4, 0)

    def test_samples_share_their_prompt_and_nothing_else(self):
        sim = PagedSimulator(config(prefix_cache=False), num_pages=17, page_size=4)
        sim.add(item(5, 9, num_samples=2))
        works = []
        while sim.has_unfinished_requests:
            works.append(sim.step())
        assert [work.num_seqs for work in works] == [1, *[2] * 8, 0]
        # A prompt of 5 tokens fills a page. Then each has 13 tokens in 4 pages, 3 of them its own.
        assert sim.totals.peak_used_pages == 1 + 2 * 3
        # Steps 1 to 9 have 2 pages of 4 references, then 3 of 4, three steps; 5 of 6, four; 7 of 8.
        used = [2, *[3] * 3, *[5] * 4, 7]
        references = [4, *[4] * 3, *[6] * 4, 8]
        assert sim.stats().mean_saving == pytest.approx(1 - sum(used) / sum(references))
        assert works[-1].finished == (0,)

    def test_swapped_pages_are_reported(self):
        sim = PagedSimulator(config(preemption="swap", num_host_pages=9), num_pages=5, page_size=2)
        for _ in range(2):
            sim.add(item(2, 6))
        works = []
        while sim.has_unfinished_requests:
            works.append(sim.step())
        assert sim.num_preemptions == 1
        # One that has a page or two goes out, and comes back.
        swapped = [work.num_swapped_pages for work in works if work.num_swapped_pages]
        assert len(swapped) == 2 and swapped[0] == swapped[1] > 0
        assert sorted(number for work in works for number in work.finished) == [0, 1]


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    policy=st.sampled_from((*CONTIGUOUS_POLICIES, "paged")),
    lengths=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), max_size=12),
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(8, 20),
)
def test_everything_ends_and_every_slot_is_accounted_for(
    policy, lengths, max_num_seqs, max_num_batched_tokens
):
    budgets = config(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    if policy == "paged":
        sim = PagedSimulator(budgets, num_pages=11, page_size=4)
    else:
        sim = ContiguousSimulator(policy, budgets, 40)
    for num_prompt, num_output in lengths:
        sim.add(item(num_prompt, num_output))
    ended = []
    while sim.has_unfinished_requests:
        work = sim.step()
        memory = work.memory
        assert memory.total == 40
        parts = memory.live, memory.reserved, memory.internal, memory.external, memory.idle
        assert min(parts) >= 0
        assert work.num_seqs <= max_num_seqs
        assert work.num_tokens <= max_num_batched_tokens
        ended += work.finished
        if policy != "paged":
            assert work.num_kv_tokens == memory.live
    assert sorted(ended) == list(range(len(lengths)))
    if policy != "paged":
        # Who comes first starts first.
        assert sim.allocator.free_blocks == BuddyAllocator(40).free_blocks
