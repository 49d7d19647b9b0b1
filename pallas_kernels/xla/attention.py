# SPDX-License-Identifier: Apache-2.0
"""Paged attention as loops whose trip counts follow the live pages."""

import functools

import jax
import jax.numpy as jnp

from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant
from jpaged.pallas_kernels.xla.bits import as_bits, from_bits

# Tokens whose keys and values are gathered at once, for every page size that divides it: the order
# of every sum then depends on positions alone.
_KV_BLOCK_TOKENS = 128
_QUERY_TILE_TOKENS = 16
# Up to this many pages of a block are copied one by one for a single query: 1.4 times as fast as
# a gather, but more to compile (measured with 8 pages).
_MAX_SLICED_PAGES = 16
# Finite, so that rows that have seen no key yet subtract to 0 and not to NaN.
_MASKED = -1e30


# Jitted by itself so that a model's layers, which differ in `layer` alone, trace and lower it once.
@functools.partial(jax.jit, static_argnames="variant")
def paged_attention(
    q, kv_pages, rows: Rows, variant: AttentionVariant, *, layer, kv_scale, sinks=None
) -> jax.Array:
    """See `pallas_kernels.paged_attention`.

    Two nested loops: tiles of the live rows' queries, and blocks of keys up to the last one that
    the tile can see. Tiles and blocks start at multiples of their size in the sequence, so
    that a query is computed the same way however its prompt was cut into chunks. A step that has no
    more tokens than rows is taken for decode and gets tiles of one query.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, page_size = kv_pages.shape[2:4]
    group = num_q_heads // num_kv_heads
    kv_lens, cu_q_lens = rows.kv_lens, rows.cu_q_lens
    tile = 1 if rows.is_decode(num_tokens) else _QUERY_TILE_TOKENS
    block_pages = max(1, _KV_BLOCK_TOKENS // page_size)
    block = block_pages * page_size
    # The last block of a full row must not run past the table: dynamic_slice would shift it.
    page_table = jnp.pad(rows.page_table, ((0, 0), (0, -rows.pages_per_seq % block_pages)))
    layer, bits = jnp.int32(layer), as_bits(kv_pages)
    scale = jnp.ones(2, jnp.float32) if kv_scale is None else kv_scale.astype(jnp.float32)

    # A tile may reach past its row's queries on both sides; padding keeps the slices in range.
    pad = tile - 1
    scaled = q.astype(jnp.float32) * (variant.scale(head_dim) * scale[0])
    scaled = jnp.pad(scaled, ((pad, pad), (0, 0), (0, 0)))

    # Row r owns the tiles [last_tiles[r - 1], last_tiles[r]).
    first_positions = kv_lens - (cu_q_lens[1:] - cu_q_lens[:-1])
    num_tiles = (kv_lens + tile - 1) // tile - first_positions // tile
    num_tiles = jnp.where(jnp.arange(rows.max_num_seqs) < rows.num_seqs[0], num_tiles, 0)
    last_tiles = jnp.cumsum(num_tiles)

    def load_block(row, index, first_key, kv_len):
        """Keys, values: f32[num_kv_heads, block, head_dim]; dead values are 0, for 0 * NaN is NaN.

        Keys that are dead have scores that nobody looks at.
        """
        ids = jax.lax.dynamic_slice(page_table, (row, index * block_pages), (1, block_pages))[0]
        starts = index * block + page_size * jnp.arange(block_pages)
        ids = jnp.where(starts < kv_len, ids, 0)

        positions = starts[0] + jnp.arange(block)
        alive = positions < kv_len
        if variant.sliding_window is not None:
            alive &= positions >= first_key  # others may have been released
        if tile == 1 and block_pages <= _MAX_SLICED_PAGES:
            pages = [bits[layer, ids[i]] for i in range(block_pages)]
            keys = jnp.concatenate([page[..., :head_dim] for page in pages], axis=1)
            values = jnp.concatenate([page[..., head_dim : 2 * head_dim] for page in pages], axis=1)
        else:
            cells = bits[layer, ids].swapaxes(0, 1).reshape(num_kv_heads, block, -1)
            keys, values = cells[..., :head_dim], cells[..., head_dim : 2 * head_dim]
        keys, values = from_bits(keys, kv_pages.dtype), from_bits(values, kv_pages.dtype)
        return keys.astype(jnp.float32), jnp.where(alive[:, None], values, 0).astype(jnp.float32)

    def score(q_tile, keys):
        """f32[num_kv_heads, group * tile, block]."""
        if tile > 1:
            return jnp.einsum("kmd,ksd->kms", q_tile, keys)
        # What stands on the right is packed at each call: of one query and a block of keys, the
        # query. The compiler would turn the product round again, but for the barrier.
        scores = jnp.einsum("ksd,kmd->ksm", keys, q_tile)
        return jax.lax.optimization_barrier(scores).swapaxes(1, 2)

    def attend_tile(row, kv_len, start, q_tile):
        """f32[num_kv_heads, group * tile, head_dim] for the queries at `start .. start + tile`.

        Those before the row's own get anything.
        """
        positions = jnp.tile(start + jnp.arange(tile), group)[None, :, None]

        def attend_block(index, state):
            peak, total, acc = state
            keys, values = load_block(row, index, first_key, kv_len)
            scores = variant.capped(score(q_tile, keys))
            kv_positions = (index * block + jnp.arange(block))[None, None, :]
            visible = variant.sees(positions, kv_positions)
            scores = jnp.where(visible, scores, _MASKED)
            new_peak = jnp.maximum(peak, scores.max(axis=-1, keepdims=True))
            weights = jnp.where(visible, jnp.exp(scores - new_peak), 0)
            shrink = jnp.exp(peak - new_peak)
            total = total * shrink + weights.sum(axis=-1, keepdims=True)
            acc = acc * shrink + jnp.einsum("kms,ksd->kmd", weights, values)
            return new_peak, total, acc

        queries = (num_kv_heads, group * tile)
        state = (
            jnp.full((*queries, 1), _MASKED),
            jnp.zeros((*queries, 1)),
            jnp.zeros((*queries, head_dim)),
        )
        first_query = jnp.maximum(start, first_positions[row])
        first_key = 0 if variant.sliding_window is None else variant.lowest_key(first_query)
        last_key = jnp.minimum(start + tile, kv_len)
        peak, total, acc = jax.lax.fori_loop(
            first_key // block, (last_key + block - 1) // block, attend_block, state
        )
        if sinks is not None:
            # Infinite where it leaves the keys less than float32 can tell from nothing.
            sink = jnp.repeat(sinks.reshape(num_kv_heads, group), tile, axis=1)
            total = total + jnp.exp(sink[..., None] - peak)
        return acc * scale[1] / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)

    def attend_one_tile(index, out):
        row = (last_tiles <= index).sum(dtype=jnp.int32)
        kv_len, first_position = kv_lens[row], first_positions[row]
        start = (first_position // tile + index - (last_tiles[row] - num_tiles[row])) * tile
        # Where the tile's first query lies on the padded token axis; before the row's own queries
        # when a chunk starts inside a tile.
        at = cu_q_lens[row] + start - first_position + pad
        q_tile = jax.lax.dynamic_slice_in_dim(scaled, at, tile)
        q_tile = q_tile.reshape(tile, num_kv_heads, group, -1).transpose(1, 2, 0, 3)
        q_tile = q_tile.reshape(num_kv_heads, group * tile, -1)
        result = attend_tile(row, kv_len, start, q_tile)
        result = result.reshape(num_kv_heads, group, tile, head_dim).transpose(2, 0, 1, 3)
        result = result.reshape(tile, num_q_heads, head_dim).astype(out.dtype)
        if tile > 1:
            position = start + jnp.arange(tile)
            own = (position >= first_position) & (position < kv_len)
            old = jax.lax.dynamic_slice_in_dim(out, at, tile)
            result = jnp.where(own[:, None, None], result, old)
        return jax.lax.dynamic_update_slice_in_dim(out, result, at, axis=0)

    out = jnp.zeros((num_tokens + 2 * pad, num_q_heads, head_dim), q.dtype)
    out = jax.lax.fori_loop(0, last_tiles[-1], attend_one_tile, out)
    return out[pad : pad + num_tokens]
