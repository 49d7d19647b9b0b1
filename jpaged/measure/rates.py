# SPDX-License-Identifier: Apache-2.0
"""How fast this device copies and multiplies, measured: what a step is held to."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Larger than a cache holds, and those of servers' CPUs hold 300 MB; of those for accelerators the
# fastest counts.
_COPY_BYTES = (2**26, 2**28, 2**30)
_CPU_COPY_BYTES = 2**29
_PRODUCT_SIZE, _CPU_PRODUCT_SIZE = 8192, 1024
_RUNS = 5


def copy_rates(limit_bytes: float | None = None) -> dict[str, float]:
    """Bytes a second, read and written, of copies of so many bytes on the default device.

    On a CPU an array is changed in place: a copy would be into memory that the system must first
    give, which takes ten times as long.

    Args:
      limit_bytes: what of the device's memory may be used; None takes what is free.
    """
    limit = _free_bytes() if limit_bytes is None else limit_bytes
    on_cpu = jax.default_backend() == "cpu"
    sizes, room = ((_CPU_COPY_BYTES,), 4) if on_cpu else (_COPY_BYTES, 16)
    if on_cpu:
        copy = jax.jit(lambda array: array + 1, donate_argnums=0)
    else:
        copy = jax.jit(jnp.copy)
    found = {}
    for size in [size for size in sizes if room * size <= limit] or [2**24]:
        array = jnp.zeros(size // 4, jnp.int32)
        found[str(size)] = 2 * size / _least_s(copy, array, 3 if on_cpu else 10)
    return found


def product_rate(dtype: np.dtype) -> float:
    """Multiplications and additions a second of a large matrix product in `dtype`."""
    on_cpu = jax.default_backend() == "cpu"
    size, free = _CPU_PRODUCT_SIZE if on_cpu else _PRODUCT_SIZE, _free_bytes()
    while size > 256 and 6 * size * size * np.dtype(dtype).itemsize > free:
        size //= 2
    multiply, x = jax.jit(jnp.matmul), jnp.ones((size, size), dtype)
    eye = jnp.eye(size, dtype=dtype)  # an argument: a constant would be known to the compiler
    return 2 * size**3 / _least_s(lambda y: multiply(y, eye), x, 3 if on_cpu else 10)


def _least_s(function: Callable[[jax.Array], jax.Array], array: jax.Array, calls: int) -> float:
    """Seconds of a call, each on the result of the one before, of the fastest run of so many."""
    array, least = jax.block_until_ready(function(array)), float("inf")
    for _ in range(_RUNS):
        start = time.perf_counter()
        for _ in range(calls):
            array = function(array)
        jax.block_until_ready(array)
        least = min(least, (time.perf_counter() - start) / calls)
    return least


def _free_bytes() -> float:
    """Free memory of the default device; CPUs do not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return float(2**32)
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
