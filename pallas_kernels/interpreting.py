# SPDX-License-Identifier: Apache-2.0
"""Whether Pallas kernels are interpreted where their device is not there."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


def is_forced() -> bool:
    """Whether jax interprets what is traced now; it says so in nothing but the lowering."""

    def touch(x):
        def kernel(x_ref, out_ref):
            out_ref[...] = x_ref[...]

        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    try:
        jax.jit(touch).lower(jax.ShapeDtypeStruct((8, 128), jnp.float32))
    except ValueError:
        return False
    return True
