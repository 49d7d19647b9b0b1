# SPDX-License-Identifier: Apache-2.0
"""Parameters by path, such as `layers_3/mlp/up_proj/weight`, in trees of dictionaries."""

from collections.abc import Iterator
from typing import Any

import jax

from jpaged.models.decoder import Params


def flat(tree: Params) -> Iterator[tuple[str, Any]]:
    """The leaves of a tree of dictionaries by path, such as `layers_3/mlp/up_proj/weight`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield "/".join(key.key for key in path), leaf


def insert(params: Params, path: str, leaf: Any) -> None:
    """Puts a leaf into a tree of dictionaries, as `layers_3/mlp/up_proj/weight`."""
    parent, name = parent_of(params, path)
    parent[name] = leaf


def parent_of(params: Params, path: str) -> tuple[Params, str]:
    """The dictionary that a leaf of a tree lies in, made where it is missing, and its key."""
    *parents, name = path.split("/")
    for parent in parents:
        params = params.setdefault(parent, {})
    return params, name
