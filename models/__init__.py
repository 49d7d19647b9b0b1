# SPDX-License-Identifier: Apache-2.0
"""Decoder models as pure functions of a parameter pytree and a paged KV cache."""

import os
import pathlib

from jpaged.models import hub, paths

DEMO = pathlib.Path(__file__).resolve().parent / "demo"
"""Directory of the shipped checkpoint."""


def find(model: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The directory or GGUF file that is meant, which counts where there is one of that name.

    Args:
      model: a path, or an address such as gs://bucket/model; "demo" is `DEMO`; "org/name" is a
        model of the Hugging Face hub, which is downloaded as far as it is not in the hub's cache
        yet, and "org/name.gguf" never is one.

    Raises:
      FileNotFoundError: if a name of the hub cannot be had (see `hub.download`), or an address
        cannot be reached.
      ValueError: if it looks like an address, and is of no known kind.
    """
    if not isinstance(model, str | os.PathLike):
        return model
    if os.path.lexists(model):
        return pathlib.Path(model) if paths.is_address(model) else model
    if paths.is_address(model):
        return paths.find_address(os.fspath(model))
    if model == "demo":
        return DEMO
    if hub.is_name(model) and not os.fspath(model).lower().endswith(".gguf"):
        return hub.download(os.fspath(model))
    return model
