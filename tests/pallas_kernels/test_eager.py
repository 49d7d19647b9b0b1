# SPDX-License-Identifier: Apache-2.0
"""The public functions called outside jit, with arrays of jax and of NumPy."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import pallas_kernels
from jpaged.pallas_kernels import conformance, versions

BACKENDS = {
    "xla": ("xla", contextlib.nullcontext, jnp.float32),
    "tpu": ("tpu", conformance.interpret_tpu, jnp.float32),
    "triton": ("gpu", functools.partial(conformance.interpret_gpu, (8, 0)), jnp.float32),
    "mosaic": ("gpu", conformance.interpret_gpu, jnp.bfloat16),
}


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_function_runs_outside_jit(name):
    backend, interpret, dtype = BACKENDS[name]
    if name == "mosaic" and not versions.interprets_mosaic():
        pytest.skip("jax 0.10 cannot interpret Mosaic GPU's products; jax 0.11 can")
    # Fewer pages than a TPU kernel reads at once.
    case = conformance.make_case(
        [(1, 9), (3, 12)], num_kv_heads=1, head_dim=64, page_size=8, dtype=dtype
    )
    pool = conformance.poisoned_pool(case.kv_pages.shape, dtype)
    last = pool.shape[1] - 1
    index = jax.tree.leaves(case.rows)
    spec = {"layer": case.layer, "backend": backend}
    with interpret():
        out = pallas_kernels.paged_attention(
            jnp.asarray(case.q, dtype), jnp.asarray(case.kv_pages, dtype), *index, **spec
        )
        new = (case.k.astype(dtype), case.v.astype(dtype))
        written = pallas_kernels.write_kv(pool, *new, *index, **spec)
        ids = np.array([1, last, 0], np.int32)
        copied = pallas_kernels.copy_pages(pool, ids, ids[[1, 0, 2]], backend=backend)
        jax.block_until_ready((out, written, copied))
    want, bound = conformance.dense_attention(case)
    live = int(case.rows.cu_q_lens[case.rows.num_seqs[0]])
    error = np.abs(np.asarray(out, np.float64)[:live] - want[:live])
    assert (error <= bound[:live]).all() and not np.asarray(out, np.float32)[live:].any()
    # As bytes, of which those of NaN are equal too.
    wanted = conformance.written_pool(case, pool)
    np.testing.assert_array_equal(np.asarray(written).view(np.uint8), wanted.view(np.uint8))
    wanted = pool.copy()
    wanted[:, [1, last]] = pool[:, [last, 1]]
    np.testing.assert_array_equal(np.asarray(copied).view(np.uint8), wanted.view(np.uint8))
