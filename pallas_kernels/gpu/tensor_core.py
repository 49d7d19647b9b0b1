# SPDX-License-Identifier: Apache-2.0
"""The tensor cores of Hopper and of Blackwell, as one thing: products of tiles in shared memory."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Hopper:
    """wgmma: a warpgroup multiplies 64 rows and has the sums in its registers.

    Attributes:
      rows: of a product.
      max_wgs: warpgroups that may share a tile.
      max_value_lanes: that are multiplied at once, so that registers hold the product beside the
        sums that it is added to.
      layout: of its numbers over the warpgroup's registers.
    """

    rows = 64
    max_wgs = 2
    max_value_lanes = 128
    layout = plgpu.Layout.WGMMA

    def scratch(self, lanes: dict[str, int]) -> dict:
        """What products of so many lanes need beside their operands."""
        del lanes
        return {}

    def multiply(self, a_ref, b_ref, name: str, scratch: dict) -> jax.Array:
        """f32[m, n] of `a_ref` [m, k] and `b_ref` [k, n], which are free again then.

        m is `rows`, or with Hopper a multiple of it.

        `name` is the one in `scratch` whose lanes are n.
        """
        del name, scratch

        def product(acc_ref):
            plgpu.wgmma(acc_ref, a_ref, b_ref)
            return acc_ref[...]

        return pl.run_scoped(
            product, plgpu.WGMMAAccumulatorRef((a_ref.shape[0], b_ref.shape[1]), jnp.float32)
        )


class Blackwell:
    """tcgen05: one thread has 128 rows multiplied, and the sums are in tensor memory at first.

    Attributes:
      rows, max_wgs, max_value_lanes, layout: as in `Hopper`.
    """

    rows = 128
    max_wgs = 1
    max_value_lanes = 64
    layout = plgpu.Layout.TCGEN05

    def scratch(self, lanes: dict[str, int]) -> dict:
        """See `Hopper`."""
        memory = {
            name: plgpu.TMEM((self.rows, count), jnp.float32) for name, count in lanes.items()
        }
        return memory | {"multiplied": plgpu.Barrier(orders_tensor_core=True)}

    def multiply(self, a_ref, b_ref, name: str, scratch: dict) -> jax.Array:
        """See `Hopper`."""
        acc_ref, done = scratch[name], scratch["multiplied"]
        plgpu.tcgen05_mma(acc_ref, a_ref, b_ref, done, accumulate=False)
        plgpu.barrier_wait(done)
        product = plgpu.async_load_tmem(acc_ref)
        plgpu.wait_load_tmem()
        return product
