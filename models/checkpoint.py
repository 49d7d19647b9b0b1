# SPDX-License-Identifier: Apache-2.0
"""Weights in and out: Hugging Face safetensors in, Orbax in and out.

A model directory holds `config.json` and either `*.safetensors` (one file, or several with
`model.safetensors.index.json`) or `params/`, an Orbax checkpoint; beside them, where the model has
one, `tokenizer.json`.
"""

import contextlib
import difflib
import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import safetensors

from models.config import ModelConfig, config_to_hf, load_config
from models.decoder import Decoder, Params
from models.families import IGNORED_TENSORS, tensor_name

_ORBAX_DIR = "params"
_FLOAT_DTYPES = ("F32", "F16", "BF16")


class CheckpointError(ValueError):
    """A checkpoint that does not hold this model; the message names file, tensor and remedy."""


def load(directory: str | pathlib.Path, dtype: jnp.dtype) -> tuple[ModelConfig, Params]:
    """Loads a model directory, whichever form its weights have.

    Args:
      directory: holds config.json and the weights.
      dtype: every parameter is converted to it as it is read, one tensor at a time.

    Returns:
      The config and the parameter tree of `Decoder(config)`.

    Raises:
      FileNotFoundError: if the directory, its config.json or its weights are missing.
      ModelConfigError: if config.json describes a model that is not supported.
      CheckpointError: if a file is damaged, or a tensor is missing, unexpected or of another shape.
    """
    directory = pathlib.Path(directory).expanduser()
    if not directory.is_dir():
        raise FileNotFoundError(f"model directory {str(directory)!r} does not exist")
    if not (directory / "config.json").exists():
        raise FileNotFoundError(f"{str(directory)!r} has no config.json: not a model directory")
    config = load_config(directory)
    if (directory / _ORBAX_DIR).is_dir():
        return config, _load_orbax(directory / _ORBAX_DIR, config, dtype)
    return config, _load_safetensors(directory, config, dtype)


def save_orbax(directory: str | pathlib.Path, config: ModelConfig, params: Params) -> None:
    """Writes config.json and `params/`, an Orbax checkpoint that `load` reads.

    Args:
      directory: created where it does not exist; an older `params/` in it is replaced.
      config: the model's shape.
      params: the unstacked parameter tree of `Decoder(config)`, stored in the dtype it has.
    """
    directory = pathlib.Path(directory).expanduser().resolve()
    directory.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / _ORBAX_DIR, params, force=True)
    (directory / "config.json").write_text(json.dumps(config_to_hf(config), indent=2) + "\n")


def _load_orbax(directory: pathlib.Path, config: ModelConfig, dtype: jnp.dtype) -> Params:
    directory = directory.resolve()
    expected = Decoder(config).abstract_params(dtype)
    wanted = {path: leaf.shape for path, leaf in _flatten(expected)}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), expected
    )
    with ocp.StandardCheckpointer() as checkpointer:
        with _damage_of_orbax(directory):
            stored = checkpointer.metadata(directory).item_metadata.tree
            shapes = {path: tuple(leaf.shape) for path, leaf in _flatten(stored)}
        _check_tensors(str(directory), wanted, shapes)
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


def _load_safetensors(directory: pathlib.Path, config: ModelConfig, dtype: jnp.dtype) -> Params:
    files = _safetensors_files(directory)
    where: dict[str, pathlib.Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with _open_safetensors(file) as reader:
            for name in reader.keys():
                if IGNORED_TENSORS.fullmatch(name):
                    continue
                info = reader.get_slice(name)
                if info.get_dtype() not in _FLOAT_DTYPES:
                    raise CheckpointError(
                        f"{file.name}: tensor {name!r} has dtype {info.get_dtype()}; supported: "
                        f"{', '.join(_FLOAT_DTYPES)}"
                    )
                where[name], shapes[name] = file, tuple(info.get_shape())
    expected = Decoder(config).abstract_params(dtype)
    wanted = {tensor_name(path): leaf.shape for path, leaf in _flatten(expected)}
    if config.tie_word_embeddings:
        # Some exporters write the tied head twice; the embedding is the one that counts.
        shapes.pop("lm_head.weight", None)
    _check_tensors(str(directory), wanted, shapes)

    params: Params = {}
    by_file: dict[pathlib.Path, list[str]] = {}
    for path, _ in _flatten(expected):
        by_file.setdefault(where[tensor_name(path)], []).append(path)
    for file, paths in by_file.items():
        with _open_safetensors(file) as reader:
            for path in paths:
                # One tensor at a time from a memory-mapped file bounds what the host holds.
                _insert(params, path, jnp.asarray(reader.get_tensor(tensor_name(path)), dtype))
    return params


def _safetensors_files(directory: pathlib.Path) -> list[pathlib.Path]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"{str(directory)!r} has no weights: no *.safetensors and no {_ORBAX_DIR}/ (Orbax)"
            )
        return files
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        files = [directory / name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise CheckpointError(f"{index} is not a safetensors index: {e!r}") from e
    for name in names:
        if not (directory / name).exists():
            raise FileNotFoundError(f"{str(directory)!r} lacks {name!r}, which {index.name} lists")
    return files


def _open_safetensors(file: pathlib.Path):
    try:
        return safetensors.safe_open(file, framework="flax")
    except safetensors.SafetensorError as e:
        raise CheckpointError(
            f"{file} is damaged or truncated ({e}); download or copy it again"
        ) from e


def _check_tensors(source: str, wanted: dict[str, tuple], found: dict[str, tuple]) -> None:
    """Raises one error that lists every missing, unexpected or wrongly shaped tensor."""
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    problems = []
    for name in missing:
        near = difflib.get_close_matches(name, extra or list(found), n=3)
        problems.append(f"missing {name!r}, nearest names there: {near}")
    for name in extra:
        near = difflib.get_close_matches(name, missing or list(wanted), n=3)
        problems.append(f"unexpected {name!r}, nearest names expected: {near}")
    for name in sorted(wanted.keys() & found.keys()):
        if tuple(wanted[name]) != tuple(found[name]):
            problems.append(
                f"{name!r} has shape {tuple(found[name])}, config.json asks for "
                f"{tuple(wanted[name])}"
            )
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise CheckpointError(f"{source} does not hold this model: " + "; ".join(shown))


def _flatten(tree: Params) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield "/".join(key.key for key in path), leaf


def _insert(params: Params, path: str, leaf: jax.Array) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        params = params.setdefault(parent, {})
    params[name] = leaf
