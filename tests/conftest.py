# SPDX-License-Identifier: Apache-2.0
"""Strictness that every test runs under."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

# Mixed dtypes and silently broadcast ranks are bugs until shown otherwise.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="session")
def _no_persistent_compilation_cache():
    """Counts and timings of compilations must not depend on an earlier run."""
    jax.config.update("jax_enable_compilation_cache", False)
