# SPDX-License-Identifier: Apache-2.0
"""Paged attention cases that a wrong kernel cannot pass by luck, and their dense oracle.

Pages are permuted, every sequence has contents of its own, and every cell that no sequence owns is
NaN, as are the queries and keys of padding tokens.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass
class Case:
    """Arguments of the kernels as NumPy arrays, with each sequence's dense keys and values."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    kv_pages: np.ndarray
    page_table: np.ndarray
    kv_lens: np.ndarray
    cu_q_lens: np.ndarray
    num_seqs: np.ndarray
    layer: int
    dense: list[tuple[np.ndarray, np.ndarray]]

    @property
    def index(self):
        arrays = (self.page_table, self.kv_lens, self.cu_q_lens, self.num_seqs)
        return tuple(jnp.asarray(array) for array in arrays)


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
    lane_padding: int = 0,
    dtype=np.float32,
    written: bool = True,
    seed: int = 0,
) -> Case:
    """Builds a case of rows `(q_len, kv_len)`; `written`: whether this step's cells are filled."""
    rng = np.random.default_rng(seed)
    pages_per_seq = max(-(-kv_len // page_size) for _, kv_len in lens) + pad_pages
    owned = [-(-kv_len // page_size) for _, kv_len in lens]
    num_pages = 1 + sum(owned) + 5
    free = list(rng.permutation(np.arange(1, num_pages)))
    kv_dim = 2 * head_dim + lane_padding
    kv_pages = np.full((num_layers, num_pages, num_kv_heads, page_size, kv_dim), np.nan, np.float32)
    rows = len(lens) + pad_rows
    # Padding entries point at pages that other sequences own, or at the null page.
    page_table = rng.integers(0, num_pages, (rows, pages_per_seq)).astype(np.int32)
    num_tokens = sum(q_len for q_len, _ in lens) + pad_tokens

    def draw(*shape):
        return np.array(jnp.asarray(rng.standard_normal(shape), dtype), np.float32)

    q = draw(num_tokens, num_q_heads, head_dim)
    k = np.full((num_tokens, num_kv_heads, head_dim), np.nan, np.float32)
    v = np.full_like(k, np.nan)
    cu_q_lens = [0]
    dense = []
    for row, (q_len, kv_len) in enumerate(lens):
        keys, values = draw(kv_len, num_kv_heads, head_dim), draw(kv_len, num_kv_heads, head_dim)
        dense.append((keys, values))
        ids = [free.pop() for _ in range(owned[row])]
        page_table[row, : len(ids)] = ids
        for position in range(kv_len if written else kv_len - q_len):
            cell = kv_pages[layer, ids[position // page_size], :, position % page_size]
            cell[:, :head_dim], cell[:, head_dim : 2 * head_dim] = keys[position], values[position]
        start, cu = cu_q_lens[-1], cu_q_lens[-1] + q_len
        k[start:cu], v[start:cu] = keys[kv_len - q_len :], values[kv_len - q_len :]
        cu_q_lens.append(cu)
    q[cu_q_lens[-1] :] = np.nan
    return Case(
        q=q,
        k=k,
        v=v,
        kv_pages=kv_pages,
        page_table=page_table,
        kv_lens=np.array([kv_len for _, kv_len in lens] + [7] * pad_rows, np.int32),
        cu_q_lens=np.array(cu_q_lens + [cu_q_lens[-1]] * pad_rows, np.int32),
        num_seqs=np.array([len(lens)], np.int32),
        layer=layer,
        dense=dense,
    )


def dense_attention(case: Case, *, sm_scale=None, sliding_window=None, soft_cap=None) -> np.ndarray:
    """Float64 attention over each sequence's dense keys and values; one query at a time."""
    num_q_heads, head_dim = case.q.shape[1:]
    out = np.zeros(case.q.shape)
    for row, (keys, values) in enumerate(case.dense):
        group = num_q_heads // keys.shape[1]
        start, end = case.cu_q_lens[row : row + 2]
        for token in range(start, end):
            position = len(keys) - (end - token)
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            for head in range(num_q_heads):
                seen = keys[first : position + 1, head // group].astype(np.float64)
                scores = seen @ case.q[token, head].astype(np.float64)
                scores *= head_dim**-0.5 if sm_scale is None else sm_scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[token, head] = weights @ values[first : position + 1, head // group]
    return out
