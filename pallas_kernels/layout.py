# SPDX-License-Identifier: Apache-2.0
"""The one place that knows how the page pool is laid out."""

# Reserved page that pads page tables: never handed out, always safe to read and to write.
NULL_PAGE = 0


def kv_pages_shape(
    num_layers: int,
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    *,
    backend: str,
) -> tuple[int, int, int, int, int]:
    """Shape of the page pool.

    A page is contiguous per layer and head-major, so that one copy brings the keys and values of
    all heads, and a head's tile needs no strided load (measured: docs/decisions.md).

    Args:
      num_layers: layers that share the pool; a page id means the same in each.
      num_pages: pages, the reserved `NULL_PAGE` included.
      num_kv_heads: key-value heads.
      page_size: tokens a page holds.
      head_dim: lanes of one key or value.
      backend: "tpu" rounds the lanes of a cell up to a multiple of 128, which is what keeps XLA
        from copying the pool at every kernel call.

    Returns:
      `(num_layers, num_pages, num_kv_heads, page_size, kv_dim)`.
    """
    kv_dim = 2 * head_dim
    if backend == "tpu":
        kv_dim = -(-kv_dim // 128) * 128
    return num_layers, num_pages, num_kv_heads, page_size, kv_dim
