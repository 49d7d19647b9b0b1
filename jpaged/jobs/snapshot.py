# SPDX-License-Identifier: Apache-2.0
"""What the rows that run have come to, in a file beside the output, for the next run of a job.

That is their tokens, 4 bytes each: a token depends on weights, prompt, parameters, seed and
position alone, so the pages are computed again from them as after a preemption, and what comes then
is what would have come. docs/decisions.md has what that costs beside keeping the pages.

The file is a BLAKE2b digest of 32 bytes, and then safetensors: arrays over the tokens of all
samples of all rows, and metadata that says whose they are and of which job.
"""

import array
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from jpaged.host.checks import at_least, checked, function
from jpaged.host.outputs import Completion
from jpaged.jobs.output import OutputError, replacing

logger = logging.getLogger(__name__)

_VERSION = 1
_DIGEST_BYTES = 32
_SUFFIX = "writing"
# Of each sample end to end: its tokens; how many likeliest tokens there are of each, those tokens,
# and their log-probabilities.
_ARRAYS = {"token_ids": "i", "num_likeliest": "i", "likeliest_ids": "i", "likeliest": "d"}


def snapshot_path(output: pathlib.Path) -> pathlib.Path:
    """Where the snapshot of an output lies."""
    return output.with_name(f"{output.name}.snapshot")


class Snapshot:
    """Keeps what rows have come to, and knows what those of a run before had.

    Only tokens that are new since the last time are converted, and a thread writes the file, so
    that steps go on meanwhile. A file that cannot be written, as of a full disk, or read, as it was
    damaged or is of another job, costs a warning: rows begin anew then.

    Attributes:
      path: of the file.
      num_rows, num_tokens: what it had when it was opened.
    """

    def __init__(
        self,
        path: pathlib.Path,
        job: Mapping[str, Any],
        lacks: Callable[[str], bool],
        *,
        every_s: float = 60.0,
    ):
        """Reads a file, if there is one.

        Args:
          path: of the file.
          job: all that results depend on, as JSON; a file that was written for another is ignored.
          lacks: whether a row, by its id, has no result yet that outlives the process.
          every_s: seconds between two files.

        Raises:
          ValueError: if the last two are wrong.
        """
        function("lacks", lacks)
        self._every_s = checked("every_s", every_s, float, at_least(0))
        self.path, self._lacks = path, lacks
        self._job = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
        self._rows: dict[str, list[_Sample]] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "snapshot")
        self._writing: concurrent.futures.Future[None] | None = None
        self._has_warned = False
        self._next_s = time.monotonic() + self._every_s
        try:
            self._rows = _decoded(path.read_bytes(), self._job)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as e:
            logger.warning("%s is ignored, so rows that ran begin anew: %s", path, e)
        samples = [sample for samples in self._rows.values() for sample in samples]
        self.num_rows = len(self._rows)
        self.num_tokens = sum(len(sample.parts["token_ids"]) for sample in samples)

    def progress(self, row_id: str) -> list[Completion]:
        """What a row has come to, for `Engine.add_request(resume=...)`; nothing if not known."""
        return [sample.completion() for sample in self._rows.get(row_id, ())]

    @property
    def is_due(self) -> bool:
        """Whether the next file is to be written: it is time, and none is being written."""
        return time.monotonic() >= self._next_s and (self._writing is None or self._writing.done())

    def take(self, rows: Iterable[tuple[str, Sequence[Completion]]]) -> None:
        """Has a file written of what rows have come to.

        Rows that are not among them stay as they were for as long as they lack a result: those that
        wait to be begun again, and those that have just ended.

        Args:
          rows: ids, and what `Engine.progress` says of them.
        """
        self._finish()
        for row_id, completions in rows:
            if any(completion.token_ids for completion in completions):
                samples = self._rows.setdefault(row_id, [])
                samples += [_Sample() for _ in completions[len(samples) :]]
                for sample, completion in zip(samples, completions, strict=False):
                    sample.update(completion)
        self._rows = {row_id: own for row_id, own in self._rows.items() if self._lacks(row_id)}
        parts, metadata = _encoded(self._rows, self._job)
        self._writing = self._thread.submit(_write, self.path, parts, metadata)
        self._next_s = time.monotonic() + self._every_s

    def close(self) -> None:
        """Waits for what is being written."""
        self._finish()
        self._thread.shutdown()

    def __enter__(self) -> "Snapshot":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish(self) -> None:
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except OutputError as e:
            if not self._has_warned:
                logger.warning("%s: the job goes on, and rows that run may have to begin anew", e)
            self._has_warned = True


def remove_snapshot(output: pathlib.Path) -> None:
    """Removes the snapshot of an output that has all rows, if there is one."""
    path = snapshot_path(output)
    for each in (path, path.with_name(f"{path.name}.{_SUFFIX}")):
        with contextlib.suppress(OSError):
            each.unlink()


class _Sample:
    """One sample of a row, which only grows.

    Attributes:
      parts: see `_ARRAYS`.
      rest: cumulative_logprob, finish_reason, text (of one that has ended) and error.
    """

    __slots__ = ("parts", "rest")

    def __init__(self):
        self.parts = {name: array.array(kind) for name, kind in _ARRAYS.items()}
        self.rest: tuple[float, str | None, str, str | None] = (0.0, None, "", None)

    def update(self, completion: Completion) -> None:
        """Adds what is new."""
        parts = self.parts
        num_before, tokens = len(parts["token_ids"]), completion.token_ids
        if len(tokens) < num_before:
            return  # of a row that was begun anew, which will come to the same
        parts["token_ids"].extend(tokens[num_before:])
        for values in (completion.logprobs or ())[num_before:]:
            parts["num_likeliest"].append(len(values))
            parts["likeliest_ids"].extend(values.keys())
            parts["likeliest"].extend(values.values())
        reason = completion.finish_reason
        text = "" if reason is None else completion.text
        self.rest = completion.cumulative_logprob, reason, text, completion.error

    def completion(self) -> Completion:
        parts = self.parts
        logprobs = None
        if parts["num_likeliest"]:
            pairs = zip(parts["likeliest_ids"], parts["likeliest"], strict=True)
            logprobs = [dict(itertools.islice(pairs, n)) for n in parts["num_likeliest"]]
        logprob, reason, text, error = self.rest
        return Completion(text, parts["token_ids"].tolist(), logprob, logprobs, reason, error=error)


def _encoded(
    rows: Mapping[str, Sequence[_Sample]], job: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What is written of rows: copies, as these go on growing."""
    samples = [sample for own in rows.values() for sample in own]
    parts = {
        name: np.frombuffer(b"".join(sample.parts[name] for sample in samples), kind)
        for name, kind in _ARRAYS.items()
    }
    whose = [
        [row_id, [[[len(part) for part in s.parts.values()], *s.rest] for s in own]]
        for row_id, own in rows.items()
    ]
    return parts, {"snapshot": str(_VERSION), "job": job, "rows": json.dumps(whose)}


def _write(path: pathlib.Path, parts: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    data = safetensors.numpy.save(dict(parts), metadata)
    with replacing(path, _SUFFIX) as file:
        file.write(hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest())
        file.write(data)


def _decoded(data: bytes, job: str) -> dict[str, list[_Sample]]:
    """The rows of a file. Raises: ValueError, if it is damaged, or of another job or version."""
    digest, data = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest() != digest:
        raise ValueError("it is damaged, as its digest says")
    try:
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        if metadata["snapshot"] != str(_VERSION):
            raise ValueError(f"it has version {metadata['snapshot']}, which must be {_VERSION}")
        if metadata["job"] != job:
            raise ValueError("it is of another job, or of other settings or versions")
        parts = safetensors.numpy.load(data)
        rows: dict[str, list[_Sample]] = {}
        starts = dict.fromkeys(_ARRAYS, 0)
        for row_id, samples in json.loads(metadata["rows"]):
            rows[row_id] = own = []
            for lengths, *rest in samples:
                sample = _Sample()
                own.append(sample)
                sample.rest = tuple(rest)
                for (name, start), length in zip(starts.items(), lengths, strict=True):
                    part = parts[name][start : start + length]
                    sample.parts[name].frombytes(part.tobytes())
                    starts[name] = start + length
    except (KeyError, TypeError, UnicodeDecodeError, safetensors.SafetensorError) as e:
        raise ValueError(f"it is no snapshot: {type(e).__name__}: {e}") from e
    return rows
