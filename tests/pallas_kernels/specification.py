# SPDX-License-Identifier: Apache-2.0
"""The specification of the kernels, with the signatures of the public functions."""

from jpaged.pallas_kernels import reference
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant

copy_pages = reference.copy_pages


def paged_attention(
    q,
    kv_pages,
    page_table,
    kv_lens,
    cu_q_lens,
    num_seqs,
    *,
    layer=0,
    kv_scale=None,
    sinks=None,
    **variant,
):
    rows = Rows(page_table, kv_lens, cu_q_lens, num_seqs)
    variant = AttentionVariant(**variant)
    return reference.paged_attention(
        q, kv_pages, rows, variant, layer=layer, kv_scale=kv_scale, sinks=sinks
    )


def write_kv(kv_pages, k, v, page_table, kv_lens, cu_q_lens, num_seqs, *, layer=0, kv_scale=None):
    rows = Rows(page_table, kv_lens, cu_q_lens, num_seqs)
    return reference.write_kv(kv_pages, k, v, rows, layer=layer, kv_scale=kv_scale)
