# SPDX-License-Identifier: Apache-2.0
"""PagedAttention for JAX: generation with a paged key-value cache and continuous batching."""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jpaged.engine import Engine
    from jpaged.host.config import EngineConfig
    from jpaged.host.outputs import Completion, RequestOutput
    from jpaged.host.params import SamplingParams

_HOMES = {
    "Completion": "jpaged.host.outputs",
    "Engine": "jpaged.engine",
    "EngineConfig": "jpaged.host.config",
    "RequestOutput": "jpaged.host.outputs",
    "SamplingParams": "jpaged.host.params",
}

__all__ = ["Completion", "Engine", "EngineConfig", "RequestOutput", "SamplingParams"]
__version__ = "0.1.0"

if not os.path.isdir(os.path.join(__path__[0], "models")):
    # A checkout, installed or not: the other floors stand beside this folder, not in it.
    __path__.append(os.path.dirname(__path__[0]))


def __getattr__(name: str):
    """Imports the public names on first use, so that the scheduler can be used without jax."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jpaged' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
