# SPDX-License-Identifier: Apache-2.0
"""Decoder models as pure functions of a parameter pytree and a paged KV cache."""

import os
import pathlib

DEMO = pathlib.Path(__file__).resolve().parent / "demo"
"""Directory of the shipped checkpoint."""


def find(model: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The directory that is meant: "demo" is `DEMO`, unless there is a directory of that name."""
    return DEMO if model == "demo" and not os.path.isdir(model) else model
