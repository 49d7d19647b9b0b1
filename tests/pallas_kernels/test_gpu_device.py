# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels on a GPU: the conformance suite, and races that only hardware has.

JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu, or scripts/device_check.sh.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import pallas_kernels
from jpaged.pallas_kernels import conformance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="jax sees no GPU"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]
GPU = {
    name: functools.partial(getattr(pallas_kernels, name), backend="gpu")
    for name in ("paged_attention", "write_kv", "copy_pages")
}
# What a lowering may refuse: pages narrower than the queries it multiplies, or that it cannot read.
MAY_REFUSE = {"float8_e4m3fn pages"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("case", conformance.suite())
def test_conforms(case, dtype):
    cases = [r for r in conformance.run(**GPU, only=case, dtype=dtype) if r.case == case]
    assert len(cases) == 3
    for result in cases:
        refused = result.status == "refused" and case in MAY_REFUSE
        assert result.status == "passed" or refused, result


def test_many_calls_give_the_same_bits():
    """Copies, barriers and products of many thread blocks at once, at the size of real layers."""
    rng = np.random.default_rng(0)
    num_rows, pages_per_seq, page_size = 48, 128, 16
    num_pages = 1 + num_rows * pages_per_seq
    shape = pallas_kernels.kv_pages_shape(2, num_pages, 8, page_size, 128, backend="gpu")
    pool = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    q = jax.random.normal(jax.random.key(1), (num_rows, 32, 128), jnp.bfloat16)
    table = 1 + rng.permutation(num_rows * pages_per_seq).reshape(num_rows, -1).astype(np.int32)
    kv_lens = rng.integers(1, pages_per_seq * page_size + 1, num_rows).astype(np.int32)
    cu_q_lens = np.arange(num_rows + 1, dtype=np.int32)
    attend = jax.jit(functools.partial(GPU["paged_attention"], layer=1))
    args = (q, pool, table, kv_lens, cu_q_lens, np.array([num_rows], np.int32))
    want = np.asarray(attend(*args))
    reference = jax.jit(functools.partial(pallas_kernels.paged_attention, layer=1, backend="xla"))
    np.testing.assert_allclose(
        want.astype(np.float32), np.asarray(reference(*args)).astype(np.float32), atol=2e-2
    )
    for _ in range(50):
        np.testing.assert_array_equal(np.asarray(attend(*args)), want)
