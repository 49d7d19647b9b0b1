# SPDX-License-Identifier: Apache-2.0
"""Paged attention for NVIDIA GPUs: what the lowerings share, and which of them a call gets."""

import functools
import importlib
from types import ModuleType

import jax
import jax.numpy as jnp

from jpaged.pallas_kernels.gpu import work
from jpaged.pallas_kernels.gpu.chip import Chip, target_chip


def paged_attention(
    q,
    kv_pages,
    page_table,
    kv_lens,
    cu_q_lens,
    num_seqs,
    *,
    layer,
    sm_scale,
    sliding_window,
    soft_cap,
    kv_scale,
) -> jax.Array:
    """See `pallas_kernels.paged_attention`.

    One kernel serves decode, prefill and mixed steps. A step that has no more tokens than rows is
    taken for decode, and gets smaller tiles of queries.
    """
    # Not in what is jitted, whose traces are kept: who interprets or measures changes these.
    chip = target_chip()
    return _attend(
        q,
        kv_pages,
        page_table,
        kv_lens,
        cu_q_lens,
        num_seqs,
        layer=layer,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        kv_scale=kv_scale,
        chip=chip,
        lowering=choose_lowering(q, chip),
    )


@functools.partial(
    jax.jit, static_argnames=("sm_scale", "sliding_window", "soft_cap", "chip", "lowering")
)
def _attend(
    q,
    kv_pages,
    page_table,
    kv_lens,
    cu_q_lens,
    num_seqs,
    *,
    layer,
    sm_scale,
    sliding_window,
    soft_cap,
    kv_scale,
    chip: Chip,
    lowering: ModuleType,
) -> jax.Array:
    plan = lowering.plan_attention(q, kv_pages, page_table, chip)
    tiles, splits = work.make_tiles(
        kv_lens, cu_q_lens, num_seqs, q.shape[0], plan=plan, sliding_window=sliding_window
    )
    scale = jnp.ones(2, jnp.float32) if kv_scale is None else kv_scale.astype(jnp.float32)
    out = lowering.attend_tiles(
        work.to_query_rows(q, plan),
        kv_pages,
        page_table,
        tiles,
        jnp.int32(layer),
        scale * jnp.array([sm_scale, 1.0], jnp.float32),
        plan=plan,
        chip=chip,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
    return work.merge_splits(out, splits, plan)


def choose_lowering(q: jax.Array, chip: Chip) -> ModuleType:
    """Mosaic GPU where the chip has its instructions, Triton before that.

    float32 is for tests: Mosaic GPU's tensor cores would round it to 10 bits of mantissa.
    """
    has_mosaic = chip.capability[0] in (9, 10)
    name = "mosaic" if has_mosaic and q.dtype != jnp.float32 else "triton"
    # Imported when it is first used: jax will drop Triton's some day.
    return importlib.import_module(f"jpaged.pallas_kernels.gpu.{name}")
