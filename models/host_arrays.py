# SPDX-License-Identifier: Apache-2.0
"""Arrays of weights on their way to a device: where they lie, and whether they are finite."""

import math

import jax.numpy as jnp
import numpy as np

from jpaged.models.stored_tensor import CheckpointError

_BITS = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32)}
# What XLA asks of memory that it takes over without a copy.
_ALIGNMENT = 64


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that XLA takes over on CPU, so that there is no second copy."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


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
