# SPDX-License-Identifier: Apache-2.0
"""Kernels for NVIDIA GPUs: Mosaic GPU for Hopper and Blackwell, Triton for Ampere and Ada."""

from jpaged.pallas_kernels.gpu.attention import paged_attention
from jpaged.pallas_kernels.gpu.chip import check_platform
from jpaged.pallas_kernels.gpu.pages import copy_pages, write_kv

__all__ = ["check_platform", "copy_pages", "paged_attention", "write_kv"]
