# SPDX-License-Identifier: Apache-2.0
"""What came before pages: a run of slots for each request, reserved whole when it starts."""

import collections

from jpaged.host.admission import RequestTooLongError, SchedulerConfig
from jpaged.simulation.buddy import BuddyAllocator
from jpaged.simulation.costs import Memory, StepWork
from jpaged.simulation.workload import Item

CONTIGUOUS_POLICIES = ("contiguous-max", "contiguous-pow2", "contiguous-oracle")


def reserved_slots(policy: str, num_prompt: int, num_output: int, max_model_len: int) -> int:
    """Slots that a policy reserves for a request (Kwon et al. 2023, section 6.1).

    Args:
      policy: "contiguous-max": as many as any request can have. "contiguous-pow2": the output,
        rounded up to a power of two, and the prompt. "contiguous-oracle": prompt and output, as if
        the output's length were known.
      num_prompt: tokens.
      num_output: tokens.
      max_model_len: tokens.
    """
    if policy not in CONTIGUOUS_POLICIES:
        raise ValueError(f"policy={policy!r} must be one of {', '.join(CONTIGUOUS_POLICIES)}")
    if policy == "contiguous-pow2":
        return min(num_prompt + (1 << (num_output - 1).bit_length()), max_model_len)
    return max_model_len if policy == "contiguous-max" else num_prompt + num_output


class _Reservation:
    """A request that runs, the block that it has, and how far it is."""

    __slots__ = ("block", "left", "live", "num_output", "num_slots", "number", "unused")

    def __init__(self, number: int, item: Item, block: int, num_slots: int):
        self.number, self.block, self.num_slots = number, block, num_slots
        self.live = len(item.prompt_token_ids)
        self.num_output = self.left = item.num_output_tokens
        self.unused = num_slots - self.live - self.left


class ContiguousSimulator:
    """Continuous batching, first come, first served, over one block of slots a request.

    A request starts when its whole prompt fits the step and the allocator has a block for it; later
    ones wait behind it. It has the block until it ends, so nothing is ever preempted.
    """

    page_size = 1
    num_preemptions = 0

    def __init__(self, policy: str, config: SchedulerConfig, num_slots: int):
        """Makes an empty memory.

        Args:
          policy: see `reserved_slots`.
          config: gives max_num_batched_tokens, max_num_seqs and max_model_len.
          num_slots: tokens that the memory holds.
        """
        reserved_slots(policy, 1, 1, config.max_model_len)  # refuses another policy now
        self.policy = policy
        self.config = config
        self.allocator = BuddyAllocator(num_slots)
        self._waiting: collections.deque[tuple[int, Item, int]] = collections.deque()
        self._running: list[_Reservation] = []
        self._num_added = 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting or self._running)

    def add(self, item: Item) -> None:
        """Queues a request.

        Raises:
          RequestTooLongError: if it could never run.
          ValueError: if it wants several samples, which would have to share memory.
        """
        config = self.config
        if item.num_samples > 1:
            raise ValueError(f"num_samples={item.num_samples}: {self.policy} cannot share a prompt")
        num_prompt, num_output = len(item.prompt_token_ids), item.num_output_tokens
        needed = reserved_slots(self.policy, num_prompt, num_output, config.max_model_len)
        for number, name, most in (
            (num_prompt + num_output, "tokens, max_model_len", config.max_model_len),
            (num_prompt, "prompt tokens, max_num_batched_tokens", config.max_num_batched_tokens),
            (needed, "slots to reserve, the largest block", self.allocator.largest_block),
        ):
            if number > most:
                which = f"request {self._num_added}: {number} {name} is {most}"
                raise RequestTooLongError(f"{which}; shorten it or raise that")
        self._waiting.append((self._num_added, item, needed))
        self._num_added += 1

    def step(self) -> StepWork:
        """Ends what the step before completed, starts what can start, and computes a step."""
        started = tuple(o.number for o in self._running if o.left == o.num_output - 1)
        ended = [own for own in self._running if not own.left]
        for own in ended:
            self.allocator.free(own.block)
        self._running = [own for own in self._running if own.left]
        for own in self._running:
            own.live += 1
        num_tokens = len(self._running)
        num_tokens += self._admit(self.config.max_num_batched_tokens - num_tokens)
        for own in self._running:
            own.left -= 1
        num_seqs, live = len(self._running), sum(own.live for own in self._running)
        finished = tuple(own.number for own in ended)
        return StepWork(num_seqs, num_tokens, live, 0, self._memory(live), finished, started)

    def _admit(self, budget: int) -> int:
        """Starts waiting requests. Returns: how many tokens their prompts have."""
        num_tokens = 0
        while self._waiting and len(self._running) < self.config.max_num_seqs:
            number, item, slots = self._waiting[0]
            if num_tokens + len(item.prompt_token_ids) > budget:
                break
            block = self.allocator.allocate(slots)
            if block is None:
                break
            self._waiting.popleft()
            self._running.append(_Reservation(number, item, block, slots))
            num_tokens += len(item.prompt_token_ids)
        return num_tokens

    def _memory(self, live: int) -> Memory:
        asked = sum(own.num_slots for own in self._running)
        unused = sum(own.unused for own in self._running)
        free = self.allocator.num_free_slots
        rounding = self.allocator.num_slots - free - asked
        return Memory(
            live=live,
            reserved=asked - unused - live,
            internal=unused,
            external=rounding + (free if self._waiting else 0),
            idle=0 if self._waiting else free,
        )
