# SPDX-License-Identifier: Apache-2.0
"""Serving without a device: real memory management, and a cost model for the time that steps take.

`PagedSimulator` runs the real scheduler, pool and page table. `ContiguousSimulator` runs what came
before them: a run of slots for each request, reserved whole when it starts. Nothing needs jax.
"""

import collections
import dataclasses

from jpaged.host.admission import RequestTooLongError, SchedulerConfig
from jpaged.host.growth.base import Outcome
from jpaged.host.page_pool import PagePool
from jpaged.host.page_table import PageTable
from jpaged.host.params import SamplingParams
from jpaged.host.reader import StepReader
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import Request
from jpaged.host.stats import Counters, EngineStats
from jpaged.host.step import StepPlan
from jpaged.host.step_builder import ScheduledStep

CONTIGUOUS_POLICIES = ("contiguous-max", "contiguous-pow2", "contiguous-oracle")


@dataclasses.dataclass(frozen=True)
class Item:
    """One request of a workload.

    Attributes:
      prompt_token_ids: the prompt.
      num_output_tokens: how many to generate, whatever they are.
      num_samples: how often.
      arrival_s: when it comes, in seconds.
    """

    prompt_token_ids: list[int]
    num_output_tokens: int
    num_samples: int = 1
    arrival_s: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostModel:
    """How long steps and copies take: a roofline, and the host's work on top of it.

    The defaults are OPT-13B in float16 on one NVIDIA A100 with 40 GB, the setup of Kwon et al. 2023
    (table 1). Attention's own operations are left out, and so is what small pages cost a kernel.

    Attributes:
      weight_bytes: all weights, read once a step.
      kv_bytes_per_token: keys and values over all layers: 2 × 40 layers × 5,120 × 2 bytes.
      flops_per_token: two a weight.
      memory_bytes_per_s: of the device's memory (A100-40GB data sheet).
      flops_per_s: of the device (A100 data sheet, dense float16).
      host_s: host work of a step, which the device waits for.
      host_s_per_seq: more of it for every sequence. These two are fitted to the requests that the
        paper's system ran at once (docs/paper_figures.md).
      copy_bytes_per_s: between device and host memory (PCIe 4.0 with 16 lanes: 32 GB/s less what
        protocol and driver take).
      copy_start_s: to start one copy.
      copies_per_page: separate copies that a page takes: keys and values of every layer.
    """

    weight_bytes: float = 26e9
    kv_bytes_per_token: float = 819_200.0
    flops_per_token: float = 26e9
    memory_bytes_per_s: float = 1.555e12
    flops_per_s: float = 312e12
    host_s: float = 0.011
    host_s_per_seq: float = 0.00032
    copy_bytes_per_s: float = 25e9
    copy_start_s: float = 5e-6
    copies_per_page: int = 80

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            may_be_zero = name in ("host_s", "host_s_per_seq", "copy_start_s")
            if not (value > 0 or (may_be_zero and value == 0)):
                least = "at least" if may_be_zero else "above"
                raise ValueError(f"{name}={value} must be {least} 0")

    def device_s(self, num_tokens: int, num_kv_tokens: int) -> float:
        """Seconds to compute `num_tokens` that attend to `num_kv_tokens` in all."""
        read_bytes = self.weight_bytes + num_kv_tokens * self.kv_bytes_per_token
        return max(
            num_tokens * self.flops_per_token / self.flops_per_s,
            read_bytes / self.memory_bytes_per_s,
        )

    def copy_s(self, num_pages: int, page_size: int) -> float:
        """Seconds to copy pages to host memory, or back."""
        num_bytes = num_pages * page_size * self.kv_bytes_per_token
        starts = num_pages * self.copies_per_page
        return starts * self.copy_start_s + num_bytes / self.copy_bytes_per_s

    def step_s(self, work: "StepWork", page_size: int = 1) -> float:
        """Seconds of a step; 0 for one without work."""
        seconds = self.copy_s(work.num_swapped_pages, page_size)
        if work.num_seqs:
            seconds += self.device_s(work.num_tokens, work.num_kv_tokens)
            seconds += self.host_s + self.host_s_per_seq * work.num_seqs
        return seconds


@dataclasses.dataclass(frozen=True)
class Memory:
    """What each slot of the memory for keys and values is, during one step; the sum is all of it.

    Attributes:
      live: holds a token.
      reserved: a request has it and will fill it before it ends.
      internal: a request has it and will never fill it.
      external: lost to rounding by the allocator; or free, while a request waits.
      idle: free, and nobody waits.
    """

    live: int
    reserved: int = 0
    internal: int = 0
    external: int = 0
    idle: int = 0

    @property
    def total(self) -> int:
        """All slots."""
        return self.live + self.reserved + self.internal + self.external + self.idle


@dataclasses.dataclass(frozen=True)
class StepWork:
    """What a simulator has the device do in a step.

    Attributes:
      num_seqs: sequences that compute something.
      num_tokens: tokens that they compute.
      num_kv_tokens: tokens that they attend to, those included; a shared one once for each.
      num_swapped_pages: pages copied to or from host memory before.
      memory: while it runs.
      finished: requests that the step before ended, by their number in order of `add`.
    """

    num_seqs: int
    num_tokens: int
    num_kv_tokens: int
    num_swapped_pages: int
    memory: Memory
    finished: tuple[int, ...] = ()


class PagedSimulator:
    """The host's half of an engine: real scheduler, pool and page table, no model.

    Like `jpaged.engine.Engine`, it schedules a step before it ends the sequences of the one before.
    """

    def __init__(self, config: SchedulerConfig, num_pages: int, page_size: int):
        """Makes an empty pool of `num_pages` pages, the reserved one included."""
        self.table = PageTable(
            PagePool(num_pages), page_size, -(-config.max_model_len // page_size)
        )
        self.scheduler = Scheduler(config, self.table)
        self.totals = Counters()
        self._inflight: ScheduledStep | None = None
        self._num_added = 0

    @property
    def page_size(self) -> int:
        """Tokens a page holds."""
        return self.table.page_size

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return self.scheduler.num_waiting

    @property
    def num_preemptions(self) -> int:
        """Sequences that lost their pages, so far."""
        return self.scheduler.num_preemptions

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do."""
        return self.scheduler.has_work or self._inflight is not None

    def add(self, item: Item) -> None:
        """Queues a request.

        Raises:
          ValueError: if it could never run.
        """
        params = SamplingParams(
            max_tokens=item.num_output_tokens, temperature=0.0, n=item.num_samples, ignore_eos=True
        )
        request = Request(
            str(self._num_added),
            item.prompt_token_ids,
            params.resolve(),
            seed=0,
            max_model_len=self.scheduler.config.max_model_len,
        )
        self.scheduler.add(request)
        self._num_added += 1

    def step(self) -> StepWork:
        """Schedules a step, and gives every sample of the one before a token.

        The token is the sample's index, so that two samples never hold the same.
        """
        previous, self._inflight = self._inflight, None
        step = ScheduledStep(StepPlan())
        if self.scheduler.has_work:
            step = self.scheduler.schedule()
            plan = step.plan
            idle = not (plan.num_rows or plan.swap_outs or plan.swap_ins)
            assert previous or not idle, "the scheduler has work but schedules none of it"
            if plan.num_rows:
                self.totals.record_step(plan, self.table)
                self._inflight = step
            else:
                self.totals.record_swaps(plan)
        # Sequences that end below have their pages while the step runs.
        memory, plan = self._memory(), step.plan
        finished: list[int] = []
        if previous is not None:
            indices = [sample.sample_index for sample in previous.samples]
            outcome = Outcome(indices, [0.0] * len(indices), None, ())
            grown = StepReader(self.scheduler, (), self.totals).take(previous, outcome)
            finished = [int(r.request_id) for r in grown if r.finished]
        return StepWork(
            num_seqs=plan.num_rows,
            num_tokens=plan.num_tokens,
            num_kv_tokens=plan.num_kv_tokens,
            num_swapped_pages=len(plan.swap_outs) + len(plan.swap_ins),
            memory=memory,
            finished=tuple(finished),
        )

    def stats(self) -> EngineStats:
        """A reading like the engine's; a page has no bytes."""
        return EngineStats.read(
            self.scheduler,
            self.totals,
            page_bytes=0,
            num_compilations=0,
            num_unplanned_compilations=0,
        )

    def _memory(self) -> Memory:
        table = self.table
        free = table.pool.num_free_pages * table.page_size
        waits = self.scheduler.num_waiting > 0
        return Memory(
            live=table.num_live_cells,
            internal=table.num_allocated_cells - table.num_live_cells,
            external=free if waits else 0,
            idle=0 if waits else free,
        )


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

    __slots__ = ("block", "left", "live", "num_slots", "number", "unused")

    def __init__(self, number: int, item: Item, block: int, num_slots: int):
        self.number, self.block, self.num_slots = number, block, num_slots
        self.live, self.left = len(item.prompt_token_ids), item.num_output_tokens
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
        return StepWork(num_seqs, num_tokens, live, 0, self._memory(live), finished)

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
