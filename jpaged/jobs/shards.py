# SPDX-License-Identifier: Apache-2.0
"""A job in parts, for as many machines, whose outputs are merged into that of a job in one.

A row is of the shard that its id gives, so the number of shards changes nothing but who does what:
each part has an output and a manifest of its own, and merging them gives the bytes that one machine
would have written.
"""

import contextlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import tqdm

from jpaged.jobs.inputs import RowIds
from jpaged.jobs.manifest import check_same, manifest_path, read_manifest, write_manifest
from jpaged.jobs.output import OutputFile, replacing
from jpaged.jobs.rows import Result


def shard_path(output: pathlib.Path, shard: int, num_shards: int) -> pathlib.Path:
    """Where a shard's own output lies: out.jsonl.0-of-2 is that of the first of two."""
    return output.with_name(f"{output.name}.{shard}-of-{num_shards}")


def shard_entry(shard: int, num_shards: int) -> dict[str, Any]:
    """What a shard's manifest has more than that of a whole job."""
    return {"shard": f"{shard} of {num_shards}"}


class ShardsMissingError(Exception):
    """Shards have rows to do; the message names each, and what it has."""


def merge(
    output: pathlib.Path,
    ids: RowIds,
    num_shards: int,
    asked: Mapping[str, Any],
    *,
    mix: bool = False,
    progress: bool = False,
) -> int:
    """Makes a job's output of those of its shards, which stay, and its manifest.

    Args:
      output: of the job, a name that those of the shards begin with.
      ids: of all its rows.
      num_shards: how many there are. Those without a row need not have been run.
      asked: `manifest.asked_for`, which each shard's must equal.
      mix: whether they may have run with other engine settings, devices or versions.
      progress: whether to show a progress bar on standard error.

    Returns:
      How many rows have an error.

    Raises:
      ShardsMissingError: if rows are missing; nothing is written then.
      ValueError: if a shard is of another job, or is being written.
      OutputError: if the output cannot be written; it is as it was then.
    """
    before = read_manifest(output)
    if before is None:
        _check_free(output)
    first: dict[str, Any] | None = None
    parts: dict[int, OutputFile] = {}
    missing: list[str] = []
    with contextlib.ExitStack() as stack:
        for shard in range(num_shards):
            own, path = ids.shard(shard, num_shards), shard_path(output, shard, num_shards)
            if not len(own):
                continue
            manifest = read_manifest(path)
            if manifest is None or not path.exists():
                missing.append(f"shard {shard} has not begun ({path})")
                continue
            first = first or {k: v for k, v in manifest.items() if k != "shard"}
            now = {**first, **asked, **shard_entry(shard, num_shards)}
            check_same(path, manifest, now, mix=mix)
            part = parts[shard] = stack.enter_context(open_output(path, own, _no_line))
            if not part.is_done:
                missing.append(f"shard {shard} has {part.num_done} of its {len(own)} rows")
        if missing or first is None:
            raise ShardsMissingError("; ".join(missing))
        if before is not None:
            check_same(output, before, {**first, **asked}, mix=mix)
            stack.enter_context(open_output(output, ids, _no_line))  # nobody else writes it
        for part in parts.values():
            part.sort()
        write_manifest(output, first)
        files = {shard: stack.enter_context(open(part.path, "rb")) for shard, part in parts.items()}
        order = ids.shards(num_shards).tolist()
        bar = tqdm.tqdm(order, "merging", unit="row", disable=not progress, delay=2, leave=False)
        with replacing(output, "merging") as target:
            for shard in bar:
                target.write(files[shard].readline())
        return sum(part.num_errors for part in parts.values())


def open_output(
    path: pathlib.Path, ids: RowIds, encode: Callable[[Result], bytes], **options: Any
) -> OutputFile:
    """An `OutputFile` for people: says in words what stands against it.

    Raises:
      ValueError: if it is being written, is of no job, or of other rows.
      OSError: if it cannot be opened.
    """
    if not manifest_path(path).exists():
        _check_free(path)
    try:
        return OutputFile(path, ids, encode, **options)
    except BlockingIOError:
        raise ValueError(f"{path} is being written by another process") from None


def _check_free(path: pathlib.Path) -> None:
    if path.exists() and path.stat().st_size:
        raise ValueError(f"{path} has no manifest beside it, so it is of no job: name another file")


def _no_line(result: Result) -> bytes:
    raise AssertionError("nothing is computed here")
