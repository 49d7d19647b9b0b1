# SPDX-License-Identifier: Apache-2.0
"""How large a page pool is, before it is allocated."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from jpaged.host.checks import INT32_MAX
from jpaged.host.config import EngineConfig
from jpaged.host.groups import ONE_GROUP, GroupKind, num_groups, pages_of
from jpaged.models.cache_groups import cache_groups
from jpaged.models.config import ModelConfig
from jpaged.pallas_kernels import dispatch, layout
from jpaged.pallas_kernels.rows import Rows

_MAX_DEFAULT_SWAP_BYTES = 2**30


class DoesNotFitError(ValueError):
    """Memory that does not hold what is asked for; the message has both numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreeMemory:
    """What a pool can be allocated in.

    Attributes:
      num_bytes: that can still be allocated on each device.
      name: what they are called in messages.
      platform: the devices', as jax names it.
      num_devices: over which the heads of a page are split.
      host_bytes: available on the host; None if that is not known, and nothing is held to it.
    """

    num_bytes: int
    name: str
    platform: str
    num_devices: int = 1
    host_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class PoolPlan:
    """A page pool's dimensions and why.

    Attributes:
      shape: of the device pool; see `layout.kv_pages_shape`.
      dtype: of the device pool.
      max_model_len: tokens a sequence has at most.
      pages_per_seq: pages a sequence has at most for a group of layers.
      reason: where the number of pages comes from, for people.
      kinds: groups of layers that have pages of their own.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    max_model_len: int
    pages_per_seq: int
    reason: str
    kinds: tuple[GroupKind, ...] = ONE_GROUP

    @property
    def num_groups(self) -> int:
        """Groups of layers that have pages of their own."""
        return num_groups(self.kinds)

    @property
    def num_pages(self) -> int:
        """Pages, the reserved one included."""
        return self.shape[layout.PAGES_AXIS]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over the layers of a group."""
        return layout.page_bytes(self.shape, self.dtype)

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


def plan_pool(
    config: EngineConfig,
    model_config: ModelConfig,
    backend: str,
    free: FreeMemory | None = None,
    *,
    unread_bytes: int = 0,
) -> PoolPlan:
    """Sizes the pool: as asked, or from free memory, but not beyond use.

    Args:
      config: gives num_pages, or memory_fraction and max_num_seqs.
      model_config: gives the size of a page.
      backend: whose layout the pool has.
      free: the memory; None takes that of the default device and of this host.
      unread_bytes: of weights that will be there before the pool is; what is free is less by them.

    Returns:
      The plan; nothing is allocated.

    Raises:
      ValueError: if max_model_len exceeds what the model was made for.
      DoesNotFitError: if free memory does not hold what is asked for: the pool, even one page of
        it, swapped pages, or the largest step.
    """
    max_model_len = config.max_model_len or model_config.max_position_embeddings
    if max_model_len > model_config.max_position_embeddings:
        raise ValueError(
            f"max_model_len={max_model_len} exceeds the model's max_position_embeddings="
            f"{model_config.max_position_embeddings}"
        )
    pages_per_seq = -(-max_model_len // config.page_size)
    groups = cache_groups(model_config, max_model_len)
    kinds = tuple(GroupKind(*kind) for kind in groups.kinds)

    free = free or _free_memory()
    free = dataclasses.replace(free, num_bytes=max(free.num_bytes - unread_bytes, 0))
    dtype = pool_dtype(config, free.platform)

    def plan(num_pages: int, reason: str) -> PoolPlan:
        shape = layout.kv_pages_shape(
            groups.size,
            num_pages,
            model_config.num_kv_heads,
            config.page_size,
            model_config.head_dim,
            backend=backend,
        )
        return PoolPlan(shape, dtype, max_model_len, pages_per_seq, reason, kinds)

    table_pages = pages_per_seq * groups.num_groups
    _check_step(config, model_config, max_model_len, table_pages, free)
    if config.num_pages is not None:
        asked = plan(config.num_pages, "as asked (num_pages)")
        _check_pool(config, asked, free)
        return asked
    most = 1 + config.max_num_seqs * pages_of_longest(config, kinds, max_model_len)
    page_bytes = plan(1, "").page_bytes // free.num_devices
    fits = int(free.num_bytes * config.memory_fraction) // page_bytes
    share = f"{config.memory_fraction:.0%} of {free.num_bytes / 2**30:.1f} GiB of {free.name}"
    if fits >= most:
        needed = f"{config.max_num_seqs} sequences of {max_model_len} tokens need no more"
        found = plan(most, f"{needed}; within {share}")
    elif fits >= 2 and free.platform == "cpu":
        found = plan(_rounded(fits), f"no more than {share}, rounded down")
    elif fits >= 2:
        found = plan(fits, share)
    else:
        raise DoesNotFitError(
            f"{share} holds {fits} pages of {page_bytes} bytes, and 2 are the least; lower "
            "page_size or raise memory_fraction"
        )
    _check_pool(config, found, free)
    return found


def _rounded(num_pages: int) -> int:
    """The number without all but its first four bits.

    What is available on a host is never the same twice, and each size of the pool would have steps
    of its own, which would be compiled at every start.
    """
    return num_pages >> (bits := max(num_pages.bit_length() - 4, 0)) << bits


def pages_of_longest(config: EngineConfig, kinds: tuple[GroupKind, ...], num_tokens: int) -> int:
    """Pages that a sequence of so many tokens, the longest, holds at most at once."""
    chunk = num_tokens if config.reservation == "max" else config.max_num_batched_tokens
    return pages_of(kinds, config.page_size, num_tokens, chunk)


def _check_pool(config: EngineConfig, plan: PoolPlan, free: FreeMemory) -> None:
    """Refuses a pool, or host memory for swapped pages, that could not be allocated."""
    page_bytes = plan.page_bytes // free.num_devices
    pool_bytes = plan.num_pages * page_bytes
    if pool_bytes > free.num_bytes:
        raise DoesNotFitError(
            f"num_pages={plan.num_pages} pages of {page_bytes} bytes take {gib(pool_bytes)}, "
            f"more than the {gib(free.num_bytes)} of {free.name}; lower num_pages or page_size"
        )
    if plan.num_pages * config.page_size > INT32_MAX:
        raise DoesNotFitError(
            f"num_pages={plan.num_pages} pages of page_size={config.page_size} tokens have "
            f"{plan.num_pages * config.page_size} cells, and 32-bit indices reach {INT32_MAX}; "
            "lower one of them"
        )
    if free.host_bytes is None or config.swap_bytes is None:
        return
    host_bytes = free.host_bytes - (pool_bytes if free.platform == "cpu" else 0)
    if config.swap_bytes > host_bytes:
        raise DoesNotFitError(
            f"swap_bytes={config.swap_bytes} exceeds the {gib(host_bytes)} of host memory that "
            "are available beside the pool; lower it"
        )


def _check_step(
    config: EngineConfig,
    model_config: ModelConfig,
    max_model_len: int,
    table_pages: int,
    free: FreeMemory,
) -> None:
    """Refuses budgets of which the largest step could not be run, by the least that it takes."""
    seqs, tokens = config.max_num_seqs, config.max_num_batched_tokens
    if not config.deterministic:
        tokens = min(tokens, seqs * max_model_len)
    for what, count, bytes_each in (
        (f"the page tables of max_num_seqs={seqs} sequences", seqs, 4 * table_pages),
        (f"the logits of max_num_seqs={seqs} samples", seqs, 4 * model_config.vocab_size),
        (
            f"the hidden states of max_num_batched_tokens={config.max_num_batched_tokens} tokens",
            tokens,
            default_dtype(config, free.platform).itemsize * model_config.hidden_size,
        ),
    ):
        if count * bytes_each > free.num_bytes:
            raise DoesNotFitError(
                f"{what} take {gib(count * bytes_each)}, more than the {gib(free.num_bytes)} of "
                f"{free.name}; lower it"
            )


def gib(num_bytes: int) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.1f} GiB"


def default_dtype(config: EngineConfig, platform: str | None = None) -> np.dtype:
    """The dtype of weights: as asked, else float32 on CPU and bfloat16 elsewhere.

    Args:
      config: what is asked.
      platform: of the device; None takes the default one's.
    """
    is_cpu = (platform or jax.default_backend()) == "cpu"
    return jnp.dtype(config.dtype or ("float32" if is_cpu else "bfloat16"))


def pool_dtype(config: EngineConfig, platform: str | None = None) -> np.dtype:
    """The dtype of pages: as asked, else that of the weights, but float32 for bfloat16 on CPU.

    XLA's CPU compiler computes bfloat16 gathers and updates in float32 and converts the whole pool
    around each of them (measured: docs/decisions.md).
    """
    if config.kv_dtype is not None:
        return jnp.dtype(config.kv_dtype)
    dtype = default_dtype(config, platform)
    if dtype == jnp.bfloat16 and (platform or jax.default_backend()) == "cpu":
        return np.dtype(np.float32)
    return dtype


def check_pages(model_config: ModelConfig, plan: PoolPlan, dtype: np.dtype, backend: str) -> None:
    """Has the kernels refuse pages that they do not take, before there are any.

    Nothing is compiled or run; kernels are traced for the chip that jax's abstract mesh names, or
    else for the default device.

    Args:
      model_config: the model's shape.
      plan: of the pool.
      dtype: of queries.
      backend: whose kernels.

    Raises:
      ValueError: if they do not take them; the message has the rule.
    """
    if backend in ("cpu", "xla"):
        return  # which compiles for everything, and has what the other's kernels do not take
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    index: Any = ints((4, plan.pages_per_seq)), ints((4,)), ints((5,)), ints((1,))
    rows = Rows(*index)
    kv_pages = jax.ShapeDtypeStruct(plan.shape, plan.dtype)
    kv_scale = jax.ShapeDtypeStruct((2,), jnp.float32)
    for attention in model_config.attentions:
        q = jax.ShapeDtypeStruct((4, attention.num_q_heads, attention.head_dim), dtype)
        attend = functools.partial(dispatch.attend, variant=attention.variant, backend=backend)
        jax.eval_shape(attend, q, kv_pages, rows, kv_scale=kv_scale)


def _free_memory() -> FreeMemory:
    """What can still be allocated on the default device and on this host."""
    device, platform = jax.local_devices()[0], jax.default_backend()
    host_bytes = psutil.virtual_memory().available
    stats = device.memory_stats() if platform != "cpu" else None
    num_bytes, name = host_bytes, "available host memory"
    if stats and "bytes_limit" in stats:
        num_bytes = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        name = "free device memory"
    return FreeMemory(num_bytes=num_bytes, name=name, platform=platform, host_bytes=host_bytes)
