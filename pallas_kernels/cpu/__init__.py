# SPDX-License-Identifier: Apache-2.0
"""Kernels for CPUs, which LLVM makes when they are first used.

Those of products are; attention and pages are XLA's.
"""

from jpaged.pallas_kernels.cpu.chip import check_platform
from jpaged.pallas_kernels.xla.attention import paged_attention
from jpaged.pallas_kernels.xla.pages import copy_pages, write_kv

__all__ = ["check_platform", "copy_pages", "paged_attention", "write_kv"]
