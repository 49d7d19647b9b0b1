# SPDX-License-Identifier: Apache-2.0
"""Projections of the same tokens as one product, for devices where each short kernel costs."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.models.config import MlpSpec, ModelConfig

# What `layers.Attention` and `layers.GatedMlp` take instead of a projection each.
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_PART = re.compile(rf"(layers_(\d+)/\w+/)({'|'.join(sum(MERGED.values(), ()))})/(weight|bias)")


def merge_projections(params: Any) -> Any:
    """Lays weights side by side that multiply the same tokens: features are in order of `MERGED`.

    Experts stay as they are. What is merged is taken out of `params` one by one, so that, where
    nobody else holds them, no more than one layer's weights are there twice.

    Args:
      params: a decoder's parameters, layers stacked or not, merged or not; dictionaries in it are
        changed.

    Returns:
      `params`.
    """
    for tree in params.values():
        if isinstance(tree, dict):
            merge_projections(tree)
    for name, parts in MERGED.items():
        if "router" in params or not all(part in params for part in parts):
            continue
        trees = [params.pop(part) for part in parts]
        params[name] = merged = {}
        for leaf, axis in (("weight", -2), ("bias", -1)):
            if leaf in trees[0]:
                # Waited for: those that are dispatched and not begun hold what they merge.
                whole = jnp.concatenate([tree.pop(leaf) for tree in trees], axis)
                merged[leaf] = jax.block_until_ready(whole)
    return params


def split_shapes(found: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """What merged weights were before: shapes and dtypes of each.

    Args:
      found: arrays by path, of layers that are not stacked, merged or not.
      config: the model's.

    Returns:
      `found`, with what `merge_projections` would make of it in its place; what has another shape
      stays, as does what was not merged.
    """
    split: dict[str, Any] = {}
    for path, leaf in found.items():
        match = re.fullmatch(rf"(layers_(\d+)/\w+/)({'|'.join(MERGED)})/(weight|bias)", path)
        sizes = _sizes(match[3], config, int(match[2])) if match else ()
        if match is None or not leaf.ndim or leaf.shape[0] != sum(sizes):
            split[path] = leaf
            continue
        for name, size in zip(MERGED[match[3]], sizes, strict=True):
            shape = (size, *leaf.shape[1:])
            split[f"{match[1]}{name}/{match[4]}"] = jax.ShapeDtypeStruct(shape, leaf.dtype)
    return split


def merged_place(path: str, config: ModelConfig) -> tuple[str, int, int] | None:
    """Where `merge_projections` puts a parameter, e.g. of path `layers_3/mlp/up_proj/weight`.

    Returns:
      The path of the merged parameter, such as `layers_3/mlp/gate_up_proj/weight`, which of its
      features is the first of this one, and how many it has; None of what is not merged.
    """
    if (match := _PART.fullmatch(path)) is None:
        return None
    name = next(name for name, parts in MERGED.items() if match[3] in parts)
    if name == "gate_up_proj" and not isinstance(config.layer(int(match[2])).mlp, MlpSpec):
        return None
    sizes, number = _sizes(name, config, int(match[2])), MERGED[name].index(match[3])
    return f"{match[1]}{name}/{match[4]}", sum(sizes[:number]), sum(sizes)


def _sizes(name: str, config: ModelConfig, index: int) -> tuple[int, ...]:
    """Features of each part of a merged weight of a layer; none where there is no such layer."""
    if index >= config.num_layers:
        return ()
    layer = config.layer(index)
    if name == "gate_up_proj":
        return 2 * (layer.mlp.intermediate_size,)
    own = layer.attention
    return tuple(n * own.head_dim for n in (own.num_q_heads, own.num_kv_heads, own.num_kv_heads))
