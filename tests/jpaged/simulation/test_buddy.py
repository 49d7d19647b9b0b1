# SPDX-License-Identifier: Apache-2.0
import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from jpaged.simulation.buddy import BuddyAllocator


class TestBuddyAllocator:
    def test_halves_blocks_and_merges_them(self):
        buddy = BuddyAllocator(16)
        assert buddy.free_blocks == [(0, 16)]
        assert (buddy.allocate(3), buddy.allocate(4), buddy.allocate(1)) == (0, 4, 8)
        assert [buddy.block_size(start) for start in (0, 4, 8)] == [4, 4, 1]
        assert buddy.free_blocks == [(9, 1), (10, 2), (12, 4)]
        assert buddy.num_free_slots == 7
        # Seven slots are free, but not in a row.
        assert buddy.allocate(5) is None
        buddy.free(0)
        assert buddy.free_blocks == [(0, 4), (9, 1), (10, 2), (12, 4)]
        buddy.free(8)
        # 8 merges with 9, then 10, then 12; not with 0, whose buddy is in use.
        assert buddy.free_blocks == [(0, 4), (8, 8)]
        assert buddy.allocate(8) == 8
        buddy.free(4)
        assert buddy.free_blocks == [(0, 8)]

    def test_takes_the_smallest_block_that_serves(self):
        buddy = BuddyAllocator(16)
        for start in range(0, 16, 2):
            assert buddy.allocate(2) == start
        for start in (0, 2, 6, 12):
            buddy.free(start)
        assert buddy.free_blocks == [(0, 4), (6, 2), (12, 2)]
        assert buddy.allocate(1) == 6

    def test_other_sizes_are_several_blocks(self):
        buddy = BuddyAllocator(15_728)
        assert [size for _, size in buddy.free_blocks] == [8192, 4096, 2048, 1024, 256, 64, 32, 16]
        starts = [buddy.allocate(2048) for _ in range(8)]
        assert starts[:7] == [14_336 - 2048, *range(8192, 12_288, 2048), *range(0, 8192, 2048)]
        assert starts[7] is None
        assert buddy.largest_block == 8192

    def test_misuse_is_refused(self):
        buddy = BuddyAllocator(8)
        assert buddy.allocate(9) is None
        with pytest.raises(ValueError, match="num_slots=0 must be at least 1"):
            buddy.allocate(0)
        with pytest.raises(ValueError, match="num_slots=0 must be at least 1"):
            BuddyAllocator(0)
        buddy.free(buddy.allocate(8))
        with pytest.raises(KeyError):
            buddy.free(0)


class BuddyMachine(stateful.RuleBasedStateMachine):
    """Against a list of who has which slots."""

    @stateful.initialize(num_slots=st.integers(1, 200))
    def start(self, num_slots):
        self.buddy = BuddyAllocator(num_slots)
        self.first = self.buddy.free_blocks
        self.blocks = {}

    @stateful.rule(count=st.integers(1, 70))
    def allocate(self, count):
        before = self.buddy.free_blocks
        size = next(1 << order for order in range(9) if 1 << order >= count)
        start = self.buddy.allocate(count)
        if start is None:
            assert all(free < size for _, free in before)
            return
        (outer,) = [(s, free) for s, free in before if s <= start < s + free]
        assert outer[1] == min(free for _, free in before if free >= size)
        assert start + size <= sum(outer)
        assert self.buddy.block_size(start) == size
        self.blocks[start] = size

    @stateful.precondition(lambda self: self.blocks)
    @stateful.rule(data=st.data())
    def free(self, data):
        start = data.draw(st.sampled_from(sorted(self.blocks)))
        self.buddy.free(start)
        del self.blocks[start]

    @stateful.invariant()
    def blocks_tile_the_slots(self):
        free = self.buddy.free_blocks
        end = 0
        for start, size in sorted([*free, *self.blocks.items()]):
            assert start == end, "slots overlap or are lost"
            assert start % size == 0
            end = start + size
        assert end == self.buddy.num_slots
        assert self.buddy.num_free_slots == sum(size for _, size in free)
        assert not any((start ^ size, size) in free for start, size in free), "buddies are apart"

    def teardown(self):
        if hasattr(self, "blocks"):
            for start in sorted(self.blocks, key=lambda s: s % 7):
                self.buddy.free(start)
            assert self.buddy.free_blocks == self.first


TestBuddyMachine = BuddyMachine.TestCase
TestBuddyMachine.settings = hypothesis.settings(max_examples=60, deadline=None)
