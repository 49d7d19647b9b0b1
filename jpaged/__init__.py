# SPDX-License-Identifier: Apache-2.0
"""PagedAttention for JAX: generation with a paged key-value cache and continuous batching."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jpaged.config import EngineConfig
    from jpaged.engine import Engine
    from jpaged.outputs import Completion, RequestOutput
    from jpaged.params import SamplingParams

_HOMES = {
    "Completion": "jpaged.outputs",
    "Engine": "jpaged.engine",
    "EngineConfig": "jpaged.config",
    "RequestOutput": "jpaged.outputs",
    "SamplingParams": "jpaged.params",
}

__all__ = ["Completion", "Engine", "EngineConfig", "RequestOutput", "SamplingParams"]


def __getattr__(name: str):
    """Imports the public names on first use, so that the scheduler can be used without jax."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jpaged' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
