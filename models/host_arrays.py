# SPDX-License-Identifier: Apache-2.0
"""Arrays of weights on their way to a device: where they lie, and whether they are finite."""

import math
import os

import jax.numpy as jnp
import numpy as np

from jpaged.models.stored_tensor import CheckpointError

_BITS = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32)}
MOST_THREADS = min(16, os.cpu_count() or 1)
"""That read and convert parts of an array beside each other, outside Python's lock mostly."""
# What XLA asks of memory that it takes over without a copy.
_ALIGNMENT = 64
# glibc reuses no more than 32 MiB, a piece's own head included.
_LARGEST_REUSED = 2**25 - 2**16


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that XLA takes over on CPU, so that there is no second copy."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def reuse_freed_memory() -> None:
    """Has arrays of up to 32 MB that are freed be reused, rather than returned to the system.

    The C library (glibc) hands back whatever is larger than the largest piece that was freed so
    far. Temporary arrays of NumPy are then new memory each time, which the system clears, page by
    page: of the time to dequantise a model, a third.
    """
    np.empty(_LARGEST_REUSED, np.uint8)  # never touched, and freed at once


def is_finite(array: np.ndarray) -> bool:
    """Whether every number of an array of float32, float16 or bfloat16 is finite."""
    if not array.size:
        return True
    # By their bits, in two passes at the speed of memory: as integers with a sign, infinity and NaN
    # are above all numbers; as those without one, negative infinity and NaN are.
    signed, unsigned = _BITS[array.dtype.itemsize]
    infinities = np.array([np.inf, -np.inf], array.dtype)
    return bool(
        array.view(signed).max() < infinities.view(signed)[0]
        and array.view(unsigned).max() < infinities.view(unsigned)[1]
    )


def not_finite(what: str, stored: np.dtype, loaded: np.dtype) -> CheckpointError:
    """The error of a tensor that is not finite in the dtype that it was loaded in."""
    most = float(jnp.finfo(loaded).max)
    if 2 * most < float(jnp.finfo(stored).max):  # bfloat16 holds all but a few of float32
        return CheckpointError(
            f"{what} holds numbers beyond {most:.5g}, the largest of {loaded.name}, or NaN; load "
            "it in another dtype"
        )
    return CheckpointError(
        f"{what} holds NaN or infinity, which no weight is; download or copy it again"
    )
