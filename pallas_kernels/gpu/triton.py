# SPDX-License-Identifier: Apache-2.0
"""Paged attention by way of Triton: for Ampere and Ada, and for float32 queries on any GPU.

jax has deprecated its Triton backend, so nothing but this module and its test knows of it, and its
kernel is as plain as it can be: one loop over blocks of keys, whose loads Triton pipelines.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jpaged.pallas_kernels.gpu import work
from jpaged.pallas_kernels.gpu.chip import Chip
from jpaged.pallas_kernels.gpu.work import AttentionPlan
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant

_MIN_CAPABILITY = (8, 0)
# The first that Triton converts float8_e4m3fn for.
_FLOAT8_CAPABILITY = (8, 9)
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_QUANTIZED = (jnp.int8, jnp.float8_e4m3fn)
_MAX_HEAD_DIM = 256
_MAX_GROUP = 64
# Query rows of a tile of several tokens, where head_dim allows it.
_LARGE_TILE = 128
# The least rows, columns and lanes that a matrix product of Triton has.
_MIN_DOT = 16
# Lanes of keys that are multiplied at once without tensor cores, as they are held in registers.
_FMA_LANES = 32
# What the compiler takes beside what is planned: page ids and the reductions' exchange.
_SMEM_RESERVE_BYTES = 2**10
# Finite, so that rows that have seen no key yet subtract to 0 and not to NaN.
_MASKED = -1e30
_LOG2_E = math.log2(math.e)


def plan_attention(q: jax.Array, kv_pages: jax.Array, rows: Rows, chip: Chip) -> AttentionPlan:
    """See `gpu.attention.Lowering`.

    Those of decode hold the queries of one token and are small, so that several thread blocks share
    a multiprocessor, and some multiply while others wait for cells. Others are as large as
    registers allow, as every tile reads all of its keys. float32 is multiplied without tensor
    cores, from operands in registers, which leaves room for less.

    `page_size` is free: each key's page id is looked up by itself, so that a block of keys may
    start and end anywhere in a page.
    """
    _check(q, kv_pages, chip)
    group, lanes = q.shape[1] // kv_pages.shape[2], _lanes(q.shape[2])
    float32, wide = q.dtype == jnp.float32, lanes > 128
    tile_rows = max(_MIN_DOT, _power_of_two(group))
    if not rows.is_decode(q.shape[0]):
        tile_rows = max(tile_rows, 32 if float32 else _LARGE_TILE // (2 if wide else 1))
    plan = work.plan_attention(
        q,
        kv_pages,
        rows,
        tile_rows=tile_rows,
        block_tokens=(32 if float32 else 64) // (2 if wide else 1),
        chip=chip,
    )
    if _smem_bytes(plan) > chip.smem_bytes:
        raise ValueError(
            f"attention of {plan.dtype} with head_dim {plan.head_dim} and {group} query heads a KV "
            f"head needs {_smem_bytes(plan)} bytes of shared memory, more than the "
            f"{chip.smem_bytes} that a thread block of a {chip.name} has; convert q to bfloat16, "
            "or pass backend='xla'"
        )
    return plan


def _check(q: jax.Array, kv_pages: jax.Array, chip: Chip) -> None:
    """Raises ValueError for what the kernel does not take, with the rule."""
    (num_q_heads, head_dim), num_kv_heads = q.shape[1:], kv_pages.shape[2]
    capability = ".".join(map(str, chip.capability))
    if chip.capability < _MIN_CAPABILITY:
        raise ValueError(
            f"backend 'gpu' needs compute capability 8.0 or newer, not the {capability} of a "
            f"{chip.name}; pass backend='xla'"
        )
    if q.dtype not in _DTYPES:
        raise ValueError(
            f"backend 'gpu' multiplies bfloat16, float16 and float32, but q has dtype {q.dtype}"
        )
    if kv_pages.dtype not in (*_DTYPES, *_QUANTIZED):
        names = ", ".join(jnp.dtype(dtype).name for dtype in (*_DTYPES, *_QUANTIZED))
        raise ValueError(f"backend 'gpu' takes pages of {names}, not of {kv_pages.dtype}")
    if kv_pages.dtype not in (q.dtype, *_QUANTIZED) and q.dtype != jnp.float32:
        raise ValueError(
            f"backend 'gpu' converts pages to the dtype of q, but {kv_pages.dtype} does not fit "
            f"{q.dtype}; convert q to float32, or keep pages of {q.dtype}"
        )
    if kv_pages.dtype == jnp.float8_e4m3fn and chip.capability < _FLOAT8_CAPABILITY:
        raise ValueError(
            f"backend 'gpu' takes pages of float8_e4m3fn from compute capability 8.9 on, not on "
            f"the {capability} of a {chip.name}; keep pages of int8, or pass backend='xla'"
        )
    if head_dim > _MAX_HEAD_DIM:
        raise ValueError(f"backend 'gpu' takes head_dim up to {_MAX_HEAD_DIM}, not {head_dim}")
    if num_q_heads // num_kv_heads > _MAX_GROUP:
        raise ValueError(
            f"backend 'gpu' takes up to {_MAX_GROUP} query heads a KV head, not {num_q_heads} for "
            f"{num_kv_heads}"
        )
    # jax's offsets have 64 bits where the pool has more than 2**32 bytes, else 32 with a sign.
    size = math.prod(kv_pages.shape)
    if kv_pages.dtype.itemsize == 1 and 2**31 < size <= 2**32:
        raise ValueError(
            f"backend 'gpu' takes pools of {kv_pages.dtype} of up to 2**31 bytes or of more than "
            f"2**32, between which jax's Triton offsets overflow, but kv_pages has {size}; change "
            "the number of pages"
        )
    num_cells = math.prod(kv_pages.shape[:-1])
    if num_cells > 2**31:
        raise ValueError(
            f"backend 'gpu' takes pools of up to 2**31 cells, but kv_pages has {num_cells} in its "
            f"{kv_pages.shape[0]} layers"
        )


def _num_warps(plan: AttentionPlan) -> int:
    """As few as hold the running sums, of which 32 a thread leave registers for all the rest.

    Without tensor cores operands are in registers too, and more warps share them.
    """
    return 8 if plan.dtype == jnp.float32 or plan.tile_rows * _lanes(plan.head_dim) > 2**12 else 4


def _num_stages(plan: AttentionPlan) -> int:
    """How far Triton pipelines: `(stages - 1) // 2` blocks for page ids, and again for their cells.

    A large tile is alone on a multiprocessor, and is multiplied with a block of keys while two more
    come; small ones are several, each of which takes little shared memory so as to be more.
    """
    return 5 if plan.tile_rows == _LARGE_TILE else 3


def _smem_bytes(plan: AttentionPlan) -> int:
    """Shared memory: queries, blocks of keys and values, and weights that other warps multiply.

    An upper bound of what compiling was found to take, by less than 1 KiB in most cases.
    """
    lanes, num_blocks = _lanes(plan.head_dim), (_num_stages(plan) - 1) // 2
    tensor_cores = plan.dtype != jnp.float32
    # Without tensor cores, converted cells go through shared memory once more.
    cell_dtype = plan.kv_dtype if tensor_cores else plan.dtype
    queries = plan.tile_rows * lanes * plan.dtype.itemsize
    cells = num_blocks * plan.block_tokens * 2 * lanes * cell_dtype.itemsize
    weights = plan.tile_rows * plan.block_tokens * plan.dtype.itemsize
    if tensor_cores and plan.tile_rows == _LARGE_TILE:
        weights = 0  # each warp has rows of its own
    return queries + cells + weights + _SMEM_RESERVE_BYTES


def attend_tiles(
    q_rows: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    tiles: jax.Array,
    layer: jax.Array,
    scale: jax.Array,
    *,
    plan: AttentionPlan,
    chip: Chip | None = None,
    variant: AttentionVariant,
    interpret: bool = False,
) -> jax.Array:
    """See `gpu.attention.Lowering`; `interpret` runs it on any device, without Triton."""
    del chip  # the plan says all that there is to know
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(
            attention_kernel,
            plan=plan,
            num_pages=kv_pages.shape[1],
            variant=variant,
        ),
        grid=(plan.max_tiles, plan.num_kv_heads, plan.num_splits),
        in_specs=[whole] * 6,
        out_specs=whole,
        out_shape=plan.out_type,
        compiler_params=plt.CompilerParams(
            num_warps=_num_warps(plan), num_stages=_num_stages(plan)
        ),
        interpret=interpret,
        name="paged_attention",
    )(
        tiles,
        page_table,
        jnp.reshape(layer, (1,)),
        scale,
        q_rows,
        # The same memory as rows of cells, where one number says which.
        kv_pages.reshape(-1, plan.kv_dim),
    )


def attention_kernel(
    # Input
    tiles_ref,  # i32[max_tiles, len(FIELDS)]
    page_table_ref,  # i32[max_num_seqs, pages_per_seq]
    layer_ref,  # i32[1]
    scale_ref,  # f32[2]
    q_ref,  # [num_kv_heads, query_rows, head_dim]
    cells_ref,  # [num_layers * num_pages * num_kv_heads * page_size, kv_dim]
    # Output
    out_ref,  # [num_splits, num_kv_heads, query_rows, out_lanes]
    *,
    plan: AttentionPlan,
    num_pages: int,
    variant: AttentionVariant,
):
    """One split of a tile's keys, for one KV head."""
    tile, head, split = (pl.program_id(axis) for axis in range(3))

    def field(name):
        return tiles_ref[tile, work.FIELDS.index(name)]

    first_block = field("first_block") + split * field("split_blocks")
    end_block = jnp.minimum(first_block + field("split_blocks"), field("end_block"))

    @pl.when(first_block < end_block)
    def _():
        head_dim = plan.head_dim
        seq, layer, end_position = field("seq"), layer_ref[0], field("end_position")
        score_scale, result_scale = scale_ref[0], scale_ref[1]
        row = jnp.arange(plan.tile_rows, dtype=jnp.int32)
        lane = jnp.arange(_lanes(head_dim), dtype=jnp.int32)
        size = min(lane.shape[0], _FMA_LANES) if plan.dtype == jnp.float32 else lane.shape[0]
        parts = [i + jnp.arange(size, dtype=jnp.int32) for i in range(0, head_dim, size)]
        query_row = field("first") + row
        own = (row >= field("own_start")) & (row < field("own_end"))

        def position_of(query_row):
            return jax.lax.div(query_row, plan.group) + field("to_position")

        position = position_of(query_row)
        lowest = 0
        if variant.sliding_window is not None:
            lowest = position_of(field("first") + field("own_start")) - variant.sliding_window + 1

        def within(mask, lane):
            """`mask` of rows, for those lanes that a row has."""
            mask, in_row = _grid(mask, lane < head_dim)
            return mask if _lanes(head_dim) == head_dim else mask & in_row

        def attend(index, carry):
            acc, peak, total = carry
            key = index * plan.block_tokens + jnp.arange(plan.block_tokens, dtype=jnp.int32)
            # Of other keys, the cell can hold NaN, and the table anything at all.
            live = (key >= lowest) & (key < end_position)
            page = jax.lax.div(key, plan.page_size)
            page_id = plt.load(page_table_ref.at[seq, page], mask=live, other=0)
            cell = ((layer * num_pages + page_id) * plan.num_kv_heads + head) * plan.page_size
            cell += jax.lax.rem(key, plan.page_size)

            def load(lane, offset):
                return plt.load(
                    cells_ref.at[_grid(cell, offset + lane)],
                    mask=within(live, lane),
                    other=jnp.zeros((), plan.kv_dtype),
                ).astype(plan.dtype)

            scores = [
                _multiply(q, load(part, 0), 1) for q, part in zip(q_parts, parts, strict=True)
            ]
            scores = functools.reduce(jnp.add, scores)
            if variant.soft_cap is None:
                scores = scores * (score_scale * _LOG2_E)
            else:
                # tanh(x) = 1 - 2 / (1 + exp(2 x)): off by little beside 1, if not beside itself.
                power = jnp.exp2(scores * (score_scale * (2 * _LOG2_E / variant.soft_cap)))
                scores = (variant.soft_cap * _LOG2_E) * (1 - 2 / (1 + power))
            visible = variant.sees(keys=key[None, :], queries=position[:, None])
            scores = jnp.where(visible, scores, _MASKED)
            new_peak = jnp.maximum(peak, scores.max(axis=1))
            shrink = jnp.exp2(peak - new_peak)
            # A query that has seen no key yet gives weight to masked ones; the first key that it
            # sees shrinks that to 0. If it sees none in this split, the lse says so: about _MASKED.
            weights = jnp.exp2(scores - new_peak[:, None])
            total = total * shrink + weights.sum(axis=1)
            added = _multiply(weights.astype(plan.dtype), load(lane, head_dim), 0)
            return acc * shrink[:, None] + added, new_peak, total

        q_parts = [
            plt.load(
                q_ref.at[(head, *_grid(query_row, part))],
                mask=within(row < plan.tile_rows, part),
                other=jnp.zeros((), plan.dtype),
            )
            for part in parts
        ]
        start = (
            jnp.zeros((plan.tile_rows, _lanes(head_dim)), jnp.float32),
            jnp.full((plan.tile_rows,), _MASKED, jnp.float32),
            jnp.zeros((plan.tile_rows,), jnp.float32),
        )
        acc, peak, total = jax.lax.fori_loop(first_block, end_block, attend, start)

        out = acc * (result_scale / total)[:, None]
        at = (split, head, *_grid(query_row, lane))
        plt.store(out_ref.at[at], out.astype(out_ref.dtype), mask=within(own, lane))
        if plan.gives_lse:
            lse = peak / _LOG2_E + jnp.log(total)
            lse_lane = head_dim + jnp.arange(work.LSE_LANES, dtype=jnp.int32)
            at = (split, head, *_grid(query_row, lse_lane))
            plt.store(out_ref.at[at], _grid(lse, lse_lane)[0], mask=_grid(own, lse_lane)[0])


def _grid(rows: jax.Array, lanes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[rows] and [lanes] as [rows, lanes] each, which indexes both where Triton interprets too."""
    shape = (*rows.shape, *lanes.shape)
    return (
        jax.lax.broadcast_in_dim(rows, shape, (0,)),
        jax.lax.broadcast_in_dim(lanes, shape, (1,)),
    )


def _multiply(a: jax.Array, b: jax.Array, contracted: int) -> jax.Array:
    """f32[rows, columns]: the product of rows of `a` with columns, or rows, of `b`."""
    # Without it, float32 is rounded to the 11 bits of tensor cores.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _lanes(head_dim: int) -> int:
    """Lanes that a key takes in registers."""
    return max(_MIN_DOT, _power_of_two(head_dim))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
