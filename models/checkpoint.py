# SPDX-License-Identifier: Apache-2.0
"""Weights in and out: Hugging Face safetensors and GGUF files in, Orbax in and out.

A model directory holds `config.json` and either safetensors or `params/`, an Orbax checkpoint;
beside them, where the model has one, `tokenizer.json`.

Which tensor is meant, where a directory holds more than one: what config.json or the index names,
as in transformers; what changes the answer and is not decided by that is an error.

- safetensors and `params/` in one directory: an error, for nothing says which is newer.
- Of safetensors, the file or index that config.json's `transformers_weights` names counts; without
  it `model.safetensors`, alone; without that `model.safetensors.index.json`. What they leave aside
  is not read.
- With an index, each tensor comes from the file that the index names for it; copies in other files,
  and tensors that it does not list, are not looked at. A name that its file lacks is an error.
- With neither, all `*.safetensors` count together. Two that hold a tensor of the same name must
  hold the same bytes.
- `lm_head.weight` beside `tie_word_embeddings=true`: the stored head is used, as an untied one,
  unless it equals the embedding in the dtype that is loaded. Where it stands alone, it is the
  embedding too.
- Only float32, float16 and bfloat16 are weights, in either form, and only finite numbers. Tensors
  that the model has no use of are errors, but for the buffers of old checkpoints.
"""

import dataclasses
import functools
import json
import logging
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from jpaged.models.config import ModelConfig
from jpaged.models.config_json import config_to_hf
from jpaged.models.decoder import Params, stacked_place
from jpaged.models.fitting import (
    check_size,
    check_tensors,
    wanted_shapes,
)
from jpaged.models.gguf_file import GgufFile
from jpaged.models.gguf_model import GgufWeights
from jpaged.models.host_arrays import aligned, reuse_freed_memory
from jpaged.models.json_fields import shown
from jpaged.models.merged import merge_projections, merged_place, split_shapes
from jpaged.models.param_trees import insert, parent_of
from jpaged.models.paths import is_address, path_of, resolved
from jpaged.models.safetensors_weights import SafetensorsWeights
from jpaged.models.sharding import check_mesh, param_sharding
from jpaged.models.sources import opened, read_config
from jpaged.models.stored_tensor import (
    WEIGHT_DTYPES,
    CheckpointError,
    MemoryOf,
    no_memory,
)

logger = logging.getLogger(__name__)

ORBAX_DIR = "params"
"""Where in a model's directory an Orbax checkpoint lies."""

_STACKED = re.compile(r"layers/(\d{1,9})/(.+)")


class Weights(Protocol):
    """The parameters of a model on disk, found to be this model's, and unread."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the parameters that are there, by path, such as `layers_3/mlp/up_proj/weight`."""
        ...

    @property
    def dtypes(self) -> Mapping[str, np.dtype]:
        """In which they are stored, by path."""
        ...

    def read(
        self, targets: Mapping[str, jax.ShapeDtypeStruct], memory_of: MemoryOf = no_memory
    ) -> Iterator[tuple[str, jax.Array | np.ndarray]]:
        """Reads parameters in the order of the targets, which say in which dtype and where to.

        What there is memory of the host for is read to it, and comes as that.
        """
        ...


def load(
    directory: str | pathlib.Path | GgufFile,
    dtype: jnp.dtype,
    before_reading: Callable[[ModelConfig], object] = lambda config: None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    scan_layers: bool = False,
    merge: bool = False,
) -> tuple[ModelConfig, Params]:
    """Loads a model directory, whichever form its weights have, or a GGUF file.

    Host and device hold the parameters once, and little beside: they are read, converted, and
    stacked, a part at a time.

    Args:
      directory: holds config.json and the weights; or a GGUF file, or its path.
      dtype: every parameter is converted to it as it is read.
      before_reading: called when config.json and the files have been found to fit each other, to
        refuse the model before it takes time and memory.
      mesh: whose devices get a part each, as `models.sharding` has it, and read no more than that,
        but for interleaved and packed weights and GGUF files; None loads onto the first device.
      scan_layers: as `Decoder` has it: whether the parameters are stacked.
      merge: whether projections of the same tokens are one weight, see `models.merged`; of layers
        that are not stacked, on one device.

    Returns:
      The config and the parameter tree of `Decoder(config, scan_layers)`, merged if asked. A tied
      config beside a different head comes back untied.

    Raises:
      FileNotFoundError: if the directory, its config.json or its weights are missing.
      ModelConfigError: if config.json describes a model that is not supported.
      CheckpointError: if a file is damaged, or a tensor is missing, unexpected, of another shape or
        dtype, not finite, or stored twice with different contents.
      ValueError: if the model cannot be split over the mesh, or `merge` is asked for beside a mesh
        or stacked layers.
    """
    if merge and (mesh is not None or scan_layers):
        raise ValueError("merge=True takes no mesh, and scan_layers=False")
    config, weights = find_weights(directory)
    if mesh is not None:
        check_mesh(config, mesh)
    before_reading(config)
    where: Any = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(path: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        sharding = where if mesh is None else param_sharding(path.split("/"), len(shape), mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    params: Params = {}
    reuse_freed_memory()
    # On the host, parameters are read to where they lie in stacked and merged arrays; on devices,
    # written there.
    on_host = mesh is None and jax.local_devices()[0].platform == "cpu"
    wholes: dict[str, np.ndarray] = {}

    def memory_of(path: str) -> np.ndarray | None:
        if not on_host:
            return None
        shape = weights.shapes[path]
        if scan_layers and (place := stacked_place(path, config)):
            whole, at, count = place
            return whole_of(whole, (count, *shape))[at]
        if merge and (place := merged_place(path, config)):
            whole, at, count = place
            return whole_of(whole, (count, *shape[1:]))[at : at + shape[0]]
        return None

    def whole_of(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path not in wholes:
            wholes[path] = aligned(shape, np.dtype(dtype))
        return wholes[path]

    # What a parameter takes while it is read is beside the fewest others so.
    largest_first = sorted(weights.shapes.items(), key=lambda item: -math.prod(item[1]))
    targets = {path: target(path, shape) for path, shape in largest_first}
    for path, leaf in read_with_bar(weights, targets, memory_of):
        if isinstance(leaf, np.ndarray):
            continue
        place = stacked_place(path, config) if scan_layers else None
        if place is None:
            insert(params, path, leaf)
            continue
        path, number, count = place
        shape = (count, *leaf.shape)
        parent, name = parent_of(params, path)
        if name not in parent:
            parent[name] = jnp.zeros(shape, dtype, device=target(path, shape).sharding)
        parent[name] = _with_layer(parent[name], leaf, number)
    for path, whole in wholes.items():
        insert(params, path, jax.make_array_from_callback(whole.shape, where, whole.__getitem__))
    if merge and not on_host:
        params = merge_projections(params)
    return _tie(config, params)


@functools.partial(jax.jit, donate_argnums=0)
def _with_layer(stacked: jax.Array, leaf: jax.Array, number: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, leaf, number, 0)


def find_weights(model: str | pathlib.Path | GgufFile) -> tuple[ModelConfig, Weights]:
    """Reads the config of a model, and finds its weights; see `load`."""
    directory = opened(model if isinstance(model, GgufFile) else path_of(model))
    config = read_config(directory)
    if isinstance(directory, GgufFile):
        return config, GgufWeights(directory, config)
    orbax = directory / ORBAX_DIR
    if not orbax.is_dir() or not any(orbax.iterdir()):
        if is_address(directory):
            raise CheckpointError(
                f"{str(directory)!r} has no {ORBAX_DIR}/ (Orbax), the one form that is read from a "
                "bucket: copy the model to a disk, or convert it (jpaged convert --format=orbax)"
            )
        return config, SafetensorsWeights(directory, config)
    for other in sorted(directory.glob("*.safetensors"))[:1]:
        raise CheckpointError(
            f"{str(directory)!r} holds weights twice, in {ORBAX_DIR}/ (Orbax) and in "
            f"{shown(other.name)}: move one of them out"
        )
    from jpaged.models.orbax_weights import OrbaxWeights  # here, as importing Orbax takes time

    return config, OrbaxWeights(resolved(orbax), config)


def kv_scales_of(model: str | pathlib.Path | GgufFile) -> np.ndarray | None:
    """The scales of float8 pages that a model's safetensors have, f32[num_layers, 2].

    Each is what a stored number is multiplied by, as in vLLM; None where there are none. Raises as
    `load` does, and CheckpointError if they are not one pair of numbers above 0 a layer.
    """
    _, weights = find_weights(model)
    return weights.kv_scales() if isinstance(weights, SafetensorsWeights) else None


def read_with_bar(
    weights: Weights,
    targets: Mapping[str, jax.ShapeDtypeStruct],
    memory_of: MemoryOf = no_memory,
) -> Iterator[tuple[str, Any]]:
    """Reads parameters as `Weights.read` does, and shows on a terminal how far it is."""
    sizes = {path: math.prod(t.shape) * t.dtype.itemsize for path, t in targets.items()}
    with tqdm.tqdm(
        total=sum(sizes.values()),
        desc="weights",
        unit="B",
        unit_scale=True,
        disable=None,
        leave=False,
    ) as bar:
        for path, leaf in weights.read(targets, memory_of):
            yield path, leaf
            bar.update(sizes[path])


def check_params(config: ModelConfig, params: Any) -> None:
    """Refuses what is not the parameters of a model, by what arrays say of themselves.

    Args:
      config: the model's shape.
      params: held against the parameter tree of `Decoder(config)`, stacked where it has `layers`,
        and merged where `merge_projections` did so; `kv_scales` may be beside it.
        NumPy's and jax's arrays of floating point numbers are parameters; float64 too, for it is
        cast.

    Raises:
      CheckpointError: if a tensor is missing, unexpected, of another shape or dtype, or no array.
    """
    if not isinstance(params, Mapping):
        raise CheckpointError(
            f"params={shown(params)} must be a mapping: the parameter tree of Decoder(model_config)"
        )
    try:
        leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: x is None)
    except (TypeError, ValueError):  # of keys that cannot be sorted
        raise CheckpointError(
            "params must be a mapping from strings to arrays and to such mappings"
        ) from None
    found: dict[str, Any] = {}
    for keys, leaf in leaves:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not isinstance(leaf, np.ndarray | jax.Array) or isinstance(leaf, np.ma.MaskedArray):
            raise CheckpointError(
                f"params: tensor {shown(path)} must be an array of NumPy's or jax's, without a "
                f"mask, not of type {type(leaf).__name__}"
            )
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise CheckpointError(
                f"params: tensor {shown(path)} was deleted, or donated to a computation; make the "
                "parameters again"
            )
        found[path] = leaf
    if (scales := found.pop("kv_scales", None)) is not None:
        if scales.shape != (config.num_layers, 2):
            raise CheckpointError(
                f"params: kv_scales has shape {list(scales.shape)}, expected "
                f"[{config.num_layers}, 2]: of each layer's keys and values"
            )
    stacked, found = found, split_shapes(_unstacked(found, config), config)
    check_size("params", config, found, asking="model_config")
    check_tensors("params", wanted_shapes(config, {}), found, asking="model_config")
    for path, leaf in stacked.items():
        if leaf.dtype.name not in (*WEIGHT_DTYPES, "float64"):
            raise CheckpointError(
                f"params: tensor {shown(path)} has dtype {leaf.dtype.name}; supported: "
                f"{', '.join(WEIGHT_DTYPES)}, float64. Quantised weights must be dequantised first"
            )


def _unstacked(found: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """What arrays are of each layer, where layers are stacked: their shapes and dtypes."""
    tensors: dict[str, Any] = {}
    for path, leaf in found.items():
        match = _STACKED.fullmatch(path)
        if match is None or not leaf.ndim:
            tensors[path] = leaf
            continue
        one = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        for number in range(min(leaf.shape[0], config.num_layers + 1)):
            tensors[f"layers_{int(match[1]) + len(config.pattern) * number}/{match[2]}"] = one
    return tensors


def save_orbax(directory: str | pathlib.Path, config: ModelConfig, params: Params) -> None:
    """Writes config.json and `params/`, an Orbax checkpoint that `load` reads onto any mesh.

    Args:
      directory: created where it does not exist; an older `params/` in it is replaced.
      config: the model's shape.
      params: the unstacked parameter tree of `Decoder(config)`, on whatever devices, stored in the
        dtype it has.
    """
    from jpaged.models import orbax_weights

    path = resolved(path_of(directory))
    path.mkdir(parents=True, exist_ok=True)
    orbax_weights.save(path / ORBAX_DIR, params)
    (path / "config.json").write_text(json.dumps(config_to_hf(config), indent=2) + "\n")


def _tie(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Decides about a stored head beside a tied config, as transformers does."""
    if not config.tie_word_embeddings or "lm_head" not in params:
        return config, params
    head = params.pop("lm_head")
    if "embedding" not in params:
        return config, {"embedding": head} | params
    if bool(jnp.array_equal(params["embedding"], head)):
        return config, params
    logger.warning(
        "config.json says tie_word_embeddings=true, and the checkpoint holds an lm_head that is "
        "not the embedding: the stored head is used. Say tie_word_embeddings=false there."
    )
    return dataclasses.replace(config, tie_word_embeddings=False), params | {"lm_head": head}
