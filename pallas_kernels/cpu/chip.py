# SPDX-License-Identifier: Apache-2.0
"""Which processor kernels are made for."""

import dataclasses
import functools
import importlib
import importlib.util
import os
import platform

import jax

# Earlier ones write pointers as LLVM does not read them any more.
_LEAST_VERSION = 0, 46


@dataclasses.dataclass(frozen=True)
class Chip:
    """A processor.

    Attributes:
      lanes: float32 numbers that a vector register holds.
      rows, tokens: how many rows of weights a tile of a product has, and tokens at most: there is a
        register for each pair of them, and beside those one for each row and each token.
      cpu: as LLVM names it.
      features: as LLVM takes them.
    """

    lanes: int
    rows: int
    tokens: int
    cpu: str
    features: str


@functools.cache
def host_chip() -> Chip | None:
    """The processor that this runs on; None if there are no kernels for such a one."""
    llvm = importlib.import_module("llvmlite.binding")
    features, cpu = llvm.get_host_cpu_features(), llvm.get_host_cpu_name()
    if features.get("avx512f"):
        # LLVM would take half of a register, for the sake of what else a program does.
        return Chip(16, 5, 4, cpu, f"{features.flatten()},-prefer-256-bit")
    if features.get("avx2") and features.get("fma"):
        return Chip(8, 3, 3, cpu, features.flatten())
    # LLVM finds no features on Apple's, and every ARM processor of 64 bits has vectors.
    if features.get("neon") or platform.machine() in ("arm64", "aarch64"):
        return Chip(4, 5, 4, cpu, features.flatten())
    return None


def check_platform() -> None:
    """Raises ValueError where CPU kernels can neither be made nor run."""
    if jax.default_backend() != "cpu":
        lacking = "its kernels run on CPUs only"
    elif importlib.util.find_spec("llvmlite") is None:
        lacking = "it needs llvmlite, which `pip install 'jpaged[cpu]'` installs"
    elif unusable := _unusable_llvm():
        lacking = f"{unusable}; `pip install 'jpaged[cpu]'` installs another"
    elif os.name != "posix":
        lacking = f"its kernels are for Linux and macOS, not for {os.name!r}"
    elif host_chip() is None:
        lacking = "its kernels are for processors with AVX2 and FMA, or with NEON"
    else:
        return
    raise ValueError(
        f"backend 'cpu' on platform {jax.default_backend()!r}: {lacking}; pass backend='xla'"
    )


def _unusable_llvm() -> str | None:
    """Why the llvmlite that is installed cannot be used; None if it can."""
    try:
        version = importlib.import_module("llvmlite").__version__
        importlib.import_module("llvmlite.binding")
    except (ImportError, OSError) as error:
        return f"llvmlite cannot be imported ({error})"
    least = ".".join(map(str, _LEAST_VERSION))
    if tuple(map(int, version.split(".")[:2])) < _LEAST_VERSION:
        return f"llvmlite is {version}, and must be {least} or newer"
    return None
