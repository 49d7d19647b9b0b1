# SPDX-License-Identifier: Apache-2.0
"""What a step without a device does, and how long it would take."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Memory:
    """What each slot of the memory for keys and values is, during one step; the sum is all of it.

    Attributes:
      live: holds a token that a layer needs; where layers differ in that, each counts as its share.
      reserved: a request has it and will fill it before it ends.
      internal: a request has it and will never fill it, or no layer needs what it holds any more.
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
      num_kv_tokens: tokens that they attend to, those included; a shared one once for each. Of
        layers that see less, the mean.
      num_swapped_pages: pages copied to or from host memory before, as pages of all layers.
      memory: while it runs.
      finished: requests that the step before ended, by their number in order of `add`.
      started: requests that the step before gave their first token, likewise.
      num_samples: tokens that are drawn.
    """

    num_seqs: int
    num_tokens: int
    num_kv_tokens: int
    num_swapped_pages: int
    memory: Memory
    finished: tuple[int, ...] = ()
    started: tuple[int, ...] = ()
    num_samples: int = dataclasses.field(default=0, compare=False)


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

    def step_s(self, work: StepWork, page_size: int = 1) -> float:
        """Seconds of a step; 0 for one without work."""
        seconds = self.copy_s(work.num_swapped_pages, page_size)
        if work.num_seqs:
            seconds += self.device_s(work.num_tokens, work.num_kv_tokens)
            seconds += self.host_s + self.host_s_per_seq * work.num_seqs
        return seconds
