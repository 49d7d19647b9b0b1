# SPDX-License-Identifier: Apache-2.0
"""Writes a record while a run goes on; however long it is, the file and the cost stay small."""

import dataclasses
import logging
import os
import pathlib
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TextIO

from jpaged.host.checks import shown
from jpaged.host.groups import GroupKind
from jpaged.host.preemption import Preemption
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import Request
from jpaged.host.sequence import Sequence as Sample
from jpaged.host.stats import Counters
from jpaged.telemetry.record import (
    Frame,
    PreemptionNote,
    RecordHeader,
    as_line,
    first_line,
    is_record,
)

logger = logging.getLogger(__name__)

MAX_FRAMES = 1000
MAX_PREEMPTIONS = 2000
MAX_BYTES = 16 * 2**20
# Frames take this share of a run's time, beside the first half second of them.
MAX_SHARE = 0.01
_FREE_S = 0.5


class Recorder:
    """Writes frames and preemptions to a file, of which each line is there when it is written.

    Where there would be more than `MAX_FRAMES`, or more than `MAX_BYTES`, every second frame is
    dropped, and from then on every second step is left out that was not before; likewise with
    `MAX_PREEMPTIONS`. A run of any length has a record of even distances so.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: RecordHeader,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Begins a record; an earlier one of the same name is replaced.

        Args:
          path: the file.
          header: what frames will be of.
          clock: gives seconds. Of a simulated one, what frames cost is not looked at.

        Raises:
          ValueError: if the file cannot be written, or is there and no record.
        """
        self._path, self._clock = pathlib.Path(path).expanduser(), clock
        self._begin_s, self._spent_s = clock(), 0.0
        self._is_simulated = header.is_simulated
        self._frames, self._preemptions = _Every(MAX_FRAMES), _Every(MAX_PREEMPTIONS)
        try:
            if self._path.exists() and not (self._path.is_file() and _may_replace(self._path)):
                raise ValueError("it is there, and no record: name another file")
            self._file = _File(self._path)
            self._end = weakref.finalize(self, self._file.close)
            self._file.write(first_line(header))
        except (OSError, ValueError) as e:
            reason = getattr(e, "strerror", None) or e
            raise ValueError(f"record={shown(str(path))} cannot be written: {reason}") from e

    def look(self, scheduler: Scheduler, totals: Counters) -> None:
        """Called as each step begins to run."""
        if not self._frames.wants_next() or not self._can_afford():
            return
        began = time.perf_counter()
        frame = Frame.of(scheduler, totals, self._clock() - self._begin_s)
        self._write(as_line("frame", frame.as_fields()), self._frames)
        self._spent_s += time.perf_counter() - began

    def note(self, victims: Sequence[Sample], wanted_by: Request, choice: Preemption) -> None:
        """Called when sequences of a request have lost their pages; see `Scheduler.on_preempt`."""
        if not self._preemptions.wants_next():
            return
        note = PreemptionNote(
            round(self._clock() - self._begin_s, 6),
            victims[0].request.request_id,
            len(victims),
            wanted_by.request_id,
            choice.num_pages,
            choice.num_tokens,
            choice.swap,
            str(choice),
        )
        self._write(as_line("preemption", dataclasses.asdict(note)), self._preemptions)

    def close(self) -> None:
        """Ends the record, as does forgetting the recorder."""
        self._end()

    def _can_afford(self) -> bool:
        elapsed_s = self._clock() - self._begin_s
        return self._is_simulated or self._spent_s <= _FREE_S + MAX_SHARE * elapsed_s

    def _write(self, line: str, kind: "_Every") -> None:
        """Adds a line. If that fails, as on a full disk, it is said, and nothing more recorded."""
        if self._file.is_closed:
            return
        try:
            self._file.write(line)
            kind.count += 1
            too_large = self._file.num_bytes > MAX_BYTES
            if kind.count > kind.most or too_large:
                self._thin([self._frames, self._preemptions] if too_large else [kind])
        except OSError as e:
            logger.error("%s: the record ends: %s", self._path, e.strerror)
            self._file.close(whole=False)

    def _thin(self, kinds: Sequence["_Every"]) -> None:
        """Drops every second line of some kinds, in a new file that takes the place of the old."""
        marks = {id(self._frames): '{"frame"', id(self._preemptions): '{"preemption"'}
        self._file.thin([marks[id(kind)] for kind in kinds])
        for kind in kinds:
            kind.halve()


class _Every:
    """Which of many things are kept: every one at first, then every second, fourth and so on.

    Attributes:
      most: how many at once.
      count: how many there are.
    """

    def __init__(self, most: int):
        self.most, self.count = most, 0
        self._stride, self._seen = 1, 0

    def wants_next(self) -> bool:
        self._seen += 1
        return (self._seen - 1) % self._stride == 0

    def halve(self) -> None:
        """Every second was dropped, the first one kept."""
        self.count = -(-self.count // 2)
        self._stride *= 2


class _File:
    """A file of lines, of which some may be dropped later.

    Attributes:
      num_bytes: how large it is.
      is_closed: whether it takes no more.
    """

    def __init__(self, path: pathlib.Path):
        self.num_bytes, self.is_closed = 0, False
        self._path = path
        self._file: TextIO = path.open("w", encoding="utf-8")

    def write(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()  # so that what is killed leaves whole lines
        self.num_bytes += len(line)  # JSON is ASCII

    def thin(self, marks: Sequence[str]) -> None:
        """Drops every second of the lines that begin with each mark."""
        new, seen = self._path.with_name(f".{self._path.name}.thinned"), dict.fromkeys(marks, 0)
        try:
            with self._path.open(encoding="utf-8") as old, new.open("w", encoding="utf-8") as file:
                for line in old:
                    mark = next((mark for mark in marks if line.startswith(mark)), None)
                    if mark is not None:
                        seen[mark] += 1
                    if mark is None or seen[mark] % 2:
                        file.write(line)
            os.replace(new, self._path)
        finally:
            new.unlink(missing_ok=True)
        self._file.close()
        self._file = self._path.open("a", encoding="utf-8")
        self.num_bytes = self._path.stat().st_size

    def close(self, *, whole: bool = True) -> None:
        """Takes no more; a record that is whole says so."""
        if self.is_closed:
            return
        self.is_closed = True
        try:
            if whole:
                self.write(as_line("end", {}))
            self._file.close()
        except OSError as e:
            logger.error("%s: the record has no end: %s", self._path, e.strerror)


def _may_replace(path: pathlib.Path) -> bool:
    return not path.stat().st_size or is_record(path)


def open_recorder(
    path: str | os.PathLike[str] | None,
    *,
    page_size: int,
    num_pages: int,
    kinds: Sequence[GroupKind],
    max_model_len: int,
    clock: Callable[[], float] | None = None,
) -> Recorder | None:
    """Begins the record of a run; None where none is wanted.

    Args:
      path: the file, or None.
      page_size: tokens a page holds.
      num_pages: of the pool, the reserved one included.
      kinds: groups of layers that have pages of their own.
      max_model_len: tokens a sequence has at most.
      clock: seconds of a simulation; None takes those that pass.

    Raises:
      ValueError: if it cannot be written.
    """
    if path is None:
        return None
    header = RecordHeader(
        page_size=page_size,
        num_pages=num_pages,
        max_model_len=max_model_len,
        windows=tuple(kind.window for kind in kinds for _ in range(kind.num_groups)),
        is_simulated=clock is not None,
    )
    return Recorder(path, header, clock or time.perf_counter)
