# SPDX-License-Identifier: Apache-2.0
"""Writes to the page pool, in place under donation."""

import jax
import jax.numpy as jnp

from jpaged.pallas_kernels import reference
from jpaged.pallas_kernels.reference import pack_cells, token_positions, token_rows
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.xla.bits import as_bits, from_bits


@jax.jit
def copy_pages(kv_pages, src_page_ids, dst_page_ids):
    """See `pallas_kernels.copy_pages`."""
    copied = reference.copy_pages(as_bits(kv_pages), src_page_ids, dst_page_ids)
    return from_bits(copied, kv_pages.dtype)


@jax.jit  # traced once for all layers, like attention
def write_kv(kv_pages, k, v, rows: Rows, *, layer, kv_scale) -> jax.Array:
    """See `pallas_kernels.write_kv`; a loop over the live tokens, one cell of all heads each."""
    page_size = kv_pages.shape[3]
    cells = as_bits(pack_cells(k, v, kv_pages.dtype, kv_scale))
    row, _ = token_rows(rows, k.shape[0])
    positions = token_positions(rows, row)
    page_ids = rows.page_table[row, positions // page_size]
    slots = positions % page_size
    layer, zero = jnp.int32(layer), jnp.int32(0)

    def write_token(token, bits):
        start = (layer, page_ids[token], zero, slots[token], zero)
        return jax.lax.dynamic_update_slice(bits, cells[token][None, None, :, None, :], start)

    num_tokens, bits = rows.cu_q_lens[rows.num_seqs[0]], as_bits(kv_pages)
    return from_bits(jax.lax.fori_loop(0, num_tokens, write_token, bits), kv_pages.dtype)
