# SPDX-License-Identifier: Apache-2.0
"""Strictness that every test runs under."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Interpreted kernels wait for each other in threads of XLA's pool, and for ever where it has too
# few: one a core unless told.
os.environ.setdefault("PJRT_NPROC", "8")

import jax

from jpaged.pallas_kernels.aot import TpuCompiler, find_libtpu

# To share a model between.
jax.config.update("jax_num_cpu_devices", 2)
# Mixed dtypes and silently broadcast ranks are bugs until shown otherwise.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="session")
def _compilation_cache(tmp_path_factory):
    """Engines of one model compile once a session: most of the suite's time is compilation."""
    directory = str(tmp_path_factory.mktemp("xla"))
    jax.config.update("jax_compilation_cache_dir", directory)
    # For the programs that tests start, unless their flags name another.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def tpu_compiler():
    """The TPU compiler; one a process, as its options hold for all of it."""
    if find_libtpu() is None:
        pytest.skip("no libtpu to compile for TPUs with: make libtpu")
    compiler = TpuCompiler(schedules=True)
    yield compiler
    compiler.close()
