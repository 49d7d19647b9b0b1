# SPDX-License-Identifier: Apache-2.0
"""The Mosaic GPU lowering of attention, for Hopper and Blackwell.

A thread block has one KV head, one tile of queries and one split of its keys. Blocks of keys and
values come by TMA, some of them ahead, page by page through the page table; each warpgroup meets
them with its rows of the tile on the tensor cores, in an online softmax of base 2.

Source: Shah et al. 2024, "FlashAttention-3"; its warpgroups that only fetch are left out, so that
several thread blocks fit on a multiprocessor and hide each other's waits.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.pallas_kernels.gpu import mosaic_narrow, work
from jpaged.pallas_kernels.gpu.chip import Chip
from jpaged.pallas_kernels.gpu.mosaic_kernel import (
    OUT_ROW_BYTES,
    Warpgroup,
    attend_tile,
    pieces,
)
from jpaged.pallas_kernels.gpu.mosaic_pages import BLOCK_TOKENS, block_pages
from jpaged.pallas_kernels.gpu.tensor_core import Blackwell, Hopper
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant

# What a multiprocessor keeps of its shared memory for each thread block.
_BLOCK_SMEM_BYTES = 1024
# Thread blocks that a multiprocessor has at once: with queries as rows registers suffice for two.
_WIDE_BLOCKS_PER_SM = 2
_MAX_BLOCKS_PER_SM = 4
_MIN_STAGES = 2
_MAX_STAGES = 4
# What the compiler takes of a thread block's shared memory beside what is planned: barriers.
_SMEM_RESERVE_BYTES = 2048


def tensor_core_of(chip: Chip) -> Hopper | Blackwell:
    """The chip's tensor cores."""
    return Hopper() if chip.capability[0] == 9 else Blackwell()


def plan_attention(
    q: jax.Array, kv_pages: jax.Array, rows: Rows, chip: Chip, *, narrow: bool = False
) -> work.AttentionPlan:
    """See `gpu.attention.Lowering`.

    `narrow` is whether keys are rows where they can be: see `gpu.narrow`.
    """
    head_dim, page_size = q.shape[2], kv_pages.shape[3]
    eight_bit = kv_pages.dtype in (jnp.int8, jnp.float8_e4m3fn)
    if kv_pages.dtype != q.dtype and not eight_bit:
        raise ValueError(
            f"backend 'gpu' takes pages of the queries' dtype {q.dtype}, int8 or float8_e4m3fn, "
            f"not of {kv_pages.dtype}"
        )
    step = 32 if eight_bit else 16
    if head_dim % step or head_dim > 256:
        raise ValueError(
            f"backend 'gpu' needs a head_dim that is a multiple of {step} and at most 256 over "
            f"pages of {kv_pages.dtype}, not {head_dim}"
        )
    if page_size < 8 or (BLOCK_TOKENS % page_size and page_size % BLOCK_TOKENS):
        raise ValueError(
            f"backend 'gpu' needs a page_size of 8, 16, 32 or a multiple of {BLOCK_TOKENS}, not "
            f"{page_size}"
        )
    if math.prod(kv_pages.shape[:4]) >= 2**31:
        raise ValueError(
            f"kv_pages of shape {list(kv_pages.shape)} has {math.prod(kv_pages.shape[:4])} cells, "
            f"more than the {2**31 - 1} that backend 'gpu' counts; lower num_pages"
        )
    # A second warpgroup saves reading keys once more, but 8-bit pages are converted by one alone.
    cores, is_decode = tensor_core_of(chip), rows.is_decode(q.shape[0])
    num_wgs = 1 if is_decode or eight_bit else cores.max_wgs
    tile_rows = [cores.rows * count for count in range(num_wgs, 0, -1)]
    group = q.shape[1] // kv_pages.shape[2]
    narrow = narrow and is_decode and isinstance(cores, Hopper)
    if narrow and mosaic_narrow.takes(group, head_dim):
        tile_rows = [group]
    for count in tile_rows:
        plan = work.plan_attention(
            q,
            kv_pages,
            rows,
            tile_rows=count,
            block_tokens=BLOCK_TOKENS,
            chip=chip,
        )
        least = smem_bytes(plan, _MIN_STAGES)
        if least <= chip.smem_bytes:
            return plan
    raise ValueError(
        f"backend 'gpu' with head_dim {head_dim} over pages of {kv_pages.dtype} needs "
        f"{least} bytes of shared memory, more than the {chip.smem_bytes} that a thread "
        f"block of {chip.name!r} can have"
    )


def smem_bytes(plan: work.AttentionPlan, num_stages: int) -> int:
    """Shared memory of a thread block that has so many blocks of keys and values in it."""
    cells = BLOCK_TOKENS * 2 * plan.head_dim
    operands = (plan.head_dim + BLOCK_TOKENS) * plan.dtype.itemsize
    if is_narrow(plan):
        results = 4 * (plan.head_dim + BLOCK_TOKENS)
        rows = mosaic_narrow.num_columns(plan) * (operands + results)
    else:
        rows = plan.tile_rows * (operands + OUT_ROW_BYTES)
    converted = 0 if plan.kv_dtype == plan.dtype else cells * plan.dtype.itemsize
    stages = num_stages * cells * plan.kv_dtype.itemsize
    return rows + converted + stages + _SMEM_RESERVE_BYTES


def is_narrow(plan: work.AttentionPlan) -> bool:
    """Whether the kernel is that of `mosaic_narrow`, whose tiles are smaller than all others."""
    return plan.tile_rows <= mosaic_narrow.MAX_GROUP


def blocks_per_sm(plan: work.AttentionPlan, chip: Chip) -> int:
    """Thread blocks that a multiprocessor has at once: if they are narrow, as many as fit."""
    if not is_narrow(plan):
        return _WIDE_BLOCKS_PER_SM
    fits = (chip.smem_bytes + _BLOCK_SMEM_BYTES) // (
        smem_bytes(plan, _MIN_STAGES) + _BLOCK_SMEM_BYTES
    )
    return max(1, min(fits, _MAX_BLOCKS_PER_SM))


def choose_stages(plan: work.AttentionPlan, chip: Chip) -> int:
    """Blocks of keys and values that a thread block has, of which all but one are on their way.

    As many as fit, and leave a small tile's multiprocessor room for other thread blocks.
    """
    limit = chip.smem_bytes
    if plan.tile_rows <= tensor_core_of(chip).rows:
        limit = (limit + _BLOCK_SMEM_BYTES) // blocks_per_sm(plan, chip) - _BLOCK_SMEM_BYTES
    fits = [n for n in range(_MIN_STAGES, _MAX_STAGES + 1) if smem_bytes(plan, n) <= limit]
    return max(fits, default=_MIN_STAGES)


def attend_tiles(
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
    """See `gpu.attention.Lowering`."""
    cores = tensor_core_of(chip)
    narrow, head_dim, dtype = is_narrow(plan), plan.head_dim, plan.dtype
    num_wgs = 1 if narrow else plan.tile_rows // cores.rows
    num_stages = choose_stages(plan, chip)
    rows = mosaic_narrow.num_columns(plan) if narrow else cores.rows
    cells, out_dtype = (BLOCK_TOKENS, 2 * head_dim), plan.out_type.dtype
    params = {}
    scratch = {
        "q": plgpu.SMEM((num_wgs, rows, head_dim), dtype, transforms=_tiled(head_dim, dtype)),
        "kv": plgpu.SMEM(
            (num_stages, *cells), plan.kv_dtype, transforms=_tiled(head_dim, plan.kv_dtype)
        ),
        "weights": plgpu.SMEM(
            (num_wgs, rows, BLOCK_TOKENS), dtype, transforms=_tiled(head_dim, dtype)
        ),
        "kv_ready": plgpu.Barrier(num_arrivals=block_pages(plan), num_barriers=num_stages),
        "kv_done": plgpu.Barrier(num_arrivals=num_wgs, num_barriers=num_stages),
        "cleared": plgpu.Barrier(num_arrivals=num_wgs),
    }
    if narrow:
        scratch |= {
            "out": plgpu.SMEM((rows, head_dim), out_dtype),
            "lse": plgpu.SMEM((rows, BLOCK_TOKENS), jnp.float32),
            "q_ready": plgpu.Barrier(),
        }
        q_rows = mosaic_narrow.pad_columns(q_rows, plan)
        # What the largest of all rows takes for 8 columns, so that a third thread block fits.
        params["reduction_scratch_bytes"] = rows * 128
    else:
        scratch["out"] = plgpu.SMEM((num_wgs, rows, OUT_ROW_BYTES // out_dtype.itemsize), out_dtype)
    if plan.kv_dtype != dtype:
        scratch["converted"] = plgpu.SMEM(cells, dtype, transforms=_tiled(head_dim, dtype))
    lanes = {"scores": BLOCK_TOKENS} | {
        f"values{lane}": width for lane, width in pieces(head_dim, cores.max_value_lanes)
    }
    kernel = plgpu.kernel(
        functools.partial(
            attend_tile,
            plan=plan,
            cores=cores,
            num_pages=kv_pages.shape[1],
            variant=variant,
            warpgroup_type=mosaic_narrow.NarrowWarpgroup if narrow else Warpgroup,
        ),
        out_type=plan.out_type,
        # The last axis is the fastest: thread blocks side by side read all of a page, head by head.
        grid=(plan.max_tiles, plan.num_splits, plan.num_kv_heads),
        grid_names=("tile", "split", "head"),
        num_threads=num_wgs,
        thread_name="wg",
        scratch_types={"scratch": scratch | cores.scratch(lanes)},
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, **params
        ),
        kernel_name="paged_attention",
    )
    all_cells = kv_pages.reshape(-1, plan.kv_dim)
    return kernel(tiles, page_table, layer[None], scale, q_rows, all_cells)


def _tiled(head_dim: int, dtype: np.dtype):
    """How wgmma and tcgen05 want operands: in tiles as wide as both keys and values split into."""
    itemsize = np.dtype(dtype).itemsize
    swizzle = next(size for size in (128, 64, 32) if head_dim * itemsize % size == 0)
    return (plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle))
