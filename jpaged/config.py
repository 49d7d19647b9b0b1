# SPDX-License-Identifier: Apache-2.0
"""How an engine is set up."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """An engine's settings; every field has a flag of the same name in the scripts.

    Attributes:
      page_size: tokens a page holds.
      num_pages: pages of the pool; None sizes it from free memory (see `memory_fraction`).
      memory_fraction: share of free device memory, or of the host's available memory on CPU, that
        the pool may take where num_pages is None.
      max_num_seqs: sequences that run at once at most.
      max_num_batched_tokens: tokens a step computes at most, prefill and decode together.
      max_model_len: tokens a sequence has at most, prompt and generated together; None takes the
        model's max_position_embeddings.
      dtype: of weights: "float32", "bfloat16" or "float16"; pages have the same, but float32 for
        bfloat16 weights on CPU. None takes float32 on CPU and bfloat16 elsewhere.
      reservation: "paged", or "max" to reserve max_model_len a sequence, for comparison.
      prefix_cache: whether a request uses the pages of earlier ones that began with the same
        tokens; they are kept until they are needed for something else. Without it, samples and
        beams of one request still find each other's pages.
      preemption: what becomes of a sequence whose pages are needed: "recompute" computes its tokens
        again when there are pages, "swap" copies its pages to host memory and back, "auto" does
        what costs less.
      swap_bytes: host memory for the pages of preempted sequences; None takes as much as the pool
        has, but at most 1 GiB.
      swap_bytes_per_s: bytes a second between device and host, for "auto"; None measures it.
      flops_per_s: operations a second of a prefill, for "auto"; None measures a matrix product.
      deterministic: pads every step to one shape, so that results are the same to the last bit
        whatever else runs, at the price of speed: decode too takes as long as
        max_num_batched_tokens do.
      scan_layers: scan over the layers (compiles fast) instead of unrolling them (runs fast on
        CPU); None unrolls on CPU alone.
      backend: "tpu", "gpu" or "xla" kernels; None takes those of the default device.
    """

    page_size: int = 16
    num_pages: int | None = None
    memory_fraction: float = 0.25
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_model_len: int | None = None
    dtype: str | None = None
    reservation: str = "paged"
    prefix_cache: bool = True
    preemption: str = "auto"
    swap_bytes: int | None = None
    swap_bytes_per_s: float | None = None
    flops_per_s: float | None = None
    deterministic: bool = False
    scan_layers: bool | None = None
    backend: str | None = None

    def __post_init__(self):
        at_least = {
            "page_size": 1,
            "num_pages": 2,
            "max_num_seqs": 1,
            "max_num_batched_tokens": 1,
            "max_model_len": 2,
            "swap_bytes": 0,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(f"memory_fraction={self.memory_fraction} must be in (0, 1]")
        for name in ("swap_bytes_per_s", "flops_per_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be finite and above 0, or None")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(
                f"dtype={self.dtype!r} must be 'float32', 'bfloat16', 'float16' or None"
            )
        if self.deterministic and self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError(
                f"deterministic needs max_num_batched_tokens={self.max_num_batched_tokens} above "
                f"max_num_seqs={self.max_num_seqs}: one step shape must hold prefill and decode"
            )
