# SPDX-License-Identifier: Apache-2.0
"""Projections of the same tokens as one product, for devices where each short kernel costs."""

from typing import Any

import jax.numpy as jnp

# What `layers.Attention` and `layers.GatedMlp` take instead of a projection each.
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


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
                merged[leaf] = jnp.concatenate([tree.pop(leaf) for tree in trees], axis)
    return params
