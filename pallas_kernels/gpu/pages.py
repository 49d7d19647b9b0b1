# SPDX-License-Identifier: Apache-2.0
"""Writes to the page pool on GPUs, in place under donation: XLA's scatters, which move no more.

`docs/decisions.md` has what was looked at in the compiled modules.
"""

from pallas_kernels.reference import copy_pages, write_kv

__all__ = ["copy_pages", "write_kv"]
