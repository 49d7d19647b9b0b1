# SPDX-License-Identifier: Apache-2.0
"""The one place outside kernels that knows how the page pool is laid out."""

import math
from typing import Any

import jax
import jax.numpy as jnp

# Reserved page that pads page tables: never handed out, always safe to read and to write.
NULL_PAGE = 0
# Axes of the pool.
PAGES_AXIS = 1
HEADS_AXIS = 2


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


def page_shape(pool_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a page apart, of all layers: `(num_layers, num_kv_heads, page_size, kv_dim)`."""
    return (*pool_shape[:PAGES_AXIS], *pool_shape[PAGES_AXIS + 1 :])


def page_bytes(pool_shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of one page over all layers of a pool of this shape and dtype."""
    return math.prod(page_shape(pool_shape)) * jnp.dtype(dtype).itemsize


def take_pages(kv_pages: jax.Array, page_ids: jax.Array) -> jax.Array:
    """Copies of pages, `[count, *page_shape]`, for ids `i32[count]`."""
    return jnp.moveaxis(kv_pages[:, page_ids], PAGES_AXIS, 0)


def put_pages(kv_pages: jax.Array, page_ids: jax.Array, pages: jax.Array) -> jax.Array:
    """The pool with pages as `take_pages` gives them put at ids `i32[count]`."""
    return kv_pages.at[:, page_ids].set(jnp.moveaxis(pages, 0, PAGES_AXIS))
