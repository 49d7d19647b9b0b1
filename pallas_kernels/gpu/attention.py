# SPDX-License-Identifier: Apache-2.0
"""Paged attention for NVIDIA GPUs: what the lowerings share, and which of them a call gets."""

import dataclasses
import functools
import importlib
from typing import Protocol, cast

import jax
import jax.numpy as jnp

from jpaged.pallas_kernels.gpu import work
from jpaged.pallas_kernels.gpu.chip import Chip, target_chip
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant


class Lowering(Protocol):
    """What the module of a lowering offers."""

    def plan_attention(
        self, q: jax.Array, kv_pages: jax.Array, rows: Rows, chip: Chip
    ) -> work.AttentionPlan:
        """Checks that the lowering takes a call, and chooses its sizes.

        Args:
          q: as in `paged_attention`; only its shape and dtype matter, as those of the others.
          kv_pages: likewise.
          rows: likewise.
          chip: what to fit.

        Raises:
          ValueError: if the chip or the kernel cannot do this; the message has the rule.
        """
        ...

    def attend_tiles(
        self,
        q_rows: jax.Array,
        kv_pages: jax.Array,
        page_table: jax.Array,
        tiles: jax.Array,
        layer: jax.Array,
        scale: jax.Array,
        *,
        plan: work.AttentionPlan,
        chip: Chip,
        variant: AttentionVariant,
    ) -> jax.Array:
        """Attends each tile's queries to its keys, split by split.

        Args:
          q_rows: dtype[num_kv_heads, query_rows, head_dim], as `work.to_query_rows` gives them.
          kv_pages: as in `paged_attention`.
          page_table: likewise.
          tiles: i32[max_tiles, len(FIELDS)], as `work.make_tiles` gives them.
          layer: i32[].
          scale: f32[2], what products of queries and stored keys are multiplied by, and results.
          plan: of `plan_attention`.
          chip: what for.
          variant: of the scores; `scale` has its scale already.

        Returns:
          An array of `plan.out_type`, for `work.merge_splits`; query rows that no tile owns, and
          splits that a tile does not have, hold anything.
        """
        ...


def paged_attention(
    q, kv_pages, rows: Rows, variant: AttentionVariant, *, layer, kv_scale, sinks=None
) -> jax.Array:
    """See `pallas_kernels.paged_attention`.

    One kernel serves decode, prefill and mixed steps. A step that has no more tokens than rows is
    taken for decode, and gets smaller tiles of queries.
    """
    # Not in what is jitted, whose traces are kept: who interprets or measures changes these.
    chip = target_chip()
    lowering = choose_lowering(q, chip)
    return _attend(
        q,
        kv_pages,
        rows,
        variant,
        layer=layer,
        kv_scale=kv_scale,
        sinks=sinks,
        chip=chip,
        lowering=lowering,
    )


@functools.partial(jax.jit, static_argnames=("variant", "chip", "lowering"))
def _attend(
    q,
    kv_pages,
    rows: Rows,
    variant: AttentionVariant,
    *,
    layer,
    kv_scale,
    sinks,
    chip: Chip,
    lowering: Lowering,
) -> jax.Array:
    plan = lowering.plan_attention(q, kv_pages, rows, chip)
    plan = dataclasses.replace(plan, has_sinks=sinks is not None)
    tiles, splits = work.make_tiles(rows, q.shape[0], plan=plan, variant=variant)
    scale = jnp.ones(2, jnp.float32) if kv_scale is None else kv_scale.astype(jnp.float32)
    out = lowering.attend_tiles(
        work.to_query_rows(q, plan),
        kv_pages,
        rows.page_table,
        tiles,
        jnp.int32(layer),
        scale * jnp.array([variant.scale(plan.head_dim), 1.0], jnp.float32),
        plan=plan,
        chip=chip,
        variant=variant,
    )
    return work.merge_splits(out, splits, plan, sinks)


def choose_lowering(q: jax.Array, chip: Chip) -> Lowering:
    """Mosaic GPU where the chip has its instructions, Triton before that.

    float32 is for tests: Mosaic GPU's tensor cores would round it to 10 bits of mantissa.
    """
    has_mosaic = chip.capability[0] in (9, 10)
    name = "mosaic" if has_mosaic and q.dtype != jnp.float32 else "triton"
    # Imported when it is first used: jax will drop Triton's some day.
    return cast(Lowering, importlib.import_module(f"jpaged.pallas_kernels.gpu.{name}"))
