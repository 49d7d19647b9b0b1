# SPDX-License-Identifier: Apache-2.0
"""Writes to the page pool on TPUs, in place: of the pool, only the written strips move."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jpaged.pallas_kernels.layout import NULL_PAGE
from jpaged.pallas_kernels.reference import pack_cells
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.tpu.plan import (
    LANES,
    SUBLANES,
    check_pool,
    check_scalars,
    check_vmem,
    round_up,
    vmem_limit,
)
from jpaged.pallas_kernels.worklist import expand

# Vector memory for strips on their way; half of them are read ahead, half are being written.
_STRIPS_BYTES = 4 * 2**20
_MAX_STRIPS = 8
_STRIP_FIELDS = ("page_id", "slot", "first", "end", "token")


@jax.jit  # like attention
def write_kv(kv_pages, k, v, rows: Rows, *, layer, kv_scale) -> jax.Array:
    """See `pallas_kernels.write_kv`.

    Memory moves in tiles of 8 to 32 slots, depending on the dtype. Each such strip that gets a
    token is read, merged with its new tokens and written back, several at once.
    """
    check_pool(kv_pages)
    strip_slots = math.gcd(SUBLANES * 4 // kv_pages.dtype.itemsize, kv_pages.shape[3])
    strips, num_strips = _make_strips(rows, k.shape[0], kv_pages.shape[3], strip_slots)
    smem_bytes = 4 * SUBLANES * round_up(strips.shape[1], LANES)
    check_scalars("a token write", smem_bytes, rows.max_num_seqs)
    # In float32, which every pool dtype fits in, and padded so that a strip's tokens can be fetched
    # with those around them: cell `slot` of a strip then lies at place `slot`.
    cells = pack_cells(k, v, kv_pages.dtype, kv_scale).astype(jnp.float32)
    pad_lanes = kv_pages.shape[4] - cells.shape[2]
    cells = jnp.pad(cells, ((strip_slots, strip_slots), (0, 0), (0, pad_lanes)))
    scalars = jnp.stack([num_strips, jnp.asarray(layer, jnp.int32)])
    strip = (kv_pages.shape[2], strip_slots, kv_pages.shape[4])
    # Either is padded to whole tiles.
    strip_bytes = 4 * round_up(strip[0], SUBLANES) * round_up(strip_slots, SUBLANES) * strip[2]
    at_once = max(2, min(_MAX_STRIPS, _STRIPS_BYTES // (2 * strip_bytes) // 2 * 2))
    # Beside the strips, those of float32 that are merged at the moment, as they come and turned.
    vmem_bytes = (2 * at_once + 3) * strip_bytes
    check_vmem(f"a token write to {strip[0]} KV heads of {strip[2]} lanes", vmem_bytes)
    return pl.pallas_call(
        functools.partial(_write_kernel, num_lanes=2 * k.shape[2]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(),
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[
                pltpu.VMEM((at_once, *strip), kv_pages.dtype),
                pltpu.VMEM((at_once, strip_slots, strip[0], strip[2]), jnp.float32),
                pltpu.SemaphoreType.DMA((3, at_once)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
        input_output_aliases={3: 0},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem_limit(vmem_bytes)),
        name="write_kv",
    )(strips, scalars, cells, kv_pages)


def _make_strips(rows: Rows, num_tokens: int, page_size: int, strip_slots: int):
    """Which strips get tokens.

    Returns:
      i32[len(_STRIP_FIELDS), max_strips] and how many of them are live. A strip is slots
      `[slot, slot + strip_slots)` of a page; those from `slot + first` to `slot + end` get the
      tokens from `token` on.
    """
    kv_lens, q_lens = rows.kv_lens, rows.q_lens()
    first_position = kv_lens - q_lens
    first_strip = first_position // strip_slots
    counts = jnp.where(q_lens > 0, (kv_lens - 1) // strip_slots + 1 - first_strip, 0)
    max_strips = min(num_tokens, num_tokens // strip_slots + 2 * rows.max_num_seqs)
    row, offset, num_strips = expand(counts, max_strips)
    start = (first_strip[row] + offset) * strip_slots
    first = jnp.maximum(start, first_position[row])
    fields = {
        "page_id": rows.page_table.at[row, start // page_size].get(mode="clip"),
        "slot": start % page_size,
        "first": first - start,
        "end": jnp.minimum(start + strip_slots, kv_lens[row]) - start,
        "token": rows.cu_q_lens[row] + first - first_position[row],
    }
    return jnp.stack([fields[name] for name in _STRIP_FIELDS]), num_strips


def _write_kernel(
    # Prefetch
    strips_ref,  # i32[fields, max_strips]
    scalars_ref,  # i32[2]: live strips, layer
    # Input
    cells_ref,  # HBM f32[strip_slots + num_tokens + strip_slots, num_kv_heads, kv_dim]
    kv_pages_ref,  # HBM [num_layers, num_pages, num_kv_heads, page_size, kv_dim]
    # Output
    out_ref,  # HBM, the same memory as kv_pages_ref
    # Scratch
    strip_ref,  # [at_once, num_kv_heads, strip_slots, kv_dim]
    new_ref,  # f32[at_once, strip_slots, num_kv_heads, kv_dim]
    sems,  # DMA[3, at_once]: strips read, tokens read, strips written
    *,
    num_lanes: int,
):
    """Reads run some strips ahead of the merging, writes may take as many strips to end."""
    del kv_pages_ref
    num_strips, layer = scalars_ref[0], scalars_ref[1]
    at_once, _, strip_slots, kv_dim = strip_ref.shape
    ahead = at_once // 2

    def field(name, strip):
        return strips_ref[_STRIP_FIELDS.index(name), strip]

    def home(strip):
        slots = pl.ds(pl.multiple_of(field("slot", strip), strip_slots), strip_slots)
        return out_ref.at[layer, field("page_id", strip), :, slots, :]

    def read_strip(strip):
        at = strip % at_once
        return pltpu.make_async_copy(home(strip), strip_ref.at[at], sems.at[0, at])

    def write_strip(strip):
        at = strip % at_once
        return pltpu.make_async_copy(strip_ref.at[at], home(strip), sems.at[2, at])

    def read_tokens(strip, act):
        """Starts or awaits the copy of a strip's tokens: its one, or all around its several."""
        at, first, token = strip % at_once, field("first", strip), field("token", strip)
        single = field("end", strip) == first + 1

        @pl.when(single)
        def _():
            source, target = cells_ref.at[token + strip_slots], new_ref.at[at, first]
            act(pltpu.make_async_copy(source, target, sems.at[1, at]))

        @pl.when(jnp.logical_not(single))
        def _():
            source = cells_ref.at[pl.ds(token - first + strip_slots, strip_slots)]
            act(pltpu.make_async_copy(source, new_ref.at[at], sems.at[1, at]))

    def start_reads(strip):
        @pl.when(strip < num_strips)
        def _():
            read_strip(strip).start()
            read_tokens(strip, lambda copy: copy.start())

    def merge(strip, _):
        # What is read next goes where this earlier strip was.
        earlier = strip + ahead - at_once

        @pl.when(earlier >= 0)
        def _():
            write_strip(earlier).wait()

        start_reads(strip + ahead)
        read_strip(strip).wait()
        read_tokens(strip, lambda copy: copy.wait())
        at = strip % at_once
        slot = jax.lax.broadcasted_iota(jnp.int32, (strip_slots, kv_dim), 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, (strip_slots, kv_dim), 1)
        written = (slot >= field("first", strip)) & (slot < field("end", strip))
        written &= lane < num_lanes
        new = jnp.swapaxes(new_ref[at], 0, 1)
        for head in range(new.shape[0]):
            cells = new[head].astype(strip_ref.dtype)
            strip_ref[at, head] = jnp.where(written, cells, strip_ref[at, head])
        write_strip(strip).start()

    for strip in range(ahead):
        start_reads(strip)
    jax.lax.fori_loop(0, num_strips, merge, None)
    # Those that no later strip has waited for.
    first_open = jnp.maximum(num_strips + ahead - at_once, 0)
    jax.lax.fori_loop(first_open, num_strips, lambda i, _: write_strip(i).wait(), None)


@jax.jit
def copy_pages(kv_pages, src_page_ids, dst_page_ids):
    """See `pallas_kernels.copy_pages`; every source is read before any page is written."""
    check_pool(kv_pages)
    num_copies = src_page_ids.shape[0]
    check_scalars("a page copy", 2 * 4 * round_up(num_copies, LANES), num_copies)
    if not num_copies:
        return kv_pages
    held = (num_copies, kv_pages.shape[0], *kv_pages.shape[2:])
    out, _ = pl.pallas_call(
        _copy_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(),
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=[pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=pltpu.HBM)],
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, kv_pages.dtype) for shape in (kv_pages.shape, held)],
        input_output_aliases={2: 0},
        name="copy_pages",
    )(src_page_ids, dst_page_ids, kv_pages)
    return out


def _copy_kernel(
    # Prefetch
    src_ref,  # i32[num_copies]
    dst_ref,  # i32[num_copies]
    # Input
    kv_pages_ref,  # HBM [num_layers, num_pages, num_kv_heads, page_size, kv_dim]
    # Output
    out_ref,  # HBM, the same memory as kv_pages_ref
    held_ref,  # HBM [num_copies, num_layers, num_kv_heads, page_size, kv_dim]
    # Scratch
    sem,  # DMA
):
    del kv_pages_ref

    num_layers = out_ref.shape[0]

    def for_each(make_copy):
        """Starts all copies, then waits for all."""
        for act in ("start", "wait"):

            def one(i, _, act=act):
                # Padding copies the null page, which nobody reads.
                @pl.when(dst_ref[i] != NULL_PAGE)
                def _():
                    # Layer by layer: a copy of all has the bytes of a layer as its stride, which
                    # the compiler keeps in 32 bits (docs/decisions.md).
                    jax.lax.fori_loop(
                        0, num_layers, lambda layer, _: getattr(make_copy(i, layer), act)(), None
                    )

            jax.lax.fori_loop(0, src_ref.shape[0], one, None)

    def home(ids_ref, i, layer):
        return out_ref.at[layer, ids_ref[i]]

    def held(i, layer):
        return held_ref.at[i, layer]

    for_each(lambda i, n: pltpu.make_async_copy(home(src_ref, i, n), held(i, n), sem))
    for_each(lambda i, n: pltpu.make_async_copy(held(i, n), home(dst_ref, i, n), sem))
