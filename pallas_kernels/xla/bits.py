# SPDX-License-Identifier: Apache-2.0
"""Floats of eight bits as the integers that XLA's CPU compiler moves as they are.

It computes with the floats in wider ones, and converts a whole pool around each gather and update,
in a loop each time round (measured: docs/decisions.md).
"""

from typing import Any

import jax
import jax.numpy as jnp


def as_bits(numbers: jax.Array) -> jax.Array:
    """Floats of eight bits as unsigned integers, other numbers as they are."""
    if not jnp.issubdtype(numbers.dtype, jnp.floating) or numbers.dtype.itemsize > 1:
        return numbers
    return jax.lax.bitcast_convert_type(numbers, jnp.uint8)


def from_bits(bits: jax.Array, dtype: Any) -> jax.Array:
    """The numbers of `dtype` that `as_bits` was given."""
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)
