# SPDX-License-Identifier: Apache-2.0
"""Our kernels, and jax's own, compiled for TPUs, and the facts read off them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.pallas_kernels import layout, tpu
from jpaged.pallas_kernels.aot.cases import AttentionShape, Struct, pool_struct, rows_struct
from jpaged.pallas_kernels.aot.program import in_place_error, try_compile
from jpaged.pallas_kernels.aot.schedule import Loop, Schedule
from jpaged.pallas_kernels.aot.tpu import TARGETS, TpuCompiler
from jpaged.pallas_kernels.tpu.plan import plan_attention
from jpaged.pallas_kernels.tuning import TpuTiles

_NUM_COPIES = 8


@dataclasses.dataclass(frozen=True)
class KernelFacts:
    """What the compiler says of a kernel; None where it does not say.

    Attributes:
      bundles_per_kv_token: of the loop that does most of the work, all heads; a rank, no time.
      dma_bytes_per_kv_token: what that loop copies.
      vmem_bytes: vector memory.
      smem_bytes: scalar memory, as planned.
      spill_bytes: vector memory for registers that did not suffice, of all loops.
      busiest_unit: the kind of unit that has most of its slots in use in that loop.
      busiest_share: the share of them.
      temp_bytes: device memory that the call takes beside arguments and results.
      error: why it does not compile; then the rest is None.
    """

    bundles_per_kv_token: float | None = None
    dma_bytes_per_kv_token: float | None = None
    vmem_bytes: int | None = None
    smem_bytes: int | None = None
    spill_bytes: int | None = None
    busiest_unit: str | None = None
    busiest_share: float | None = None
    temp_bytes: int | None = None
    error: str | None = None


def kv_bytes_per_token(shape: AttentionShape, kv_dtype: Any) -> int:
    """Bytes of a token's keys and values in one layer, as stored on a TPU."""
    cell = layout.kv_pages_shape(1, 1, shape.num_kv_heads, 1, shape.head_dim, backend="tpu")
    return layout.page_bytes(cell, kv_dtype)


def floor_s(target: str, num_bytes: float) -> float:
    """Seconds that memory needs at least to give so many bytes."""
    return num_bytes / TARGETS[target].hbm_bytes_per_s


def compile_attention(
    compiler: TpuCompiler,
    target: str,
    shape: AttentionShape,
    *,
    num_rows: int = 64,
    kv_len: int = 2048,
    num_tokens: int | None = None,
    page_size: int = 16,
    dtype: Any = jnp.bfloat16,
    kv_dtype: Any = None,
    num_pages: int | None = None,
    tiles: TpuTiles | None = None,
) -> KernelFacts:
    """Compiles one call of our attention: decode, or with more tokens than rows, prefill.

    Args:
      compiler: with schedules.
      target: a generation of `pallas_kernels.aot.TARGETS`.
      shape: the layer's.
      num_rows: sequences.
      kv_len: tokens that the page table has room for.
      num_tokens: of the step; as many as rows by default.
      page_size: tokens a page holds.
      dtype: of queries.
      kv_dtype: of the pool; dtype by default.
      num_pages: of the pool; by default as many as all rows need.
      tiles: instead of those of `pallas_kernels.tuning`.

    Returns:
      The facts of the kernel for decode, or of that for prefill.
    """
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    num_tokens = num_tokens or num_rows
    decode = num_tokens <= num_rows
    q: Any = Struct((num_tokens, shape.num_q_heads, shape.head_dim), dtype)
    pool: Any = pool_struct(
        shape, num_pages or num_rows * kv_len // page_size + 1, page_size, kv_dtype
    )
    rows = rows_struct(num_rows, -(-kv_len // page_size))
    mesh = compiler.mesh(target)

    def attend(q, pool, layer, scale, sinks, rows):
        return tpu.paged_attention(
            q, pool, rows, shape.variant, layer=layer, kv_scale=scale, sinks=sinks, tiles=tiles
        )

    scale = Struct((2,), jnp.float32)
    layer = Struct((), jnp.int32)
    compiled = try_compile(compiler, mesh, attend, q, pool, layer, scale, shape.sinks_struct, rows)
    if isinstance(compiled, str):
        return KernelFacts(error=compiled)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        plan = plan_attention(q, pool, rows, decode=decode, tiles=tiles)
    kind = "decode" if decode else "prefill"
    schedule = compiler.schedule(target, f"paged_attention_{kind}")
    num_spans = plan.max_tiles(num_tokens, num_rows) * plan.num_parts(rows.pages_per_seq)
    return _facts(schedule, plan.group_tokens, compiled, plan.smem_bytes(num_spans))


def compile_write(
    compiler: TpuCompiler,
    target: str,
    shape: AttentionShape,
    *,
    num_rows: int = 64,
    kv_len: int = 2048,
    page_size: int = 16,
    dtype: Any = jnp.bfloat16,
    kv_dtype: Any = None,
    num_pages: int | None = None,
) -> KernelFacts:
    """Compiles one token write of a decode step; see `compile_attention`."""
    pool = pool_struct(
        shape, num_pages or num_rows * kv_len // page_size + 1, page_size, kv_dtype or dtype
    )
    new = Struct((num_rows, shape.num_kv_heads, shape.head_dim), dtype)

    def write(pool, k, v, layer, scale, rows):
        return tpu.write_kv(pool, k, v, rows, layer=layer, kv_scale=scale)

    layer, scale = Struct((), jnp.int32), Struct((2,), jnp.float32)
    rows = rows_struct(num_rows, -(-kv_len // page_size))
    return _in_place(compiler, target, write, pool, new, new, layer, scale, rows)


def compile_copy(
    compiler: TpuCompiler,
    target: str,
    shape: AttentionShape,
    *,
    num_rows: int = 64,
    kv_len: int = 2048,
    page_size: int = 16,
    dtype: Any = jnp.bfloat16,
    kv_dtype: Any = None,
    num_pages: int | None = None,
) -> KernelFacts:
    """Compiles a copy of eight pages; see `compile_attention`."""
    pool = pool_struct(
        shape, num_pages or num_rows * kv_len // page_size + 1, page_size, kv_dtype or dtype
    )
    ids = Struct((_NUM_COPIES,), jnp.int32)
    # It holds all pages before it writes the first.
    held_bytes = _NUM_COPIES * layout.page_bytes(pool.shape, pool.dtype)
    return _in_place(compiler, target, tpu.copy_pages, pool, ids, ids, held_bytes=held_bytes)


def _in_place(
    compiler: TpuCompiler,
    target: str,
    function: Callable[..., Any],
    pool: Struct,
    *args: Any,
    held_bytes: int = 0,
) -> KernelFacts:
    """Compiles what must give its first argument back, in the same memory."""
    mesh = compiler.mesh(target)
    compiled = try_compile(compiler, mesh, function, pool, *args, donate_argnums=(0,))
    if isinstance(compiled, str):
        return KernelFacts(error=compiled)
    memory = compiled.memory_analysis()
    assert memory is not None
    error = in_place_error(compiled, pool, held_bytes)
    return KernelFacts(temp_bytes=memory.temp_size_in_bytes, error=error)


def compile_ragged(
    compiler: TpuCompiler,
    target: str,
    shape: AttentionShape,
    *,
    num_rows: int = 64,
    kv_len: int = 2048,
    page_size: int = 16,
    blocks: tuple[int, int] = (16, 8),
) -> KernelFacts:
    """Compiles `jax.experimental.pallas.ops.tpu.ragged_paged_attention` for the same decode.

    Args:
      compiler: with schedules.
      target: a generation of `pallas_kernels.aot.TARGETS`.
      shape: the layer's.
      num_rows: sequences.
      kv_len: tokens that the page table has room for.
      page_size: tokens a page holds.
      blocks: pages and queries that the kernel takes at once.
    """
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    q = Struct((num_rows, shape.num_q_heads, shape.head_dim), jnp.bfloat16)
    num_pages = num_rows * kv_len // page_size + 1
    pages = Struct((num_pages, page_size, 2 * shape.num_kv_heads, shape.head_dim), jnp.bfloat16)
    rows = rows_struct(num_rows, -(-kv_len // page_size))
    attend = functools.partial(
        ragged_paged_attention,
        sliding_window=shape.sliding_window,
        soft_cap=shape.soft_cap,
        num_kv_pages_per_block=blocks[0],
        num_queries_per_block=blocks[1],
    )
    mesh = compiler.mesh(target)
    index = (rows.kv_lens, rows.page_table, rows.cu_q_lens, rows.num_seqs)
    compiled = try_compile(compiler, mesh, attend, q, pages, *index)
    if isinstance(compiled, str):
        return KernelFacts(error=compiled)
    schedule = compiler.schedule(target, "ragged_paged_attention_kernel")
    table_bytes = 4 * rows.max_num_seqs * rows.pages_per_seq
    return _facts(schedule, blocks[0] * page_size, compiled, table_bytes)


def compile_case(
    compiler: TpuCompiler, target: str, case: dict[str, Any]
) -> dict[str, KernelFacts]:
    """Compiles all kernels for one of `coverage_cases`."""
    # A prefill of a few rows; the token axis is no multiple of any tile.
    tokens = case.get("num_rows", 64) + 203
    return {
        "decode": compile_attention(compiler, target, **case),
        "prefill": compile_attention(compiler, target, num_tokens=tokens, **case),
        "write": compile_write(compiler, target, **case),
        "copy": compile_copy(compiler, target, **case),
    }


def _facts(
    schedule: Schedule, tokens: int, compiled: jax.stages.Compiled, smem_bytes: int
) -> KernelFacts:
    """The facts of the innermost loop that copies most; `tokens` is what a trip attends to."""
    memory = compiled.memory_analysis()
    assert memory is not None
    loop = busiest_loop(schedule)
    unit, share = max(loop.slots.items(), key=lambda item: item[1])
    return KernelFacts(
        bundles_per_kv_token=loop.bundles / tokens,
        dma_bytes_per_kv_token=loop.dma_bytes / tokens,
        vmem_bytes=schedule.vmem_bytes,
        smem_bytes=smem_bytes,
        spill_bytes=schedule.spill_bytes,
        busiest_unit=unit,
        busiest_share=round(share, 3),
        temp_bytes=memory.temp_size_in_bytes,
    )


def busiest_loop(schedule: Schedule) -> Loop:
    """The loop over groups of pages: of those that copy most in the grid's body, the shortest."""
    inner = [loop for loop in schedule.loops if loop.depth > 1]
    most = max(loop.dma_bytes for loop in inner)
    return min((loop for loop in inner if loop.dma_bytes == most), key=lambda loop: loop.bundles)
