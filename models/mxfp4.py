# SPDX-License-Identifier: Apache-2.0
"""MXFP4: numbers of four bits in blocks of 32 that share a power of two.

Source: Open Compute Project, "OCP Microscaling Formats (MX) Specification 1.0", 2023.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

BLOCK_VALUES = 32
# What the 16 codes stand for (E2M1): a sign, two bits of exponent, one of mantissa.
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_EXPONENT_BIAS = 127  # of a block's scale (E8M0)


@functools.partial(jax.jit, static_argnames="dtype")
def dequantised(blocks: jax.Array, scales: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The numbers that blocks stand for; exact in float32 and bfloat16.

    Args:
      blocks: u8[..., num_blocks, 16], two codes a byte, the lower half first.
      scales: u8[..., num_blocks], exponents of two, biased by 127.
      dtype: of the result.

    Returns:
      dtype[..., num_blocks * 32].
    """
    codes = jnp.stack([blocks & 0xF, blocks >> 4], axis=-1)
    codes = codes.reshape(*scales.shape, BLOCK_VALUES).astype(jnp.int32)
    values = jnp.asarray(np.concatenate([_VALUES, -_VALUES]))[codes]
    exponents = scales.astype(jnp.int32) - _EXPONENT_BIAS
    numbers = jnp.ldexp(values, exponents[..., None]).astype(dtype)
    return numbers.reshape(*scales.shape[:-1], -1)
