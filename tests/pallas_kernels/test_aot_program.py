# SPDX-License-Identifier: Apache-2.0
"""What is read off compiled programs, here of programs for the CPU."""

import jax
import jax.numpy as jnp

from jpaged.pallas_kernels.aot.program import collectives, in_place_error, operations_giving


def compiled(function, **options):
    pool = jax.ShapeDtypeStruct((64, 1024), jnp.float32)
    return jax.jit(function, **options).lower(pool).compile(), pool


def test_an_array_that_is_made_anew_is_seen():
    program, _ = compiled(lambda pool: pool[::-1] + 1)
    assert operations_giving(program, (64, 1024))
    assert operations_giving(program, (64, 1025)) == ()
    assert collectives(program) == {}


def test_a_donated_pool_that_comes_back_is_in_place():
    assert in_place_error(*compiled(lambda pool: pool.at[0, 0].set(1), donate_argnums=0)) is None
    error = in_place_error(*compiled(lambda pool: pool.at[0, 0].set(1)))
    assert error == "aliases 0 bytes of a pool of 262144"
