# SPDX-License-Identifier: Apache-2.0
"""The kernels in Pallas for TPUs, v4 and newer."""

from jpaged.pallas_kernels.tpu.attention import paged_attention
from jpaged.pallas_kernels.tpu.chip import check_platform
from jpaged.pallas_kernels.tpu.pages import copy_pages, write_kv

__all__ = ["check_platform", "copy_pages", "paged_attention", "write_kv"]
