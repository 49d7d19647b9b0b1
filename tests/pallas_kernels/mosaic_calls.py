# SPDX-License-Identifier: Apache-2.0
"""Calls of the Mosaic GPU lowerings, as shapes and interpreted, for their tests."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jpaged import pallas_kernels
from jpaged.pallas_kernels import conformance, kv_pages_shape, versions
from jpaged.pallas_kernels.gpu.chip import Chip
from jpaged.pallas_kernels.rows import Rows

ATTEND = functools.partial(pallas_kernels.paged_attention, backend="gpu")
H100 = Chip("NVIDIA H100", (9, 0), 132, 227 * 1024)
B200 = Chip("NVIDIA B200", (10, 0), 148, 227 * 1024)

interpreted = pytest.mark.skipif(
    not versions.interprets_mosaic(),
    reason=f"jax {jax.__version__} cannot interpret Mosaic GPU's products; jax 0.11 can",
)


def check(case, capability=(9, 0)):
    with conformance.interpret_gpu(capability):
        conformance.check_attention(ATTEND, case)


def arguments(
    *,
    num_tokens=64,
    heads=(32, 8),
    head_dim=128,
    page_size=16,
    dtype=jnp.bfloat16,
    kv_dtype=None,
    num_pages=99,
    num_layers=2,
):
    shape = kv_pages_shape(num_layers, num_pages, heads[1], page_size, head_dim, backend="gpu")
    return (
        jax.ShapeDtypeStruct((num_tokens, heads[0], head_dim), dtype),
        jax.ShapeDtypeStruct(shape, kv_dtype or dtype),
        Rows(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((64, 128), (64,), (65,), (1,)))),
    )
