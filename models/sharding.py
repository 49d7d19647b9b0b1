# SPDX-License-Identifier: Apache-2.0
"""How a decoder is laid over a tensor-parallel mesh: a device has some heads and their pages."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from jpaged.models.config import ModelConfig
from jpaged.pallas_kernels import layout

# Axes of a weight [features, in] that are split, by the name of the module that holds it. Splitting
# what a product gives needs no communication, and splitting what the next one sums over makes its
# result a sum over devices: one all-reduce after attention, one after the MLP.
_SPLIT_AXIS = {
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "o_proj": 1,
    "gate_proj": 0,
    "up_proj": 0,
    "down_proj": 1,
    "embedding": 0,
    "lm_head": 0,
}
_TPU_LANES = 128


def axis_of(mesh: Mesh | AbstractMesh) -> str:
    """The one axis of a tensor-parallel mesh.

    Raises:
      ValueError: if it has more.
    """
    if len(mesh.axis_names) != 1:
        raise ValueError(f"a tensor-parallel mesh has one axis, not {mesh.axis_names}")
    return mesh.axis_names[0]


def check_mesh(config: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError unless heads, MLP and vocabulary split evenly over the devices."""
    axis_of(mesh)
    sizes = [("num_kv_heads", config.num_kv_heads), ("vocab_size", config.vocab_size)]
    sizes += [("intermediate_size", layer.mlp.intermediate_size) for layer in config.pattern]
    if any(attention.qk_norm == "all" for attention in config.attentions):
        raise ValueError("norms over all heads of a token cannot be computed by heads alone")
    for name, size in sizes:
        if size % mesh.size:
            raise ValueError(
                f"{name}={size} does not split over {mesh.size} devices; take a number of devices "
                "that divides it"
            )


def param_shardings(params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of each parameter.

    Args:
      params: a decoder's parameter tree, layers stacked or not; only shapes matter.
      mesh: as in `Decoder.mesh`.

    Returns:
      A tree of the same structure.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: param_sharding([entry.key for entry in path], leaf.ndim, mesh), params
    )


def param_sharding(names: Sequence[str], ndim: int, mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of one parameter.

    Args:
      names: its path, such as "layers_3", "mlp", "up_proj", "weight".
      ndim: how many axes it has.
      mesh: as in `Decoder.mesh`.
    """
    split = next((_SPLIT_AXIS[name] for name in names if name in _SPLIT_AXIS), None)
    spec: list[str | None] = [None] * ndim
    if names[-1] == "sinks":
        spec[-1] = axis_of(mesh)
    elif split is not None and names[-1] == "bias":
        # What is added to a sum over devices is on each of them.
        if split == 0:
            spec[-1] = axis_of(mesh)
    elif split is not None:
        # Stacked layers, and experts, come before the weight's own two axes.
        spec[ndim - 2 + split] = axis_of(mesh)
    return NamedSharding(mesh, PartitionSpec(*spec))


def shard_sizes(params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """How many numbers of each parameter a device holds; see `param_shardings`."""

    def size(leaf, where: NamedSharding) -> int:
        return math.prod(where.shard_shape(leaf.shape))

    return jax.tree.map(size, params, param_shardings(params, mesh))


def placements(params: Any, shardings: Any) -> Any:
    """Where each parameter lies, and how, so that TPUs copy none in a step (docs/decisions.md).

    A 7x multiplies other tiles than it stores arrays in: a loop over stacked layers would tile all
    of their weights anew. Embeddings whose width is no multiple of the lanes would be stored by
    columns, which is smaller, and written anew by rows, which tokens are looked up in.

    Args:
      params: a decoder's parameter tree; only shapes and dtypes matter.
      shardings: a tree of where, or one sharding for all.

    Returns:
      What `jax.device_put` takes: `shardings`, with rows for a TPU's embedding, and with tiles for
      a 7x's matrices of 16 bits.
    """

    def place(path, leaf, sharding: Sharding):
        device = next(iter(sharding.device_set))
        names = [getattr(entry, "key", None) for entry in path]
        matrix = names[-1] != "bias" and any(name in _SPLIT_AXIS for name in names)
        if device.device_kind == "TPU7x" and matrix and leaf.dtype.itemsize == 2:
            return Format(Layout(tuple(range(leaf.ndim)), ((16, 128), (2, 1))), sharding)
        by_rows = names == ["embedding"] and leaf.shape[-1] % _TPU_LANES
        if by_rows and device.device_kind.startswith("TPU"):
            return Format(Layout(tuple(range(leaf.ndim))), sharding)
        return sharding

    if isinstance(shardings, Sharding):
        one = shardings
        shardings = jax.tree.map(lambda leaf: one, params)
    return jax.tree_util.tree_map_with_path(place, params, shardings)


def pool_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of the page pool: whole pages, some heads."""
    return NamedSharding(mesh, pool_spec(mesh))


def pool_spec(mesh: Mesh) -> PartitionSpec:
    """`pool_sharding` without the mesh."""
    return PartitionSpec(*[None] * layout.HEADS_AXIS, axis_of(mesh))


def sinks_spec(mesh: Mesh) -> PartitionSpec:
    """How `[num_q_heads]` is split."""
    return PartitionSpec(axis_of(mesh))


def heads_spec(mesh: Mesh) -> PartitionSpec:
    """How `[num_tokens, heads, head_dim]` is split."""
    return PartitionSpec(None, axis_of(mesh), None)
