# SPDX-License-Identifier: Apache-2.0
"""How large a page pool is, before it is allocated."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import psutil

import pallas_kernels
from jpaged.config import EngineConfig
from models.config import ModelConfig

_MAX_DEFAULT_SWAP_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class PoolPlan:
    """A page pool's dimensions and why.

    Attributes:
      shape: of the device pool; see `pallas_kernels.kv_pages_shape`.
      dtype: of the device pool.
      max_model_len: tokens a sequence has at most.
      pages_per_seq: pages a sequence has at most.
      reason: where the number of pages comes from, for people.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    max_model_len: int
    pages_per_seq: int
    reason: str

    @property
    def num_pages(self) -> int:
        """Pages, the reserved one included."""
        return self.shape[1]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return math.prod(self.shape) // self.num_pages * self.dtype.itemsize

    def num_host_pages(self, config: EngineConfig) -> int:
        """Pages that host memory gets room for; none where none could be swapped."""
        if config.preemption == "recompute" or config.reservation == "max":
            return 0
        if config.swap_bytes is None:
            return min(self.num_pages, _MAX_DEFAULT_SWAP_BYTES // self.page_bytes)
        return config.swap_bytes // self.page_bytes

    def __str__(self) -> str:
        page_kib, pool_mib = self.page_bytes / 2**10, self.num_pages * self.page_bytes / 2**20
        return f"{self.num_pages} pages of {page_kib:.1f} KiB ({pool_mib:.1f} MiB): {self.reason}"


def plan_pool(config: EngineConfig, model_config: ModelConfig, backend: str) -> PoolPlan:
    """Sizes the pool: as asked, or from free memory of the default device, but not beyond use.

    Args:
      config: gives num_pages, or memory_fraction and max_num_seqs.
      model_config: gives the size of a page.
      backend: whose layout the pool has.

    Returns:
      The plan; nothing is allocated.

    Raises:
      ValueError: if max_model_len exceeds what the model was made for, or free memory does not hold
        even one page.
    """
    max_model_len = config.max_model_len or model_config.max_position_embeddings
    if max_model_len > model_config.max_position_embeddings:
        raise ValueError(
            f"max_model_len={max_model_len} exceeds the model's max_position_embeddings="
            f"{model_config.max_position_embeddings}"
        )
    pages_per_seq = -(-max_model_len // config.page_size)

    def plan(num_pages: int, reason: str) -> PoolPlan:
        shape = pallas_kernels.kv_pages_shape(
            model_config.num_layers,
            num_pages,
            model_config.num_kv_heads,
            config.page_size,
            model_config.head_dim,
            backend=backend,
        )
        return PoolPlan(shape, _pool_dtype(config), max_model_len, pages_per_seq, reason)

    if config.num_pages is not None:
        return plan(config.num_pages, "as asked (num_pages)")
    most = 1 + config.max_num_seqs * pages_per_seq
    free_bytes, source = _free_memory()
    page_bytes = plan(1, "").page_bytes
    fits = int(free_bytes * config.memory_fraction) // page_bytes
    share = f"{config.memory_fraction:.0%} of {free_bytes / 2**30:.1f} GiB of {source}"
    if fits >= most:
        needed = f"{config.max_num_seqs} sequences of {max_model_len} tokens need no more"
        return plan(most, f"{needed}; within {share}")
    if fits < 2:
        raise ValueError(
            f"{share} holds {fits} pages of {page_bytes} bytes, and 2 are the least; lower "
            "page_size or raise memory_fraction"
        )
    return plan(fits, share)


def default_dtype(config: EngineConfig) -> np.dtype:
    """The dtype of weights: as asked, else float32 on CPU and bfloat16 elsewhere."""
    return jnp.dtype(config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))


def _pool_dtype(config: EngineConfig) -> np.dtype:
    """The dtype of pages: that of the weights, but float32 for bfloat16 weights on CPU.

    XLA's CPU compiler computes bfloat16 gathers and updates in float32 and converts the whole pool
    around each of them (measured: docs/decisions.md).
    """
    dtype = default_dtype(config)
    if dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return np.dtype(np.float32)
    return dtype


def _free_memory() -> tuple[int, str]:
    """Bytes that can still be allocated, and what they are called."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0), "free device memory"
    return psutil.virtual_memory().available, "available host memory"
