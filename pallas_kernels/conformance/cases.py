# SPDX-License-Identifier: Apache-2.0
"""What implementations are called with: cases that a wrong kernel cannot pass by luck."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.pallas_kernels.layout import kv_pages_shape
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant

_PLAIN = AttentionVariant()


@dataclasses.dataclass
class Case:
    """Arguments of the kernels as NumPy arrays, with each sequence's dense keys and values.

    Attributes:
      q, k, v, kv_pages: float32, of numbers that `dtype` and `kv_dtype` represent exactly.
      rows: the index arrays.
      layer: as in `pallas_kernels.paged_attention`.
      dense: keys and values of each live row, [kv_len, num_kv_heads, head_dim], what the stored
        numbers stand for.
      dtype: of queries, and of new keys and values.
      kv_dtype: of the pool.
      variant: of the attention.
      kv_scale: as in `pallas_kernels.paged_attention`; two numbers, or None.
      sinks: likewise; float32[num_q_heads], or None.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    kv_pages: np.ndarray
    rows: Rows
    layer: int
    dense: list[tuple[np.ndarray, np.ndarray]]
    dtype: Any = np.float32
    kv_dtype: Any = np.float32
    variant: AttentionVariant = _PLAIN
    kv_scale: tuple[float, float] | None = None
    sinks: np.ndarray | None = None

    @property
    def index(self) -> tuple[jax.Array, ...]:
        """The index arrays, in the order in which the public functions take them."""
        arrays = (getattr(self.rows, field.name) for field in dataclasses.fields(Rows))
        return tuple(jnp.asarray(array) for array in arrays)

    @property
    def options(self) -> dict[str, Any]:
        """What a call of the public function names because it is not the default."""
        options = dataclasses.asdict(self.variant)
        if self.kv_scale is not None:
            options["kv_scale"] = jnp.asarray(self.kv_scale, jnp.float32)
        if self.sinks is not None:
            options["sinks"] = jnp.asarray(self.sinks)
        return {name: value for name, value in options.items() if value is not None}


def make_case(
    lens: list[tuple[int, int]],
    *,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    page_size: int = 4,
    num_layers: int = 2,
    layer: int = 1,
    pad_rows: int = 2,
    pad_tokens: int = 3,
    pad_pages: int = 3,
    lane_padding: int | None = 0,
    dtype: Any = np.float32,
    kv_dtype: Any = None,
    written: bool = True,
    released: bool = False,
    seed: int = 0,
    kv_scale: tuple[float, float] | None = None,
    sinks: Sequence[float] | None = None,
    **variant: Any,
) -> Case:
    """Builds a case of rows `(q_len, kv_len)`.

    Args:
      lens: queries and tokens of each live row.
      num_q_heads: query heads.
      num_kv_heads: KV heads.
      head_dim: lanes of a key.
      page_size: tokens a page holds.
      num_layers: layers of the pool.
      layer: the one that is used; the others are poisoned whole.
      pad_rows: rows past the live ones.
      pad_tokens: tokens past the live ones.
      pad_pages: columns of the table past the longest sequence.
      lane_padding: lanes of a cell past the values; None takes as many as a TPU's pool has.
      dtype: see `Case`.
      kv_dtype: see `Case`; dtype by default.
      written: whether this step's cells are filled.
      released: whether pages that are whole below the window of a row's first query are gone: the
        table has the null page there, as it has once an allocator took them back.
      seed: of everything drawn.
      kv_scale: see `Case`.
      sinks: see `Case`; taken by the heads in turn.
      **variant: fields of `AttentionVariant`.
    """
    rng = np.random.default_rng(seed)
    kv_dtype = np.dtype(dtype if kv_dtype is None else kv_dtype)
    key_scale, value_scale = kv_scale or (1.0, 1.0)
    integers = jnp.iinfo(kv_dtype) if jnp.issubdtype(kv_dtype, jnp.integer) else None
    poison = integers.max if integers else np.nan
    pages_per_seq = max(-(-kv_len // page_size) for _, kv_len in lens) + pad_pages
    owned = [-(-kv_len // page_size) for _, kv_len in lens]
    num_pages = 1 + sum(owned) + 5
    free = list(rng.permutation(np.arange(1, num_pages)))
    sizes = (num_layers, num_pages, num_kv_heads, page_size, head_dim)
    if lane_padding is None:
        shape = kv_pages_shape(*sizes, backend="tpu")
    else:
        shape = (*sizes[:4], 2 * head_dim + lane_padding)
    kv_pages = np.full(shape, poison, np.float32)
    rows = len(lens) + pad_rows
    # Padding entries point at pages that other sequences own, or at the null page.
    page_table = rng.integers(0, num_pages, (rows, pages_per_seq)).astype(np.int32)
    num_tokens = sum(q_len for q_len, _ in lens) + pad_tokens

    def draw(*shape):
        return np.array(jnp.asarray(rng.standard_normal(shape), dtype), np.float32)

    def stored(numbers, scale):
        scaled = numbers / np.float32(scale)
        if integers:
            return np.clip(np.round(scaled), integers.min, integers.max)
        return scaled.astype(kv_dtype).astype(np.float32)

    q = draw(num_tokens, num_q_heads, head_dim)
    k = np.full((num_tokens, num_kv_heads, head_dim), np.nan, np.float32)
    v = np.full_like(k, np.nan)
    cu_q_lens = [0]
    dense = []
    for row, (q_len, kv_len) in enumerate(lens):
        keys, values = draw(kv_len, num_kv_heads, head_dim), draw(kv_len, num_kv_heads, head_dim)
        start, cu = cu_q_lens[-1], cu_q_lens[-1] + q_len
        k[start:cu], v[start:cu] = keys[kv_len - q_len :], values[kv_len - q_len :]
        cu_q_lens.append(cu)
        keys, values = stored(keys, key_scale), stored(values, value_scale)
        dense.append((keys * np.float64(key_scale), values * np.float64(value_scale)))
        ids = [free.pop() for _ in range(owned[row])]
        page_table[row, : len(ids)] = ids
        positions = np.arange(kv_len if written else kv_len - q_len)
        at = (layer, np.array(ids, int)[positions // page_size], slice(None), positions % page_size)
        cells = kv_pages[at]
        cells[..., :head_dim] = keys[: len(positions)]
        cells[..., head_dim : 2 * head_dim] = values[: len(positions)]
        kv_pages[at] = cells
        if released:
            lowest = max(kv_len - q_len - variant["sliding_window"] + 1, 0)
            gone = ids[: lowest // page_size]
            kv_pages[:, gone] = poison
            page_table[row, : len(gone)] = 0
    q[cu_q_lens[-1] :] = np.nan
    index: dict[str, Any] = {
        "page_table": page_table,
        "kv_lens": np.array([kv_len for _, kv_len in lens] + [7] * pad_rows, np.int32),
        "cu_q_lens": np.array(cu_q_lens + [cu_q_lens[-1]] * pad_rows, np.int32),
        "num_seqs": np.array([len(lens)], np.int32),
    }
    return Case(
        q=q,
        k=k,
        v=v,
        kv_pages=kv_pages,
        rows=Rows(**index),
        layer=layer,
        dense=dense,
        dtype=dtype,
        kv_dtype=kv_dtype,
        variant=AttentionVariant(**variant),
        kv_scale=kv_scale,
        sinks=None if sinks is None else np.resize(np.asarray(sinks, np.float32), num_q_heads),
    )


def poisoned_pool(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """A pool whose numbers differ from their neighbours in their bits, NaN wherever that can be.

    Comparing bits then shows a cell that was moved or taken from another.
    """
    dtype = np.dtype(dtype)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    count = np.arange(np.prod(shape), dtype=np.int64)
    if dtype == jnp.bfloat16:
        # XLA keeps no payload of a bfloat16 NaN: every third number is the plain one.
        bits = np.where(count % 3 == 0, 0x7FC0, 0x3000 + count * 7919 % 0x2FFF)
    elif dtype.itemsize == 1:
        bits = count * 89 % 113  # no two neighbours equal, and finite in every 8-bit format
    else:
        nan, free = {2: (0x7E00, 9), 4: (0x7FC00000, 22)}[dtype.itemsize]
        bits = nan + count * 7919 % (2**free - 1)
    return bits.astype(unsigned).reshape(shape).view(dtype)
