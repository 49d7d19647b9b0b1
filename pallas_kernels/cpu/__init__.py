# SPDX-License-Identifier: Apache-2.0
"""Kernels for CPUs, which LLVM makes when they are first used; pages are written by XLA's."""

import importlib
from typing import Any

from jpaged.pallas_kernels.cpu.chip import check_platform
from jpaged.pallas_kernels.xla.pages import copy_pages, write_kv


def __getattr__(name: str) -> Any:
    """What needs llvmlite, which `check_platform` may say is not there, is imported when used."""
    if name == "paged_attention":
        return importlib.import_module("jpaged.pallas_kernels.cpu.attention").paged_attention
    raise AttributeError(name)


__all__ = ["check_platform", "copy_pages", "write_kv"]
