# SPDX-License-Identifier: Apache-2.0
"""The specification of the kernels in plain jnp and float32: what every backend is held to.

Written to be read: it gathers whole page-table rows, so its cost follows the table's capacity.
"""

import jax
import jax.numpy as jnp

from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant


def token_rows(rows: Rows, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Which row each token belongs to.

    Args:
      rows: the step's.
      num_tokens: length of the token axis.

    Returns:
      row: i32[num_tokens], in range for padding tokens too.
      live: bool[num_tokens], False for padding tokens.
    """
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    is_live = jnp.arange(rows.max_num_seqs) < rows.num_seqs
    ends = jnp.where(is_live, rows.cu_q_lens[1:], num_tokens + 1)
    row = (ends[None, :] <= tokens[:, None]).sum(axis=1, dtype=jnp.int32)
    live = tokens < rows.cu_q_lens[rows.num_seqs[0]]
    return jnp.where(live, row, 0), live


def token_positions(rows: Rows, row: jax.Array) -> jax.Array:
    """i32[num_tokens]: position of each token in its sequence, given its row."""
    tokens = jnp.arange(row.shape[0], dtype=jnp.int32)
    return tokens - rows.cu_q_lens[row + 1] + rows.kv_lens[row]


def paged_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    rows: Rows,
    variant: AttentionVariant,
    *,
    layer: int | jax.Array = 0,
    kv_scale: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """See `pallas_kernels.paged_attention`."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, page_size = kv_pages.shape[2:4]
    row, live = token_rows(rows, num_tokens)
    positions = token_positions(rows, row)

    # [rows, pages_per_seq, heads, page_size, kv_dim] -> [rows, tokens, heads, kv_dim]
    cells = kv_pages[layer][rows.page_table].astype(jnp.float32).swapaxes(2, 3)
    cells = cells.reshape(rows.max_num_seqs, -1, num_kv_heads, cells.shape[-1])
    kv_positions = jnp.arange(rows.pages_per_seq * page_size)
    # Cells that hold no token, or that no query sees as they are below its window, are zeroed, not
    # just masked below: 0 * NaN is NaN.
    lowest = variant.lowest_key(rows.kv_lens - rows.q_lens())
    filled = kv_positions[None, :] < rows.kv_lens[:, None]
    filled &= kv_positions[None, :] >= lowest[:, None]
    cells = jnp.where(filled[:, :, None, None], cells, 0)
    scale = jnp.ones(2) if kv_scale is None else kv_scale
    keys = cells[..., :head_dim] * scale[0]
    values = cells[..., head_dim : 2 * head_dim] * scale[1]

    groups = (num_tokens, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("tkgd,tskd->tkgs", q.astype(jnp.float32).reshape(groups), keys[row])
    scores = variant.capped(scores * variant.scale(head_dim))
    visible = variant.sees(positions[:, None], kv_positions[None, :])
    scores = jnp.where(visible[:, None, None, :], scores, -jnp.inf)
    if sinks is not None:
        # One more score of each query, without a value.
        sink = jnp.broadcast_to(sinks.reshape(1, *groups[1:3], 1), (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, sink.astype(jnp.float32)], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : len(kv_positions)]
    out = jnp.einsum("tkgs,tskd->tkgd", weights, values[row]).reshape(q.shape)
    return jnp.where(live[:, None, None], out, 0).astype(q.dtype)


def write_kv(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: Rows,
    *,
    layer: int | jax.Array = 0,
    kv_scale: jax.Array | None = None,
) -> jax.Array:
    """See `pallas_kernels.write_kv`."""
    num_pages, _, page_size = kv_pages.shape[1:4]
    row, live = token_rows(rows, k.shape[0])
    positions = token_positions(rows, row)
    page_ids = rows.page_table[row, positions // page_size]
    # Padding tokens point past the pool, where the scatter drops them.
    page_ids = jnp.where(live, page_ids, num_pages)
    cells = pack_cells(k, v, kv_pages.dtype, kv_scale)
    lanes = slice(0, cells.shape[-1])
    return kv_pages.at[layer, page_ids, :, positions % page_size, lanes].set(cells, mode="drop")


def pack_cells(k, v, dtype, kv_scale):
    """Puts keys and values side by side as the pool stores them.

    Args:
      k: [num_tokens, num_kv_heads, head_dim].
      v: likewise.
      dtype: the pool's.
      kv_scale: f32[2] or None. Integers are rounded to nearest, and what a number of eight bits
        cannot hold becomes the nearest that it can: float8_e4m3fn has no infinity, but NaN.

    Returns:
      dtype[num_tokens, num_kv_heads, 2 * head_dim].
    """
    if kv_scale is not None:
        k = k.astype(jnp.float32) / kv_scale[0]
        v = v.astype(jnp.float32) / kv_scale[1]
    cells = jnp.concatenate([k, v], axis=-1)
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        cells = jnp.clip(jnp.round(cells), info.min, info.max)
    elif jnp.dtype(dtype).itemsize == 1:
        largest = float(jnp.finfo(dtype).max)
        cells = jnp.clip(cells, -largest, largest)
    return cells.astype(dtype)


def copy_pages(kv_pages, src_page_ids, dst_page_ids):
    """See `pallas_kernels.copy_pages`."""
    return kv_pages.at[:, dst_page_ids].set(kv_pages[:, src_page_ids])
