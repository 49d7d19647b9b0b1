# SPDX-License-Identifier: Apache-2.0
"""Compares one call of an implementation with what is right."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.pallas_kernels.conformance.cases import Case, poisoned_pool
from jpaged.pallas_kernels.conformance.oracle import dense_attention, written_pool


def check_attention(attend: Callable[..., jax.Array], case: Case) -> float:
    """Compares one call with `dense_attention`.

    Returns:
      The largest share of its bound that an error takes.

    Raises:
      AssertionError: naming the first output that is off, with row, position and head.
      Exception: whatever `attend` raises.
    """
    q = jnp.asarray(case.q, case.dtype)
    pool = jnp.asarray(case.kv_pages, case.kv_dtype)
    # The layer is traced, as a scan over layers needs it.
    call = jax.jit(functools.partial(attend, **case.options))
    got = call(q, pool, *case.index, layer=jnp.int32(case.layer))
    assert got.dtype == case.dtype, f"dtype {got.dtype} is not that of the queries, {case.dtype}"
    assert got.shape == q.shape, f"shape {got.shape} is not that of the queries, {q.shape}"
    want, bound = dense_attention(case)
    kv_lens, cu_q_lens = np.asarray(case.rows.kv_lens), np.asarray(case.rows.cu_q_lens)
    live = int(cu_q_lens[int(case.rows.num_seqs[0])])
    got = np.asarray(got.astype(jnp.float32), np.float64)[:live]
    shares = np.abs(got - want[:live]) / bound[:live]
    wrong = ~(shares <= 1)
    if wrong.any():
        token, head, lane = np.argwhere(wrong)[0]
        row = int(np.searchsorted(cu_q_lens[1 : len(case.dense) + 1], token, side="right"))
        position = int(kv_lens[row]) - int(cu_q_lens[row + 1] - token)
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} numbers are wrong; the first in row {row}, position "
            f"{position} of {kv_lens[row]}, head {head}, lane {lane}: "
            f"{got[token, head, lane]:.6g} is not {want[token, head, lane]:.6g} "
            f"within {bound[token, head, lane]:.2g}"
        )
    return float(shares.max(initial=0))


def check_write(write: Callable[..., jax.Array], case: Case) -> float:
    """Compares one call, bit for bit, with a loop over the tokens.

    Returns:
      0, the share of the tolerance that is used.

    Raises:
      AssertionError: naming the first number that is off.
      Exception: whatever `write` raises.
    """
    options = {name: value for name, value in case.options.items() if name == "kv_scale"}
    pool = poisoned_pool(case.kv_pages.shape, case.kv_dtype)
    new = (jnp.asarray(case.k, case.dtype), jnp.asarray(case.v, case.dtype))
    call = jax.jit(functools.partial(write, **options), donate_argnums=0)
    got = call(jnp.asarray(pool), *new, *case.index, layer=jnp.int32(case.layer))
    _check_bits(got, written_pool(case, pool))
    return 0.0


def check_copy(copy: Callable[..., jax.Array], case: Case) -> float:
    """Copies pages, a chain among them, and compares bit for bit; as `check_write`."""
    pool = poisoned_pool(case.kv_pages.shape, case.kv_dtype)
    last = pool.shape[1] - 1
    # Page 2 is read and written: every source is read first. The null page onto itself is padding.
    sources, targets = np.array([1, 2, 1, 0, 0], np.int32), np.array([2, 3, last, 0, 0], np.int32)
    got = jax.jit(copy, donate_argnums=0)(jnp.asarray(pool), sources, targets)
    want = pool.copy()
    want[:, targets] = pool[:, sources]
    _check_bits(got, want)
    return 0.0


def _check_bits(result: jax.Array, want: np.ndarray) -> None:
    got = np.asarray(result)
    assert (got.dtype, got.shape) == (want.dtype, want.shape), (
        f"{got.dtype}{list(got.shape)} is not {want.dtype}{list(want.shape)}"
    )
    unsigned = np.dtype(f"u{got.dtype.itemsize}")
    different = np.argwhere(got.view(unsigned) != want.view(unsigned))
    if len(different):
        at = tuple(different[0])
        raise AssertionError(
            f"{len(different)} of {got.size} numbers are wrong; the first at [layer, page, head, "
            f"slot, lane] = {[int(i) for i in at]}: {got[at]} is not {want[at]}"
        )
