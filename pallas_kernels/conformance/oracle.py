# SPDX-License-Identifier: Apache-2.0
"""What is right: dense float64 with a bound for each number, and a loop over cells."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpaged.pallas_kernels.conformance.cases import Case

# A kernel's own freedom: the smallest block of keys after which it may rescale its sums, and the
# units in the last place by which its exp and tanh may be off.
_LEAST_BLOCK = 8
_FUNCTION_ULPS = 8


def dense_attention(case: Case, **variant: Any) -> tuple[np.ndarray, np.ndarray]:
    """Float64 attention over each sequence's dense keys and values, one query at a time.

    The bound is a priori (Higham 2002, section 3.1: a sum of n products is off by at most n units
    of roundoff of the sum of their sizes, in any order). Scores are sums of head_dim products;
    their error, and that of `exp`, is a relative error of the weights; numerator and denominator
    are sums over the keys, rescaled after every block; weights may be rounded to the queries' dtype
    before they meet the values, and the result is.

    Args:
      case: what to compute.
      **variant: replaces fields of the case's own.

    Returns:
      float64[num_tokens, num_q_heads, head_dim], zero for padding, and how far a right
      implementation that accumulates in float32 can be off.
    """
    asked = dataclasses.replace(case.variant, **variant)
    window, cap = asked.sliding_window, asked.soft_cap
    num_q_heads, head_dim = case.q.shape[1:]
    scale = head_dim**-0.5 if asked.sm_scale is None else asked.sm_scale
    u, out_u = 2.0**-24, float(jnp.finfo(case.dtype).eps) / 2
    weight_u = out_u if out_u > u else 0.0
    out, bound = np.zeros(case.q.shape), np.zeros(case.q.shape)
    for row, (keys, values) in enumerate(case.dense):
        group = num_q_heads // keys.shape[1]
        start, end = (int(token) for token in case.rows.cu_q_lens[row : row + 2])
        for token in range(start, end):
            position = len(keys) - (end - token)
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(num_q_heads):
                seen = keys[first : position + 1, head // group].astype(np.float64)
                value = values[first : position + 1, head // group].astype(np.float64)
                query = case.q[token, head].astype(np.float64)
                scores = seen @ query * scale
                score_error = (head_dim + 3) * u * (np.abs(seen) @ np.abs(query)).max() * abs(scale)
                if cap is not None:
                    scores = cap * np.tanh(scores / cap)
                    score_error += _FUNCTION_ULPS * u * cap
                sink = -np.inf if case.sinks is None else float(case.sinks[head])
                peak = max(scores.max(), sink)
                weights = np.exp(scores - peak)
                weights /= weights.sum() + np.exp(sink - peak)
                out[token, head] = weights @ value
                # Rounding of differences of scores, each step's own and of the running maximum's.
                largest = max(np.abs(scores).max(), abs(sink) if np.isfinite(sink) else 0)
                score_error += 4 * u * largest
                blocks = -(-len(scores) // _LEAST_BLOCK) + 1
                relative = np.expm1(2 * score_error) + _FUNCTION_ULPS * u * blocks
                relative += 2 * (len(scores) + 2) * u + weight_u
                size = weights @ np.abs(value)
                error = relative * size
                bound[token, head] = error + out_u * (np.abs(out[token, head]) + error)
    return out, 1.1 * bound + np.finfo(np.float32).tiny  # 1.1: products of errors


def written_pool(case: Case, pool: np.ndarray) -> np.ndarray:
    """What `write_kv` should make of a pool: one cell at a time."""
    want = pool.copy()
    page_size, head_dim = pool.shape[3], case.k.shape[2]
    scales = np.asarray(case.kv_scale or (1.0, 1.0), np.float32)

    def stored(numbers, scale):
        if case.kv_scale is not None:
            numbers = numbers / scale
        if jnp.issubdtype(pool.dtype, jnp.integer):
            info = jnp.iinfo(pool.dtype)
            numbers = np.clip(np.round(numbers), info.min, info.max)
        return numbers.astype(pool.dtype)

    for row in range(int(case.rows.num_seqs[0])):
        start, end = (int(token) for token in case.rows.cu_q_lens[row : row + 2])
        for token in range(start, end):
            position = int(case.rows.kv_lens[row]) - (end - token)
            page, slot = int(case.rows.page_table[row, position // page_size]), position % page_size
            for head in range(pool.shape[2]):
                cell = want[case.layer, page, head, slot]
                cell[:head_dim] = stored(case.k[token, head], scales[0])
                cell[head_dim : 2 * head_dim] = stored(case.v[token, head], scales[1])
    return want
