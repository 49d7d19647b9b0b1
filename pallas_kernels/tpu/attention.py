# SPDX-License-Identifier: Apache-2.0
"""Paged attention for TPUs: page copies that run ahead of an online softmax.

Decode and prefill run the same kernel with tiles of one and of many queries; a mixed step calls it
twice. `plan.py` chooses tile sizes, `spans.py` makes the list of work, `kernel.py` does it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jpaged.pallas_kernels.reference import token_rows
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.tpu import spans as spans_lib
from jpaged.pallas_kernels.tpu.chip import in_hbm
from jpaged.pallas_kernels.tpu.kernel import attention_kernel
from jpaged.pallas_kernels.tpu.plan import (
    LANES,
    AttentionPlan,
    check_scalars,
    plan_attention,
    vmem_limit,
)
from jpaged.pallas_kernels.tuning import TpuTiles
from jpaged.pallas_kernels.variant import AttentionVariant


# Jitted by itself as every backend's functions are: called outside jit it is one program, in which
# alone the pool can be kept in HBM, and a model's layers, which differ in `layer` alone, are traced
# and lowered once.
@functools.partial(jax.jit, static_argnames=("variant", "tiles"))
def paged_attention(
    q,
    kv_pages,
    rows: Rows,
    variant: AttentionVariant,
    *,
    layer,
    kv_scale,
    sinks=None,
    tiles: TpuTiles | None = None,
) -> jax.Array:
    """See `pallas_kernels.paged_attention`; `tiles` replace those of `tuning`.

    A step that has no more tokens than rows is taken for decode and gets tiles of one query. In any
    other, rows with one query get those too, so that they do not pay for the others' large tiles.
    """
    first_tokens, q_lens = rows.cu_q_lens[:-1], rows.q_lens()
    scale = jnp.ones(2, jnp.float32) if kv_scale is None else kv_scale.astype(jnp.float32)
    scale = scale * jnp.array([variant.scale(q.shape[2]), 1.0], jnp.float32)

    def attend(q, first_tokens, q_lens, decode):
        plan = plan_attention(q, kv_pages, rows, decode=decode, tiles=tiles)
        num_blocks = pl.cdiv(q.shape[0], plan.q_tile)
        work = spans_lib.make_tiles(
            rows.kv_lens,
            first_tokens,
            q_lens,
            q_tile=plan.q_tile,
            num_blocks=num_blocks,
            max_tiles=plan.max_tiles(q.shape[0], rows.max_num_seqs),
        )
        out = _attend_tiles(
            _to_blocks(q, num_blocks, plan),
            kv_pages,
            rows.page_table,
            work,
            layer,
            scale,
            sinks,
            plan=plan,
            variant=variant,
            name="paged_attention_decode" if decode else "paged_attention_prefill",
        )
        return _from_blocks(out, q.shape[0], plan)

    row, live = token_rows(rows, q.shape[0])
    if rows.is_decode(q.shape[0]):
        out = attend(q, first_tokens, q_lens, decode=True)
    else:
        single = q_lens == 1
        own = jnp.arange(rows.max_num_seqs, dtype=jnp.int32)
        row_q = q.at[first_tokens].get(mode="clip")
        decoded = attend(row_q, own, jnp.where(single, 1, 0), decode=True)
        prefilled = attend(q, first_tokens, jnp.where(single, 0, q_lens), decode=False)
        out = jnp.where(single[row][:, None, None], decoded[row], prefilled)
    return jnp.where(live[:, None, None], out, jnp.zeros((), q.dtype))


def _to_blocks(q, num_blocks: int, plan: AttentionPlan):
    """[blocks, num_kv_heads, block_rows, key_lanes]; row `i * q_tile + j` is head i, token j."""
    group = plan.num_q_heads // plan.num_kv_heads
    q = jnp.pad(q, ((0, num_blocks * plan.q_tile - q.shape[0]), (0, 0), (0, 0)))
    q = q.reshape(num_blocks, plan.q_tile, plan.num_kv_heads, group, plan.head_dim)
    q = q.transpose(0, 2, 3, 1, 4)
    q = q.reshape(num_blocks, plan.num_kv_heads, plan.head_queries, plan.head_dim)
    pad_rows = plan.block_rows - plan.head_queries
    pad_lanes = plan.key_lanes - plan.head_dim
    return jnp.pad(q, ((0, 0), (0, 0), (0, pad_rows), (0, pad_lanes)))


def _from_blocks(out, num_tokens: int, plan: AttentionPlan):
    """[num_tokens, num_q_heads, head_dim]: the inverse of `_to_blocks`."""
    group = plan.num_q_heads // plan.num_kv_heads
    out = out[:, :, : plan.head_queries]
    out = out.reshape(-1, plan.num_kv_heads, group, plan.q_tile, plan.head_dim)
    out = out.transpose(0, 3, 1, 2, 4).reshape(-1, plan.num_q_heads, plan.head_dim)
    return out[:num_tokens]


def _attend_tiles(
    q_blocks, kv_pages, page_table, tiles, layer, scale, sinks, *, plan, variant, name
):
    num_rows, pages_per_seq = page_table.shape
    num_parts = plan.num_parts(pages_per_seq)
    # A part is a row of its own with nothing above or below it: copied without stride.
    page_table = jnp.pad(page_table, ((0, 0), (0, num_parts * plan.table_part - pages_per_seq)))
    page_table = page_table.reshape(num_rows * num_parts, 1, plan.table_part)
    spans, num_spans = spans_lib.make_spans(
        tiles,
        page_size=plan.page_size,
        table_part=plan.table_part,
        num_rows=num_rows,
        num_parts=num_parts,
        variant=variant,
    )
    check_scalars("attention", plan.smem_bytes(spans.shape[1] - 1), num_rows)
    scalars = jnp.stack([num_spans, jnp.asarray(layer, jnp.int32)])

    def live_span(span, scalars_ref):
        return jnp.clip(span, 0, jnp.maximum(scalars_ref[0] - 1, 0))

    def block_index(span, spans_ref, scalars_ref):
        field = spans_lib.FIELDS.index("block")
        return spans_ref[field, live_span(span, scalars_ref)], 0, 0, 0

    def part_index(span, spans_ref, scalars_ref):
        field = spans_lib.FIELDS.index("part")
        return spans_ref[field, live_span(span, scalars_ref)], 0, 0

    def next_part_index(span, spans_ref, scalars_ref):
        return part_index(span + 1, spans_ref, scalars_ref)

    heads, rows = plan.num_kv_heads, plan.num_kv_heads * plan.score_rows
    part = (1, 1, plan.table_part)
    out_block = (1, heads, plan.block_rows, plan.head_dim)
    scalars_spec = pl.BlockSpec(memory_space=pltpu.SMEM)
    return pl.pallas_call(
        functools.partial(attention_kernel, plan=plan, variant=variant),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(jnp.maximum(num_spans, 1),),
            in_specs=[
                pl.BlockSpec(part, part_index, memory_space=pltpu.SMEM),
                pl.BlockSpec(part, next_part_index, memory_space=pltpu.SMEM),
                pl.BlockSpec((1, *q_blocks.shape[1:]), block_index),
                pl.BlockSpec(memory_space=pltpu.HBM),
                scalars_spec,
                None if sinks is None else scalars_spec,
            ],
            out_specs=pl.BlockSpec(out_block, block_index),
            scratch_shapes=[
                pltpu.VMEM((2, plan.group_pages, *kv_pages.shape[2:]), kv_pages.dtype),
                pltpu.VMEM((plan.softmax_heads * plan.score_rows, plan.group_tokens), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, plan.acc_lanes), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((q_blocks.shape[0], *out_block[1:]), q_blocks.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_limit(plan.vmem_bytes)
        ),
        name=name,
    )(spans, scalars, page_table, page_table, q_blocks, in_hbm(kv_pages), scale, sinks)
