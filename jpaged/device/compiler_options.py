# SPDX-License-Identifier: Apache-2.0
"""How steps are compiled for the platform that they run on; docs/decisions.md says why."""

import os
import pathlib
import shlex
from collections.abc import Mapping
from types import MappingProxyType

GPU_OPTIONS: Mapping[str, str | int | bool] = MappingProxyType(
    {
        # Each program of a step is launched as one CUDA graph, loops and kernels of ours included.
        "xla_gpu_graph_min_graph_size": 1,
        "xla_gpu_enable_command_buffer": (
            "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
        ),
        # Products of one array by several weights are not made one: it would concatenate weights.
        "xla_gpu_dot_merger_threshold_mb": 0,
        # cuBLAS reads weights where they lie. Triton's products are split, with the parts in
        # memory, and each is compiled dozens of times to find the fastest.
        "xla_gpu_enable_triton_gemm": False,
    }
)
"""What steps are compiled with on NVIDIA GPUs, unless XLA_FLAGS has a flag of that name."""


def compiler_options(platform: str) -> dict[str, str | int | bool]:
    """What `jax.jit` is to compile a step with.

    Args:
      platform: as jax names them.
    """
    if platform not in ("gpu", "cuda"):
        return {}
    given = _given_flags()
    return {name: value for name, value in GPU_OPTIONS.items() if name not in given}


def scans_layers(scan_layers: bool | None, platform: str) -> bool:
    """Whether layers are stacked, and scanned over.

    Args:
      scan_layers: of `EngineConfig`; None scans on TPUs alone. On GPUs a scan copies each layer's
        weights out of the stack, in every step.
      platform: as jax names them.
    """
    return platform == "tpu" if scan_layers is None else scan_layers


def merges_projections(scan_layers: bool, platform: str) -> bool:
    """Whether weights that multiply the same tokens are one.

    Short products cost what they do not compute: a layer of 64 rows takes an H200 68 us without and
    55 with, a step of one row takes a CPU 1.11 times as long without. To merge weights is to copy
    them, once: of layers that are stacked, those of all layers at once, so they stay as they are.
    TPUs have not been looked at.

    Args:
      scan_layers: whether layers are stacked.
      platform: as jax names them.
    """
    return not scan_layers and platform in ("cpu", "gpu", "cuda")


def _given_flags() -> set[str]:
    """Names of the flags that XLA_FLAGS has, which may be the name of a file that has them."""
    text = os.environ.get("XLA_FLAGS", "").strip()
    if text and not text.startswith("-"):
        try:
            text = pathlib.Path(text).read_text(encoding="utf-8")
        except OSError:
            text = ""  # XLA says what is wrong with it
    return {word.lstrip("-").partition("=")[0] for word in shlex.split(text)}
