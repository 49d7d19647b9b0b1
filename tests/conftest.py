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
from jpaged.pallas_kernels.versions import quick_to_compile

# To share a model between.
jax.config.update("jax_num_cpu_devices", 2)
# Mixed dtypes and silently broadcast ranks are bugs until shown otherwise.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation is most of the suite's time. The flags are read once, with the first device: the
# compilers of other chips optimise as they do for users.
if os.environ["JAX_PLATFORMS"] == "cpu":
    with pytest.MonkeyPatch.context() as _patch:
        _flags = os.environ.get("XLA_FLAGS", "")
        _patch.setenv("XLA_FLAGS", f"{quick_to_compile()} {_flags}")
        jax.devices()


@pytest.fixture(autouse=True, scope="session")
def _compilation_cache(tmp_path_factory):
    """Engines of one model compile once a session: most of the suite's time is compilation."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Where the programs that tests start keep what they compile, unless they name another.

    Apart from the tests' own: a program that a test kills may leave half an entry, of which jax
    warns, and warnings are errors here.
    """
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("programs"))
    return os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.fixture(scope="session")
def tpu_compiler():
    """The TPU compiler; one a process, as its options hold for all of it."""
    if find_libtpu() is None:
        pytest.skip("no libtpu to compile for TPUs with: make libtpu")
    compiler = TpuCompiler(schedules=True)
    yield compiler
    compiler.close()
