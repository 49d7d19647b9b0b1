# SPDX-License-Identifier: Apache-2.0
"""How large a page pool fits."""

import dataclasses
import math

import jax
import psutil

from jpaged.config import EngineConfig


@dataclasses.dataclass(frozen=True)
class PoolSize:
    """A pool's size and why.

    Attributes:
      num_pages: pages, the reserved one included.
      page_bytes: bytes of one page over all layers.
      reason: where the number comes from, for people.
    """

    num_pages: int
    page_bytes: int
    reason: str

    def __str__(self) -> str:
        page_kib, pool_mib = self.page_bytes / 2**10, self.num_pages * self.page_bytes / 2**20
        return f"{self.num_pages} pages of {page_kib:.1f} KiB ({pool_mib:.1f} MiB): {self.reason}"


def choose_pool_size(
    config: EngineConfig, max_model_len: int, page_bytes: int, device: jax.Device
) -> PoolSize:
    """Sizes the pool: as asked, or from free memory, but never more than can be used.

    Args:
      config: gives num_pages, or memory_fraction, page_size and max_num_seqs.
      max_model_len: tokens a sequence has at most.
      page_bytes: bytes of one page over all layers.
      device: where the pool will live.

    Returns:
      The size.

    Raises:
      ValueError: if free memory does not hold even one sequence of one page.
    """
    if config.num_pages is not None:
        return PoolSize(config.num_pages, page_bytes, "as asked (num_pages)")
    most = 1 + config.max_num_seqs * math.ceil(max_model_len / config.page_size)
    free_bytes, source = _free_memory(device)
    fits = int(free_bytes * config.memory_fraction) // page_bytes
    if fits >= most:
        reason = f"{config.max_num_seqs} sequences of {max_model_len} tokens fit in {source}"
        return PoolSize(most, page_bytes, reason)
    if fits < 2:
        raise ValueError(
            f"memory_fraction={config.memory_fraction} of {free_bytes} bytes of {source} holds "
            f"{fits} pages of {page_bytes} bytes, and 2 are the least; lower page_size or raise "
            "memory_fraction"
        )
    reason = f"{config.memory_fraction:.0%} of {free_bytes / 2**30:.1f} GiB of {source}"
    return PoolSize(fits, page_bytes, reason)


def _free_memory(device: jax.Device) -> tuple[int, str]:
    """Bytes that can still be allocated, and what they are called."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0), "free device memory"
    return psutil.virtual_memory().available, "available host memory"
