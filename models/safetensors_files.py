# SPDX-License-Identifier: Apache-2.0
"""Which file of a directory of safetensors holds which tensor: see `models.checkpoint`'s rule."""

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from jpaged.models.families import text_part
from jpaged.models.families.base import IGNORED_TENSORS
from jpaged.models.json_fields import ModelConfigError, read_json, shown, typed
from jpaged.models.stored_tensor import CheckpointError, StoredTensor

logger = logging.getLogger(__name__)

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(jnp.bfloat16),
    }
)
"""What weights may be stored as."""

_SAFETENSORS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def stored_tensors(directory: pathlib.Path) -> dict[str, StoredTensor]:
    """Finds the tensors that count, without reading them.

    Args:
      directory: holds config.json and safetensors.

    Returns:
      The tensors by name.

    Raises:
      FileNotFoundError: if there are no weights, or a file that is named is missing.
      CheckpointError: if a file is damaged, or files contradict each other.
    """
    source, files, index = _counting_files(directory)
    part = text_part(read_json(directory / "config.json"))

    def known_as(name: str) -> str | None:
        if IGNORED_TENSORS.fullmatch(name):
            return None
        return name if part is None else part.name_of(name)

    stored: dict[str, StoredTensor] = {}
    for file in files:
        with reading(file) as reader:
            for name in reader.keys():
                known = known_as(name)
                if known is None or (index and index.get(name) != file):
                    continue
                info = reader.get_slice(name)
                tensor = StoredTensor(
                    file=file,
                    name=name,
                    shape=tuple(info.get_shape()),
                    dtype=str(info.get_dtype()),
                )
                if known in stored:
                    _check_same(known, stored[known], tensor)
                stored.setdefault(known, tensor)
    for name, file in index.items():
        known = known_as(name)
        if known is not None and known not in stored:
            raise CheckpointError(
                f"{str(directory)!r} does not hold this model: missing {shown(name)}, which "
                f"{source.name} says is in {shown(file.name)}; copy both again"
            )
    return stored


def _counting_files(
    directory: pathlib.Path,
) -> tuple[pathlib.Path, list[pathlib.Path], dict[str, pathlib.Path]]:
    """What names the files, the files, and the index: each tensor's file, empty without one."""
    named = read_json(directory / "config.json").get("transformers_weights")
    if named:
        typed("config.json: transformers_weights", named, str)
        source = directory / "config.json"
        file = _inside(directory, named, (".safetensors", ".safetensors.index.json"), source)
    elif os.path.lexists(directory / _SAFETENSORS):
        file = directory / _SAFETENSORS
    elif os.path.lexists(directory / _INDEX):
        file = directory / _INDEX
    else:
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"{str(directory)!r} has no weights: no *.safetensors and no params/ (Orbax)"
            )
        return directory, files, {}
    if file.name.endswith(".json"):
        index = _read_index(directory, file)
        files = sorted(set(index.values()))
    else:
        index, files = {}, [file]
    if aside := sorted(set(directory.glob("*.safetensors")) - set(files)):
        logger.info("%s counts; not read: %s", file, shown([other.name for other in aside]))
    return file, files, index


def _read_index(directory: pathlib.Path, path: pathlib.Path) -> dict[str, pathlib.Path]:
    try:
        weight_map = typed("weight_map", read_json(path).get("weight_map"), dict)
        names = {typed(f"weight_map: {shown(key)}", name, str) for key, name in weight_map.items()}
    except ModelConfigError as e:
        raise CheckpointError(f"{path} is not a safetensors index: {e}") from e
    if not names:
        raise CheckpointError(f"{path} is not a safetensors index: its weight_map is empty")
    files = {name: _inside(directory, name, (".safetensors",), path) for name in sorted(names)}
    return {key: files[name] for key, name in weight_map.items()}


def _inside(
    directory: pathlib.Path, name: str, endings: tuple[str, ...], source: pathlib.Path
) -> pathlib.Path:
    """The file that another one names, which must lie in the model's directory."""
    # Not resolved: a hub's cache links its files to elsewhere, which is its owner's business.
    base = os.path.abspath(directory)
    path = os.path.normpath(os.path.join(base, name))
    if not path.startswith(os.path.join(base, "")):
        raise CheckpointError(f"{source} names {shown(name)}, which is outside the directory")
    if not name.endswith(endings):
        raise CheckpointError(f"{source} names {shown(name)}, which is no {endings[0]} file")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{str(directory)!r} lacks {shown(name)}, which {source.name} lists"
        )
    return directory / os.path.relpath(path, base)


@contextlib.contextmanager
def reading(file: pathlib.Path) -> Iterator[Any]:
    """Opens a file for its tensors, and says in one line if it is damaged."""
    if not os.path.isfile(file):
        raise CheckpointError(f"{file} is not a file that can be read")
    with damage(file), safetensors.safe_open(file, framework="numpy") as reader:
        yield reader


def offsets(file: pathlib.Path) -> dict[str, int]:
    """Where in a file its tensors begin, in bytes, by name.

    Raises:
      CheckpointError: if it is damaged.
    """
    with reading(file), open(file, "rb") as data:  # which checks what the header says
        size = int.from_bytes(data.read(8), "little")
        header = json.loads(data.read(size))
    header.pop("__metadata__", None)
    return {name: 8 + size + info["data_offsets"][0] for name, info in header.items()}


@contextlib.contextmanager
def damage(file: pathlib.Path) -> Iterator[None]:
    """Says in one line what the library says of a damaged file."""
    try:
        yield
    except (safetensors.SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{file} is damaged or truncated ({str(e)[:200]!r}); download or copy it again"
        ) from e


def _check_same(name: str, one: StoredTensor, other: StoredTensor) -> None:
    """Raises if two files hold different tensors of one name."""
    same = (one.shape, one.dtype) == (other.shape, other.dtype)
    if same and one.dtype in DTYPES:
        with reading(one.file) as left, reading(other.file) as right:
            same = left.get_tensor(one.name).tobytes() == right.get_tensor(other.name).tobytes()
    if not same:
        raise CheckpointError(
            f"{one.file.name!r} and {other.file.name!r} hold different tensors {shown(name)}, and "
            f"there is no {_INDEX} to say which counts: move one of the files out"
        )
