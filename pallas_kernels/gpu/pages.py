# SPDX-License-Identifier: Apache-2.0
"""Writes to the page pool on GPUs, in place under donation: XLA's scatters, which move no more.

`docs/decisions.md` has what was looked at in the compiled modules.
"""

import jax

from jpaged.pallas_kernels import reference

copy_pages = jax.jit(reference.copy_pages)
write_kv = jax.jit(reference.write_kv)
