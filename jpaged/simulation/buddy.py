# SPDX-License-Identifier: Apache-2.0
"""Contiguous memory, as it is handed out without pages."""


class BuddyAllocator:
    """Hands out blocks of slots whose sizes are powers of two, and merges them again.

    A block is halved until it is the smallest that holds what is asked for; a free block and its
    buddy, the other half of what it was halved from, become one again at once. Of blocks that
    serve, the smallest is taken, and the one at the lowest slot among equals.

    Invariants:
      - Blocks, free or not, do not overlap, and together are all slots.
      - A block begins at a multiple of its size. No two free blocks are buddies.

    Source: Knowlton 1965; the baselines of Kwon et al. 2023, section 6.1.
    """

    def __init__(self, num_slots: int):
        """Starts with the largest blocks that `num_slots`, at least 1, divide into, all free."""
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots} must be at least 1")
        self.num_slots = self.num_free_slots = num_slots
        self._free: list[set[int]] = [set() for _ in range(num_slots.bit_length())]
        self._orders: dict[int, int] = {}
        for order in range(num_slots.bit_length()):
            if num_slots >> order & 1:  # behind all larger ones
                self._free[order].add(num_slots >> order + 1 << order + 1)

    @property
    def largest_block(self) -> int:
        """Slots of the largest block that there could ever be."""
        return 1 << (self.num_slots.bit_length() - 1)

    @property
    def free_blocks(self) -> list[tuple[int, int]]:
        """`(start, size)` of the free blocks, in order."""
        return sorted((s, 1 << order) for order, free in enumerate(self._free) for s in free)

    def allocate(self, num_slots: int) -> int | None:
        """Takes a block of at least `num_slots` slots. Returns: its first; None if there is none.

        Raises:
          ValueError: if `num_slots` is below 1.
        """
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots} must be at least 1")
        wanted = (num_slots - 1).bit_length()
        for order in range(wanted, len(self._free)):
            if self._free[order]:
                break
        else:
            return None
        start = min(self._free[order])
        self._free[order].remove(start)
        while order > wanted:
            order -= 1
            self._free[order].add(start + (1 << order))
        self._orders[start] = wanted
        self.num_free_slots -= 1 << wanted
        return start

    def block_size(self, start: int) -> int:
        """Slots of the block in use that begins at `start`."""
        return 1 << self._orders[start]

    def free(self, start: int) -> None:
        """Gives a block back.

        Raises:
          KeyError: if no block in use begins at `start`.
        """
        order = self._orders.pop(start)
        self.num_free_slots += 1 << order
        # What `num_slots` was divided into has no buddy: what follows it is smaller.
        while (buddy := start ^ (1 << order)) in self._free[order]:
            self._free[order].remove(buddy)
            start = min(start, buddy)
            order += 1
        self._free[order].add(start)
