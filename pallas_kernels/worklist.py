# SPDX-License-Identifier: Apache-2.0
"""Lists of work of a length that only the device knows, in arrays of a static size."""

import jax
import jax.numpy as jnp


def expand(counts: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lays `counts[i]` items of each owner i in a row.

    Args:
      counts: i32[owners].
      size: as many items as there can be.

    Returns:
      Owner of each item, and its place among those of the owner, i32[size]; both are in range past
      the last item too. How many items there are, i32[].
    """
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    items = jnp.arange(size, dtype=jnp.int32)
    owner = (ends[None, :] <= items[:, None]).sum(axis=1, dtype=jnp.int32)
    owner = jnp.minimum(owner, counts.shape[0] - 1)
    live = items < ends[-1]
    return owner, jnp.where(live, items - (ends - counts)[owner], 0), ends[-1]
