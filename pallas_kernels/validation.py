# SPDX-License-Identifier: Apache-2.0
"""Checks of the kernels' arguments: shapes and dtypes at trace time, contents in tests."""

import dataclasses
import math
import numbers
import operator
import reprlib

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant


def check_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    rows: Rows,
    variant: AttentionVariant,
    *,
    kv_scale: jax.Array | None,
    sinks: jax.Array | None,
) -> None:
    """Raises ValueError where the arguments of `paged_attention` do not fit together."""
    _check_rank("q", q, "[num_tokens, num_q_heads, head_dim]")
    _check_float("q", q)
    _check_pool(kv_pages, kv_scale)
    _check_rows(rows)
    num_q_heads, num_kv_heads = q.shape[1], kv_pages.shape[2]
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"q has {num_q_heads} heads, not a multiple of the {num_kv_heads} KV heads of kv_pages"
        )
    _check_lanes("q", q.shape[2], kv_pages)
    _check_variant(variant)
    if sinks is None:
        return
    _check_rank("sinks", sinks, "[num_q_heads]")
    _check_float("sinks", sinks)
    if sinks.shape[0] != num_q_heads:
        raise ValueError(f"sinks are for {sinks.shape[0]} heads, but q has {num_q_heads}")


def check_write(
    kv_pages: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, *, kv_scale: jax.Array | None
) -> None:
    """Raises ValueError where the arguments of `write_kv` do not fit together."""
    _check_rank("k", k, "[num_tokens, num_kv_heads, head_dim]")
    _check_float("k", k)
    _check_pool(kv_pages, kv_scale)
    _check_rows(rows)
    _check_array("v", v)
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"v is {v.dtype}{list(v.shape)}, but k is {k.dtype}{list(k.shape)}")
    if k.shape[1] != kv_pages.shape[2]:
        raise ValueError(f"k has {k.shape[1]} heads, but kv_pages has {kv_pages.shape[2]}")
    _check_lanes("k", k.shape[2], kv_pages)


def check_copy(kv_pages, src_page_ids, dst_page_ids) -> None:
    """Raises ValueError where the arguments of `copy_pages` do not fit together."""
    _check_rank("kv_pages", kv_pages, _POOL)
    for name, ids in (("src_page_ids", src_page_ids), ("dst_page_ids", dst_page_ids)):
        _check_rank(name, ids, "[num_copies]")
        _check_int32(name, ids)
    if src_page_ids.shape != dst_page_ids.shape:
        raise ValueError(
            f"{src_page_ids.shape[0]} src_page_ids do not pair with {dst_page_ids.shape[0]} "
            "dst_page_ids"
        )


def check_layer(kv_pages, layer) -> None:
    """Raises ValueError for a layer that is known at trace time and not in the pool."""
    if isinstance(layer, jax.Array):
        known, is_layer = None, layer.shape == () and jnp.issubdtype(layer.dtype, jnp.integer)
    else:
        scalar = layer[()] if type(layer) is np.ndarray and layer.shape == () else layer
        is_layer = _is_a(numbers.Integral, scalar)
        known = operator.index(scalar) if is_layer else None
    if not is_layer:
        raise ValueError(
            f"layer={_shown(layer)} must be an integer, or an integer array of no axes"
        )
    if known is not None and not 0 <= known < kv_pages.shape[0]:
        raise ValueError(f"layer={known} is outside the {kv_pages.shape[0]} layers of kv_pages")


def check_contents(kv_pages: jax.Array, rows: Rows) -> None:
    """Raises ValueError where the index arrays break the contract; for tests and debugging.

    Reads every array on the host, so it belongs in no hot path and under no `jit`.

    Args:
      kv_pages: [num_layers, num_pages, num_kv_heads, page_size, kv_dim].
      rows: as the kernels get them.
    """
    _check_rank("kv_pages", kv_pages, _POOL)
    _check_rows(rows)
    num_pages, page_size = kv_pages.shape[1], kv_pages.shape[3]
    page_table, kv_lens = np.asarray(rows.page_table), np.asarray(rows.kv_lens)
    cu_q_lens, live = np.asarray(rows.cu_q_lens), int(np.asarray(rows.num_seqs)[0])
    max_num_seqs, pages_per_seq = page_table.shape
    if not 0 <= live <= max_num_seqs:
        raise ValueError(f"num_seqs={live} is outside [0, {max_num_seqs}]")
    q_lens = np.diff(cu_q_lens[: live + 1])
    if cu_q_lens[0] != 0 or (q_lens < 0).any():
        raise ValueError(f"cu_q_lens={cu_q_lens[: live + 1]} must start at 0 and never fall")
    for row in range(live):
        kv_len = int(kv_lens[row])
        if kv_len < q_lens[row]:
            raise ValueError(f"row {row}: {q_lens[row]} queries, but kv_lens is {kv_len}")
        used = -(-kv_len // page_size)
        if used > pages_per_seq:
            raise ValueError(
                f"row {row}: kv_lens={kv_len} needs {used} pages of {page_size} tokens, but the "
                f"page table holds {pages_per_seq}"
            )
        ids = page_table[row, :used]
        if ((ids < 1) | (ids >= num_pages)).any():
            raise ValueError(
                f"row {row}: page ids {ids[(ids < 1) | (ids >= num_pages)]} are outside "
                f"[1, {num_pages})"
            )


_POOL = "[num_layers, num_pages, num_kv_heads, page_size, kv_dim]"


def _check_array(name: str, value: object) -> None:
    """Raises ValueError for all but arrays whose values are what jax computes with."""
    if not isinstance(value, jax.Array | np.ndarray):
        raise ValueError(f"{name} is a {type(value).__name__}, expected an array of jax or NumPy")
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array: give a plain one, such as {name}.filled(0)")
    try:
        jax.typeof(value)
    except TypeError:
        raise ValueError(
            f"{name} has dtype {value.dtype}, expected numbers in the byte order of this machine"
        ) from None
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
        if value.is_deleted():
            raise ValueError(f"{name} was deleted or donated: give an array that is still there")


def _check_rank(name: str, array: jax.Array, dims: str) -> None:
    _check_array(name, array)
    rank = dims.count(",") + 1
    if array.ndim != rank:
        raise ValueError(f"{name} has shape {list(array.shape)}, expected {dims}")


def _check_int32(name: str, array: jax.Array) -> None:
    if array.dtype != jnp.int32:
        raise ValueError(f"{name} has dtype {array.dtype}, expected int32")


def _check_float(name: str, array: jax.Array) -> None:
    if array.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"{name} has dtype {array.dtype}, expected bfloat16, float16 or float32")


def _check_pool(kv_pages: jax.Array, kv_scale: jax.Array | None) -> None:
    _check_rank("kv_pages", kv_pages, _POOL)
    if kv_pages.dtype != jnp.int8 and not jnp.issubdtype(kv_pages.dtype, jnp.floating):
        raise ValueError(f"kv_pages has dtype {kv_pages.dtype}, expected a float or int8")
    if kv_pages.dtype == jnp.int8:
        if kv_scale is None:
            raise ValueError("kv_pages of int8 need kv_scale, the size of one step of keys, values")
    if kv_scale is None:
        return
    _check_array("kv_scale", kv_scale)
    if kv_scale.shape != (2,):
        raise ValueError(f"kv_scale has shape {list(kv_scale.shape)}, expected [2]: keys, values")


def _check_rows(rows: Rows) -> None:
    _check_rank("page_table", rows.page_table, "[max_num_seqs, pages_per_seq]")
    count = rows.max_num_seqs
    shapes = {"kv_lens": (count,), "cu_q_lens": (count + 1,), "num_seqs": (1,)}
    for name, shape in shapes.items():
        _check_array(name, getattr(rows, name))
        if getattr(rows, name).shape != shape:
            raise ValueError(
                f"{name} has shape {list(getattr(rows, name).shape)}, expected {list(shape)} for a "
                f"page_table of {count} rows"
            )
    for field in dataclasses.fields(rows):
        _check_int32(field.name, getattr(rows, field.name))


def _check_variant(variant: AttentionVariant) -> None:
    for name in ("sm_scale", "soft_cap"):
        value = getattr(variant, name)
        if value is not None and not (_is_a(numbers.Real, value) and math.isfinite(value)):
            raise ValueError(f"{name}={_shown(value)} must be a finite number, or None")
    sliding_window, soft_cap = variant.sliding_window, variant.soft_cap
    if sliding_window is not None and not _is_a(numbers.Integral, sliding_window):
        raise ValueError(f"sliding_window={_shown(sliding_window)} must be an integer, or None")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window={sliding_window} must be at least 1, or None")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap={soft_cap} must be positive, or None")


def _check_lanes(name: str, head_dim: int, kv_pages: jax.Array) -> None:
    if 2 * head_dim > kv_pages.shape[4]:
        raise ValueError(
            f"{name} has head_dim {head_dim}, but a cell of kv_pages has {kv_pages.shape[4]} "
            f"lanes, fewer than the {2 * head_dim} that a key and a value need"
        )


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """A number as itself; anything else in a short line."""
    if isinstance(value, numbers.Number):
        return str(value)
    return " ".join(reprlib.repr(value).split())
