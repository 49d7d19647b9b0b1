# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged key-value cache: arrays in, arrays out; usable without the rest of jpaged.

Keys and values live in one pool `kv_pages[num_layers, num_pages, num_kv_heads, page_size, kv_dim]`,
keys in lanes `[:head_dim]` and values in lanes `[head_dim:2*head_dim]` of a cell. `page_table` maps
each row's logical pages to physical ones. See `reference.py` for the specification as code.
"""

from jpaged.pallas_kernels.dispatch import copy_pages, paged_attention, write_kv
from jpaged.pallas_kernels.layout import NULL_PAGE, kv_pages_shape

__all__ = ["NULL_PAGE", "copy_pages", "kv_pages_shape", "paged_attention", "write_kv"]
