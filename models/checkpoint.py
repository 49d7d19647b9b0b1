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
- Only float32, float16 and bfloat16 are weights, in either form. Tensors that the model has no use
  of are errors, but for the buffers of old checkpoints.
"""

import contextlib
import dataclasses
import json
import logging
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from jpaged.models import gguf_model, safetensors_files
from jpaged.models.config import ModelConfig
from jpaged.models.config_json import config_to_hf, load_config
from jpaged.models.decoder import Params
from jpaged.models.families import source_of
from jpaged.models.families.base import Source
from jpaged.models.gguf_file import GgufFile, is_gguf
from jpaged.models.json_fields import shown
from jpaged.models.safetensors_files import (
    CheckpointError,
    StoredTensor,
    TensorReader,
    stored_tensors,
)
from jpaged.models.tensor_checks import (
    check_dtypes,
    check_size,
    check_tensors,
    flatten,
    wanted_shapes,
)

logger = logging.getLogger(__name__)

_ORBAX_DIR = "params"
_DTYPES = ("float32", "float16", "bfloat16")


def load(
    directory: str | pathlib.Path | GgufFile,
    dtype: jnp.dtype,
    before_reading: Callable[[ModelConfig], object] = lambda config: None,
) -> tuple[ModelConfig, Params]:
    """Loads a model directory, whichever form its weights have, or a GGUF file.

    Args:
      directory: holds config.json and the weights; or a GGUF file, or its path.
      dtype: every parameter is converted to it as it is read, one tensor at a time.
      before_reading: called when config.json and the files have been found to fit each other, to
        refuse the model before it takes time and memory.

    Returns:
      The config and the parameter tree of `Decoder(config)`. A tied config beside a different head
      comes back untied.

    Raises:
      FileNotFoundError: if the directory, its config.json or its weights are missing.
      ModelConfigError: if config.json describes a model that is not supported.
      CheckpointError: if a file is damaged, or a tensor is missing, unexpected, of another shape or
        dtype, or stored twice with different contents.
    """
    if not isinstance(directory, GgufFile):
        directory = pathlib.Path(directory).expanduser()
        directory = GgufFile(directory) if is_gguf(directory) else directory
    if isinstance(directory, GgufFile):
        return _load_gguf(directory, dtype, before_reading)
    if not directory.is_dir():
        what = "is no directory" if directory.exists() else "does not exist"
        raise FileNotFoundError(f"model directory {str(directory)!r} {what}")
    if not (directory / "config.json").exists():
        remedy = "not a model directory"
        for other in sorted(directory.glob("*.gguf"))[:1]:
            remedy = f"to load a GGUF file, name it itself: {str(other)!r}"
        raise FileNotFoundError(f"{str(directory)!r} has no config.json: {remedy}")
    config = load_config(directory)
    orbax = directory / _ORBAX_DIR
    if not orbax.is_dir() or not any(orbax.iterdir()):
        params = _load_safetensors(directory, config, dtype, before_reading)
    else:
        for other in sorted(directory.glob("*.safetensors"))[:1]:
            raise CheckpointError(
                f"{str(directory)!r} holds weights twice, in {_ORBAX_DIR}/ (Orbax) and in "
                f"{shown(other.name)}: move one of them out"
            )
        params = _load_orbax(orbax, config, dtype, before_reading)
    return _tie(config, params)


def check_params(config: ModelConfig, params: Any) -> None:
    """Refuses what is not the parameters of a model, by what arrays say of themselves.

    Args:
      config: the model's shape.
      params: held against the unstacked parameter tree of `Decoder(config)`. NumPy's and jax's
        arrays of floating point numbers are parameters; float64 too, for it is cast.

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
    check_size("params", config, found, asking="model_config")
    check_tensors("params", wanted_shapes(config, {}), found, asking="model_config")
    for path, leaf in found.items():
        if leaf.dtype.name not in (*_DTYPES, "float64"):
            raise CheckpointError(
                f"params: tensor {shown(path)} has dtype {leaf.dtype.name}; supported: "
                f"{', '.join(_DTYPES)}, float64. Quantised weights must be dequantised first"
            )


def save_orbax(directory: str | pathlib.Path, config: ModelConfig, params: Params) -> None:
    """Writes config.json and `params/`, an Orbax checkpoint that `load` reads.

    Args:
      directory: created where it does not exist; an older `params/` in it is replaced.
      config: the model's shape.
      params: the unstacked parameter tree of `Decoder(config)`, stored in the dtype it has.
    """
    import orbax.checkpoint as ocp

    directory = pathlib.Path(directory).expanduser().resolve()
    directory.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / _ORBAX_DIR, params, force=True)
    (directory / "config.json").write_text(json.dumps(config_to_hf(config), indent=2) + "\n")


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


def _load_orbax(
    directory: pathlib.Path,
    config: ModelConfig,
    dtype: jnp.dtype,
    before_reading: Callable[[ModelConfig], object],
) -> Params:
    import orbax.checkpoint as ocp  # here, as most models have none, and it takes time

    directory = directory.resolve()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        with _damage_of_orbax(directory):
            stored = {
                path: StoredTensor(
                    file=directory,
                    shape=tuple(int(axis) for axis in leaf.shape),
                    dtype=np.dtype(leaf.dtype).name,
                )
                for path, leaf in flatten(checkpointer.metadata(directory).item_metadata.tree)
            }
        check_dtypes(stored, _DTYPES)
        check_size(str(directory), config, stored)
        wanted = wanted_shapes(config, {path: path for path in stored})
        check_tensors(str(directory), wanted, stored)
        before_reading(config)
        target: Params = {}
        for path, shape in wanted.items():
            _insert(target, path, jax.ShapeDtypeStruct(shape, dtype, sharding=sharding))
        with _damage_of_orbax(directory):
            return checkpointer.restore(directory, target)


@contextlib.contextmanager
def _damage_of_orbax(directory: pathlib.Path) -> Iterator[None]:
    """Says in one line what Orbax and TensorStore say of a damaged checkpoint in pages."""
    try:
        yield
    except Exception as e:  # whatever is damaged, another library's error surfaces
        raise CheckpointError(
            f"{directory} is not a readable Orbax checkpoint: a file is missing, damaged or "
            "truncated; copy it again, or save it anew"
        ) from e


def _load_safetensors(
    directory: pathlib.Path,
    config: ModelConfig,
    dtype: jnp.dtype,
    before_reading: Callable[[ModelConfig], object],
) -> Params:
    stored = stored_tensors(directory)
    check_size(str(directory), config, stored)
    # A layer costs a checkpoint nine tensors or more, so this is no longer than what was read.
    shapes = wanted_shapes(config, stored)
    sources = {path: source_of(path, shape, config) for path, shape in shapes.items()}
    packed = {name for s in sources.values() if s.scales is not None for name in s.shapes}
    check_dtypes({k: v for k, v in stored.items() if k in packed}, ("U8",))
    check_dtypes({k: v for k, v in stored.items() if k not in packed}, safetensors_files.DTYPES)
    wanted = {name: shape for s in sources.values() for name, shape in s.shapes.items()}
    check_tensors(str(directory), wanted, stored)
    before_reading(config)
    with TensorReader(stored) as reader:
        return _read(sources, shapes, dtype, reader.read)


def _load_gguf(
    file: GgufFile, dtype: jnp.dtype, before_reading: Callable[[ModelConfig], object]
) -> tuple[ModelConfig, Params]:
    config, stored = gguf_model.config_of(file), gguf_model.weights_of(file)
    name, asking = str(file.path), "its metadata"
    check_size(name, config, stored, asking)
    shapes = wanted_shapes(config, stored, gguf_model.source_of)
    sources = {path: gguf_model.source_of(path, shape, config) for path, shape in shapes.items()}
    wanted = {source.names[0]: source.shape for source in sources.values()}
    check_tensors(name, wanted, stored, asking)
    before_reading(config)
    return config, _read(sources, shapes, dtype, lambda name, _: file.read(name, dtype))


def _read(
    sources: Mapping[str, Source],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: jnp.dtype,
    read: Callable[[str, slice | None], Any],
) -> Params:
    """Reads parameters, one at a time, which bounds what the host holds."""
    params: Params = {}
    num_bytes = sum(math.prod(shape) for shape in shapes.values()) * jnp.dtype(dtype).itemsize
    with tqdm.tqdm(
        total=num_bytes, desc="weights", unit="B", unit_scale=True, disable=None, leave=False
    ) as bar:
        for path, source in sources.items():
            parts = [read(name, source.part) for name in source.names]
            leaf = jnp.stack(parts) if source.stacked else parts[0]
            if source.view is not None:
                leaf = source.view(leaf)
            if source.scales is not None and source.unpack is not None:
                leaf = source.unpack(leaf, read(source.scales[0], None), dtype)
            leaf = jnp.asarray(leaf, dtype)
            _insert(params, path, leaf)
            bar.update(leaf.nbytes)
    return params


def _insert(params: Params, path: str, leaf: Any) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        params = params.setdefault(parent, {})
    params[name] = leaf
