# SPDX-License-Identifier: Apache-2.0
"""What a job's results depend on, beside its output, so that two jobs never mix in one file."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

import jpaged
from jpaged.host.checks import shown
from jpaged.host.config import EngineConfig
from jpaged.host.params import SamplingParams
from jpaged.jobs.output import replacing
from jpaged.models.json_fields import read_json
from jpaged.pallas_kernels.cpu.chip import host_chip
from jpaged.pallas_kernels.dispatch import resolve_backend

_VERSION = 1
# Settings that change no result: where pages lie, how they are kept, and what is written down.
_NOT_OF_RESULTS = {
    *("memory_fraction", "prefix_cache", "preemption", "swap_bytes", "swap_bytes_per_s"),
    *("flops_per_s", "record_steps", "record", "compilation_cache_dir"),
    *("prompt_cache", "prompt_cache_bytes", "prompt_cache_min_pages"),
}
# What may differ with --mix: the last bits of numbers depend on it, and with them, rarely, a token;
# and the day that templates are told, which differs where shards begin before and after midnight.
_MAY_DIFFER = ("engine", "device", "versions", "date")
# What stands behind an output's name in those of its shards, and of what lies beside them.
_BESIDE = re.compile(r"(\.\d+-of-\d+)?(\.manifest\.json|\.snapshot)?(\.(writing|sorting|merging))?")
_WHOLE_BYTES = 2**24
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 2**16


class ManifestError(ValueError):
    """An output belongs to another job; the message names what differs."""


def manifest_path(output: pathlib.Path) -> pathlib.Path:
    """Where the manifest of an output lies."""
    return output.with_name(f"{output.name}.manifest.json")


def asked_for(
    *,
    input_sha256: str,
    num_rows: int,
    model: pathlib.Path,
    params: SamplingParams,
    options: Mapping[str, Any],
    seed: int,
    output: pathlib.Path | None = None,
) -> dict[str, Any]:
    """What of a manifest is the same on every machine.

    Args:
      input_sha256: of the input.
      num_rows: that it has.
      model: directory or file.
      params: of rows that say nothing else; what is neutral is left out, and priority, on which no
        byte depends.
      options: of the chat template.
      seed: of the job.
      output: of the job: what lies there, also where the model does, is no part of the model.
    """
    asked = {
        field.name: value
        for field in dataclasses.fields(SamplingParams)
        if (value := getattr(params, field.name)) != field.default and field.name != "priority"
    }
    return _as_read(
        {
            "manifest": _VERSION,
            "input": {"sha256": input_sha256, "rows": num_rows},
            "model": {"sha256": model_identity(model, output)},
            "parameters": {**asked, **options, "seed": seed},
        }
    )


def run_with(config: EngineConfig) -> dict[str, Any]:
    """What of a manifest is of a machine; jax finds its device for it.

    Args:
      config: the engine's; its num_pages is what the first run had, where it is None.
    """
    engine = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(EngineConfig)
        if field.name not in _NOT_OF_RESULTS
    }
    device = jax.local_devices()[0]
    computes = {"platform": device.platform, "kind": device.device_kind}
    if device.platform == "cpu":
        # Whose kernels a default stands for differs between machines, and their order of sums.
        engine["backend"] = resolve_backend(config.backend)
        chip = host_chip() if engine["backend"] == "cpu" else None
        computes["vector_lanes"] = chip.lanes if chip is not None else None
    return _as_read(
        {
            "engine": engine,
            "device": computes,
            "versions": {"jpaged": jpaged.__version__, "jax": jax.__version__},
        }
    )


def read_manifest(output: pathlib.Path) -> dict[str, Any] | None:
    """The manifest of an output; None where there is none.

    Raises:
      ManifestError: if it cannot be read, or is of another form.
    """
    path = manifest_path(output)
    try:
        found = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise ManifestError(f"{e}; name another --output") from e
    if found.get("manifest") != _VERSION:
        raise ManifestError(
            f"{path}: manifest={shown(found.get('manifest'))} must be {_VERSION}; name another "
            "--output"
        )
    return found


def check_same(
    output: pathlib.Path, before: Mapping[str, Any], now: Mapping[str, Any], *, mix: bool
) -> None:
    """Refuses to go on with an output that was begun as another job.

    Args:
      output: its path.
      before: the manifest that it has.
      now: that of the job.
      mix: whether engine, device and versions may differ.

    Raises:
      ManifestError: naming what differs.
    """
    different = list(_differences(before, now, ""))
    if mix:
        different = [name for name in different if not name.startswith(_MAY_DIFFER)]
    if not different:
        return
    pairs = (f"{name} was {_at(before, name)}, and is {_at(now, name)}" for name in different)
    advice = f"name another --output, or remove {output} and {manifest_path(output)} to begin anew"
    if all(name.startswith(_MAY_DIFFER) for name in different):
        advice = f"set it as it was, or {advice}; --mix goes on, with results that may differ"
    raise ManifestError(f"{output} was begun as another job: {'; '.join(pairs)}: {advice}")


def write_manifest(output: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Puts a manifest beside an output, whole or not at all. Raises: OutputError."""
    with replacing(manifest_path(output), "writing") as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")


def model_identity(path: pathlib.Path, output: pathlib.Path | None = None) -> str:
    """A hash of a model: of each file the name and the size, and what it holds.

    What a job writes is no part of it, wherever it lies.

    Of files above 16 MiB, such as weights, that is 64 pieces of 64 KiB, from the first to the last,
    at even distances: other weights differ in nearly all of their bytes.
    """
    digest = hashlib.sha256()
    for name, file in sorted(_files(path)):
        if output is not None and _is_of(output, file):
            continue
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
            starts, length = [0], size
            if size > _WHOLE_BYTES:
                length = _SAMPLE_BYTES
                last = size - length
                starts = [last * i // (_NUM_SAMPLES - 1) for i in range(_NUM_SAMPLES)]
            for start in starts:
                stream.seek(start)
                digest.update(stream.read(length))
    return digest.hexdigest()


def _files(path: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    if not path.is_dir():
        yield "", path
        return
    for file in path.iterdir():
        if file.name.startswith(".") or file.name.endswith(".md"):
            continue
        if file.is_dir():
            yield from ((f"{file.name}/{name}", inner) for name, inner in _files(file))
        else:
            yield file.name, file


def _is_of(output: pathlib.Path, file: pathlib.Path) -> bool:
    """Whether a file is an output, of a shard too, or lies beside it for its sake."""
    name, rest = file.name[: len(output.name)], file.name[len(output.name) :]
    is_of = name == output.name and _BESIDE.fullmatch(rest) is not None
    return is_of and file.parent.samefile(output.parent)


def _as_read(manifest: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(manifest))  # tuples are lists


def _differences(before: Any, now: Any, name: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*before, *now)):
            inner = f"{name}.{key}" if name else key
            yield from _differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield name


def _at(manifest: Mapping[str, Any], name: str) -> str:
    value: Any = manifest
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return shown(value)
