# SPDX-License-Identifier: Apache-2.0
"""The kernels in plain XLA: the CPU's real backend, and correct on every device."""

from jpaged.pallas_kernels.xla.attention import paged_attention
from jpaged.pallas_kernels.xla.pages import copy_pages, write_kv


def check_platform() -> None:
    """Nothing to check: XLA compiles for every device."""


__all__ = ["check_platform", "copy_pages", "paged_attention", "write_kv"]
