# SPDX-License-Identifier: Apache-2.0
"""Model directories made of others: to safetensors, under Hugging Face's names, or to Orbax."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import safetensors.numpy

from jpaged.models import orbax_weights
from jpaged.models.checkpoint import ORBAX_DIR, find_weights, read_with_bar
from jpaged.models.config import ModelConfig
from jpaged.models.families import source_of
from jpaged.models.families.base import Source
from jpaged.models.gguf_file import is_gguf
from jpaged.models.paths import is_address, path_of, resolved
from jpaged.models.stored_tensor import WEIGHT_DTYPES

FORMS = ("safetensors", "orbax")
"""What a model's weights may be written as."""

# What of a model is copied as it is, beside its config.json and its weights.
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
)


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
      num_params: how many numbers, a tied head counted as often as it is stored.
      num_bytes: of the weights; an Orbax checkpoint is compressed beyond that.
      dtypes: in which they are.
    """

    num_params: int
    num_bytes: int
    dtypes: frozenset[str]


def convert(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    form: str = "safetensors",
    dtype: np.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 2**31,
) -> Converted:
    """Writes a model directory that `checkpoint.load` reads to the same parameters.

    It appears under its name when it is whole, and not before. Memory holds a shard of
    `max_shard_bytes` at a time, or a batch of an Orbax checkpoint; all of it is the host's, on
    jax's CPU device. Packed weights are written as the numbers that they stand for.

    Args:
      model: a directory that `checkpoint.load` reads, or an address.
      output: a directory to be made, beside others on a disk that has room.
      form: of `FORMS`.
      dtype: float32, float16 or bfloat16, for every parameter; None keeps what is stored.
      overwrite: whether a model directory that is there already is replaced.
      max_shard_bytes: size of a file of safetensors, at most, but for a parameter that is larger.

    Returns:
      What was written.

    Raises:
      FileNotFoundError: if the model, or something in it, is missing.
      FileExistsError: if the output is there, and is not to be replaced.
      ValueError: if the model is not one that can be loaded (`CheckpointError`,
        `ModelConfigError`), the output lies in it or around it, or the disk has no room.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} must be one of {', '.join(FORMS)}")
    if dtype is not None and np.dtype(dtype).name not in WEIGHT_DTYPES:
        raise ValueError(f"dtype={np.dtype(dtype)} must be one of {', '.join(WEIGHT_DTYPES)}")
    if is_address(output):
        raise ValueError(f"output={str(output)!r} must be a directory of this machine")
    source, target = resolved(path_of(model)), resolved(path_of(output))
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(f"output={str(target)!r} must be neither in the model nor around it")
    _check_output(target, overwrite)
    if is_gguf(source):
        raise ValueError(f"model={str(source)!r} is a GGUF file: convert takes a model's directory")
    config, weights = find_weights(source)
    where = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    targets = {
        path: jax.ShapeDtypeStruct(shape, dtype or weights.dtypes[path], sharding=where)
        for path, shape in weights.shapes.items()
    }
    num_bytes = sum(map(_num_bytes, targets.values()))
    read = functools.partial(read_with_bar, weights)
    with _appearing(target, num_bytes) as directory:
        if form == "orbax":
            orbax_weights.save_read(directory / ORBAX_DIR, targets, read)
        else:
            plain = dataclasses.replace(config, packing=None)
            groups = _groups(plain, targets)
            order = {path: targets[path] for group in groups for path in group}
            _write_safetensors(directory, groups, read(order), targets, max_shard_bytes)
        for pattern in _COPIED:
            for file in sorted(source.glob(pattern)):
                if not file.is_file():
                    continue
                copy = directory / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                copy.write_bytes(file.read_bytes())
        # The last, so that nothing looks like a model before.
        fields = json.dumps(_config_fields(config, dtype), indent=2)
        (directory / "config.json").write_text(fields + "\n", encoding="utf-8")
        for file in directory.glob("*.safetensors"):  # which its library shows to the owner alone
            shutil.copymode(directory / "config.json", file)
    return Converted(
        num_params=sum(math.prod(each.shape) for each in targets.values()),
        num_bytes=num_bytes,
        dtypes=frozenset(each.dtype.name for each in targets.values()),
    )


def _num_bytes(target: jax.ShapeDtypeStruct) -> int:
    return math.prod(target.shape) * target.dtype.itemsize


def _config_fields(config: ModelConfig, dtype: np.dtype | None) -> dict:
    """The fields of config.json, less those that tell of files that are not written."""
    assert config.source is not None
    fields = json.loads(config.source)
    fields.pop("transformers_weights", None)
    if dtype is not None:
        names = [name for name in ("dtype", "torch_dtype") if name in fields] or ["dtype"]
        fields |= dict.fromkeys(names, np.dtype(dtype).name)
    return fields


_Group = dict[str, Source]


def _groups(config: ModelConfig, targets: Mapping[str, jax.ShapeDtypeStruct]) -> list[_Group]:
    """Parameters that make up the same tensors, by path, and where in those they lie."""
    groups: dict[tuple[str, ...], _Group] = {}
    for path, target in targets.items():
        source = source_of(path, target.shape, config)
        groups.setdefault(source.names, {})[path] = source
    return list(groups.values())


def _write_safetensors(
    directory: pathlib.Path,
    groups: list[_Group],
    arrays: Iterator[tuple[str, jax.Array]],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    max_shard_bytes: int,
) -> None:
    shards: list[list[_Group]] = []
    room = 0
    for group in groups:
        size = sum(_num_bytes(targets[path]) for path in group)
        if size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(group)
        room -= size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, np.ndarray] = {}
        for group in shard:
            for path, source in group.items():
                found, array = next(arrays)
                assert found == path
                _lay(tensors, source, np.asarray(array))
        # As transformers wants it, which computes with PyTorch.
        safetensors.numpy.save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    assert next(arrays, None) is None  # and so the bar is closed
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(_num_bytes, targets.values()))},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _lay(tensors: dict[str, np.ndarray], source: Source, array: np.ndarray) -> None:
    """Puts a parameter into the tensors that it is stored as: `Source`, read backwards."""
    if source.stacked:
        tensors |= dict(zip(source.names, array, strict=True))
        return
    (name,) = source.names
    if source.part is None and source.view is None:
        tensors[name] = array
        return
    if name not in tensors:
        tensors[name] = np.empty(source.shape, array.dtype)
    place = tensors[name] if source.part is None else tensors[name][source.part]
    if source.view is not None:
        place = source.view(place)
    place[...] = array


def _check_output(output: pathlib.Path, overwrite: bool) -> None:
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise FileExistsError(f"output={str(output)!r} is there, and is no directory")
    if os.path.ismount(output):
        raise FileExistsError(
            f"output={str(output)!r} is a disk of its own, which cannot be replaced: name a "
            "directory on it"
        )
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"output={str(output)!r} is there; name another, or let it be replaced (--overwrite)"
        )
    if not (output / "config.json").exists():
        raise FileExistsError(
            f"output={str(output)!r} is there and is no model directory (it has no config.json), "
            "so it is not replaced: name another"
        )


@contextlib.contextmanager
def _appearing(output: pathlib.Path, num_bytes: int) -> Iterator[pathlib.Path]:
    """A directory that gets its name once the block has ended without an error."""
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if num_bytes > free:
        raise ValueError(
            f"output={str(output)!r} needs {num_bytes / 1e9:.1f} GB, and its disk has "
            f"{free / 1e9:.1f} GB left: make room, or name a place on another"
        )
    hidden = f".{output.name}.{uuid.uuid4().hex[:8]}"
    partial, replaced = (output.parent / f"{hidden}.{what}" for what in ("partial", "replaced"))
    partial.mkdir()
    try:
        try:
            yield partial
        except (safetensors.SafetensorError, RuntimeError) as e:  # where the disk is full after all
            reason = " ".join(str(e).split())[:200]
            raise OSError(f"output={str(output)!r} cannot be written: {reason}") from e
        try:
            if os.path.lexists(output):
                output.rename(replaced)
            partial.rename(output)
        except BaseException:
            if replaced.exists() and not os.path.lexists(output):
                replaced.rename(output)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
