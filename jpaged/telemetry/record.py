# SPDX-License-Identifier: Apache-2.0
"""Records of runs: who had which page, moment by moment, and who lost theirs and why.

JSON Lines. The first object is a `RecordHeader` with `format` and `version`; the others have one
key, which says what they are: `frame` (a `Frame`), `preemption` (a `PreemptionNote`), and at the
end, where the run came to one, `end`. Page ids are differences, zlib and base64.
"""

import base64
import dataclasses
import itertools
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jpaged.host.scheduler import Scheduler
from jpaged.host.stats import Counters

FORMAT, VERSION = "jpaged record", 1
# Of all steps until then, so that what lies between two frames is known, whichever are left out.
TOTALS = (
    *("num_steps", "num_prefill_tokens", "num_generated_tokens", "num_preemptions"),
    *("num_recomputed_tokens", "num_lookup_tokens", "num_hit_tokens", "num_swapped_pages"),
    *("live_cell_steps", "allocated_cell_steps", "running_steps"),
    *("used_page_steps", "page_reference_steps"),
)
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, zlib.error)
_MOST_BYTES = 2**30  # of a frame's page ids, as no pool has more


class RecordError(ValueError):
    """A file is no record that can be read; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordHeader:
    """What frames are of.

    Attributes:
      page_size: tokens a page holds.
      num_pages: of the pool; page 0, which is nobody's, included.
      max_model_len: tokens a sequence has at most.
      windows: of each group of layers with pages of its own, the tokens that a query sees, or None.
      is_simulated: whether seconds are those of a cost model.
    """

    page_size: int
    num_pages: int
    max_model_len: int
    windows: tuple[int | None, ...] = (None,)
    is_simulated: bool = False


@dataclasses.dataclass(frozen=True)
class Frame:
    """One moment, as a step began to run.

    Attributes:
      time_s: since the record began.
      num_waiting: sequences that wait.
      totals: of the counters in `TOTALS`, what they were.
      sequences: of each that had pages its name, "request_id#sample_index", its tokens, the most
        that it may come to, and its pages in each group.
      pages: i32[num_groups * all sequences' pages], ids: of each group those of all sequences; 0
        where a page fell out of a window.
      cached: i32[num_cached], pages that were free, but kept for their content.
    """

    time_s: float
    num_waiting: int
    totals: dict[str, int]
    sequences: tuple[tuple[str, int, int, int], ...]
    pages: np.ndarray
    cached: np.ndarray

    @classmethod
    def of(cls, scheduler: Scheduler, totals: Counters, time_s: float) -> "Frame":
        """Reads the pages of all sequences. Cost: every page in use or cached."""
        table = scheduler.table
        holders = [(seq, seq.table_id) for seq in scheduler.holders() if seq.table_id is not None]
        counts = [len(table.bundles(table_id)[0]) for _, table_id in holders]
        every = table.snapshot([table_id for _, table_id in holders], len(holders))
        every = every.reshape(table.num_groups, len(holders), -1)[:, :, : max(counts, default=0)]
        has_page = np.arange(every.shape[2]) < np.array(counts, np.int32)[:, None]
        return cls(
            round(time_s, 6),
            scheduler.num_waiting,
            {name: getattr(totals, name) for name in TOTALS},
            tuple(
                (
                    f"{seq.request.request_id}#{seq.sample_index}",
                    table.num_tokens(table_id),
                    seq.max_total_tokens,
                    count,
                )
                for (seq, table_id), count in zip(holders, counts, strict=True)
            ),
            np.concatenate([own[has_page] for own in every]),
            np.array(sorted(table.pool.cached_pages()), np.int32),
        )

    def as_fields(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self) | {
            "totals": list(self.totals.values()),
            "pages": _packed(self.pages),
            "cached": _packed(self.cached),
        }

    @classmethod
    def from_fields(cls, fields: dict[str, Any], header: RecordHeader) -> "Frame":
        """Reads it back. Raises: ValueError, TypeError or KeyError, if it is none."""
        totals = dict(zip(TOTALS, map(int, fields["totals"]), strict=True))
        sequences = tuple((str(a), int(b), int(c), int(d)) for a, b, c, d in fields["sequences"])
        pages, cached = _unpacked(fields["pages"]), _unpacked(fields["cached"])
        if len(pages) != len(header.windows) * sum(own[3] for own in sequences):
            raise ValueError(f"{len(pages)} pages are not those of its sequences")
        for ids in (pages, cached):
            if ids.size and not 0 <= ids.min() <= ids.max() < header.num_pages:
                raise ValueError("there is no such page")
        waiting = int(fields["num_waiting"])
        return cls(float(fields["time_s"]), waiting, totals, sequences, pages, cached)


@dataclasses.dataclass(frozen=True)
class PreemptionNote:
    """A request that lost its pages.

    Attributes:
      time_s: since the record began.
      request_id: of the request.
      num_sequences: how many of its sequences.
      wanted_by: the request that needed pages.
      num_pages: distinct ones that were lost.
      num_tokens: to compute again, or to copy back.
      swap: whether they were copied to host memory.
      why: what was chosen, with what it costs, in words.
    """

    time_s: float
    request_id: str
    num_sequences: int
    wanted_by: str
    num_pages: int
    num_tokens: int
    swap: bool
    why: str


@dataclasses.dataclass(frozen=True)
class Record:
    """What a file holds.

    Attributes:
      header: what frames are of.
      frames: in order of time.
      preemptions: likewise; in a long run those that were kept.
      has_ended: whether the run came to its end; else it was killed, or goes on.
    """

    header: RecordHeader
    frames: tuple[Frame, ...]
    preemptions: tuple[PreemptionNote, ...]
    has_ended: bool


def as_line(kind: str, fields: dict[str, Any]) -> str:
    """An object of a record, as a line of its file."""
    return json.dumps({kind: fields}, separators=(",", ":")) + "\n"


def first_line(header: RecordHeader) -> str:
    """How a record begins."""
    fields = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(header)}
    return json.dumps(fields, separators=(",", ":")) + "\n"


def read_record(path: str | os.PathLike[str]) -> Record:
    """Reads a record. A last line that was cut off, as of a process that was killed, is left out.

    Raises:
      OSError: if the file cannot be read.
      RecordError: if it is no record, or damaged, which names the line, or of a newer version.
    """
    with pathlib.Path(path).expanduser().open("rb") as file:
        header = _header(path, file.readline(2**16))
        frames: list[Frame] = []
        preemptions: list[PreemptionNote] = []
        has_ended = False
        for number, line in _whole_lines(file):
            try:
                ((kind, fields),) = json.loads(line).items()
                if kind == "frame":
                    frames.append(Frame.from_fields(fields, header))
                elif kind == "preemption":
                    preemptions.append(_note(fields))
                elif kind == "end":
                    has_ended = True
                else:
                    raise ValueError(f"{kind} is no part of a record")
            except _DAMAGE as e:
                raise RecordError(
                    f"{path}: line {number} of the record is damaged ({e}); remove it to see the "
                    "others"
                ) from e
    return Record(header, tuple(frames), tuple(preemptions), has_ended)


def is_record(path: pathlib.Path) -> bool:
    """Whether a file begins as a record does, of any version."""
    with path.open("rb") as file:
        start = f'{{"format":"{FORMAT}",'.encode()
        return file.read(len(start)) == start


def _header(path: str | os.PathLike[str], line: bytes) -> RecordHeader:
    try:
        fields = json.loads(line)
        if fields.pop("format") != FORMAT:
            raise ValueError
        version = fields.pop("version")
        if version == VERSION:
            fields["windows"] = tuple(fields["windows"])
            header = RecordHeader(**fields)
            if not (header.page_size > 0 and header.num_pages > 1 and header.windows):
                raise ValueError
            return header
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise RecordError(f"{path} is no record of a run: make one with --record=FILE") from e
    raise RecordError(
        f"{path} is a record of version {version}, and this jpaged reads version {VERSION}: view "
        "it with the jpaged that wrote it"
    )


def _whole_lines(file: Any) -> Iterator[tuple[int, bytes]]:
    for number in itertools.count(2):
        line = file.readline()
        if not line.endswith(b"\n"):
            return
        yield number, line


def _note(fields: dict[str, Any]) -> PreemptionNote:
    note = PreemptionNote(**fields)
    for field in dataclasses.fields(PreemptionNote):
        value = getattr(note, field.name)
        if type(value) is not field.type and not (field.type is float and type(value) is int):
            raise ValueError(f"{field.name} is {value!r}")
    return note


def _packed(ids: np.ndarray) -> str:
    """Differences compress: pages are mostly taken in a row."""
    differences = np.diff(ids, prepend=np.int32(0)).astype("<i4")
    return base64.b64encode(zlib.compress(differences.tobytes(), 6)).decode()


def _unpacked(text: str) -> np.ndarray:
    unzip = zlib.decompressobj()
    found = unzip.decompress(base64.b64decode(text, validate=True), _MOST_BYTES)
    if not unzip.eof:
        raise ValueError("page ids are cut off")
    return np.cumsum(np.frombuffer(found, "<i4"), dtype=np.int64)
