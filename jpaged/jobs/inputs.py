# SPDX-License-Identifier: Apache-2.0
"""The files that a job's rows are read from: JSON Lines, checked before any work."""

import contextlib
import copy
import glob
import gzip
import hashlib
import io
import os
import pathlib
import shutil
import tempfile
import typing
import weakref
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import tqdm

from jpaged.host.checks import lone_surrogate, shown
from jpaged.jobs.fields import parse_json

MAX_LINE_BYTES = 64 * 2**20
_MAX_ID_LENGTH = 512
_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"


class Line(typing.NamedTuple):
    """A line of the input, which is a row or an error.

    Attributes:
      row_id: its custom_id; where it has none, "row-" and its number in the whole input, from 1.
      where: "line 3", behind the name of its file where there are several.
      value: what it is in JSON.
      error: why it is none; None where it is.
    """

    row_id: str
    where: str
    value: Any
    error: str | None


class RowIds:
    """Which row has which id: 24 bytes a row, whatever the ids."""

    def __init__(self, digests: bytes):
        """Takes the ids' digests in order, 16 bytes each."""
        pairs = np.frombuffer(digests, "<u8").reshape(-1, 2)
        self._order = np.lexsort((pairs[:, 1], pairs[:, 0]))
        self._high, self._low = pairs[self._order, 0], pairs[self._order, 1]

    def __len__(self) -> int:
        return len(self._order)

    def shard(self, shard: int, num_shards: int) -> "RowIds":
        """The ids of one shard, which are in the order that they have in the whole input."""
        mine = self._low % num_shards == shard
        places = self._order[mine]
        found = copy.copy(self)
        found._order = np.searchsorted(np.sort(places), places)
        found._high, found._low = self._high[mine], self._low[mine]
        return found

    def shards(self, num_shards: int) -> npt.NDArray[np.int64]:
        """The shard of each row, in order, from 0: the last 8 bytes of the id's digest, modulo."""
        found = np.empty(len(self), np.int64)
        found[self._order] = self._low % num_shards
        return found

    def twice(self) -> tuple[int, int] | None:
        """Two rows, from 0, that have one id; None if all differ."""
        same = (self._high[1:] == self._high[:-1]) & (self._low[1:] == self._low[:-1])
        found = np.flatnonzero(same)
        if not len(found):
            return None
        # The earliest, whatever their digests: the first that a reader would meet.
        second = found[np.argmin(self._order[found + 1])]
        return int(self._order[second]), int(self._order[second + 1])

    def index(self, row_id: str) -> int | None:
        """The place of a row in the input, from 0; None if there is no such id."""
        high, low = np.frombuffer(digest_of(row_id), "<u8")
        at = int(np.searchsorted(self._high, high))
        while at < len(self) and self._high[at] == high:
            if self._low[at] == low:
                return int(self._order[at])
            at += 1
        return None


def digest_of(row_id: str) -> bytes:
    """What is remembered of an id: 16 bytes, of which no two are equal by chance."""
    return hashlib.blake2b(row_id.encode(), digest_size=16).digest()


class Input:
    """The rows' lines, in order of files and lines; as often as they are asked for.

    Attributes:
      paths: of the files; empty where the input is standard input.
      sha256: of what the files hold, uncompressed, and of their names where there are several;
        known after `check`.
    """

    def __init__(self, paths: Sequence[pathlib.Path], spooled: BinaryIO | None = None):
        """Takes files; see `open_input`."""
        self.paths = list(paths)
        self.sha256 = ""
        self._spooled = spooled
        if spooled is not None:
            weakref.finalize(self, spooled.close)
        self._starts: list[int] = []

    def check(self, *, progress: bool = False) -> RowIds:
        """Reads everything once: whether it can be read, and whether ids are unique.

        Raises:
          ValueError: if not; one line, with the names of file and lines.
        """
        digests = bytearray()
        with tqdm.tqdm(
            desc="checking", unit="row", disable=not progress, delay=2, leave=False
        ) as bar:
            for line in self:
                digests += digest_of(line.row_id)
                bar.update()
        ids = RowIds(bytes(digests))
        if not len(ids):
            raise ValueError(f"{self._name(0)} has no rows; put a JSON object on each line")
        if (pair := ids.twice()) is not None:
            first, second = pair
            line = next(line for index, line in enumerate(self) if index == first)
            raise ValueError(
                f"custom_id={shown(line.row_id)} is there twice, in {self._place(first)} and in "
                f"{self._place(second)}: give each row an id of its own"
            )
        return ids

    def __iter__(self) -> Iterator[Line]:
        """Yields the lines; at the end it is certain that they are those that were checked."""
        digest, number, starts = hashlib.sha256(), 0, []
        several = len(self.paths) > 1
        for place in range(len(self.paths) or 1):
            starts.append(number)
            prefix = ""
            if several:
                prefix = f"{self.paths[place].name}: "
                digest.update(prefix.encode(errors="surrogateescape"))
            try:
                with self._open(place) as file:
                    for count, data in enumerate(_lines(file, digest), 1):
                        number += 1
                        yield line_of(data, f"row-{number}", f"{prefix}line {count}")
            except (EOFError, zlib.error, gzip.BadGzipFile) as e:
                raise ValueError(f"{self._name(place)} is a damaged gzip file: {e}") from e
        if not self.sha256:
            self.sha256, self._starts = digest.hexdigest(), starts
        elif digest.hexdigest() != self.sha256:
            raise ValueError(
                f"{self._name(0)}: the input has changed since the job began; leave it alone until "
                "the job is done"
            )

    @contextlib.contextmanager
    def _open(self, place: int) -> Iterator[BinaryIO]:
        with contextlib.ExitStack() as stack:
            if self._spooled is not None:
                self._spooled.seek(0)
                file: Any = io.BufferedReader(io.FileIO(os.dup(self._spooled.fileno())))
            else:
                file = open(self.paths[place], "rb")
            stack.callback(file.close)
            if file.peek(2)[:2] == _GZIP:
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            yield file

    def _name(self, place: int) -> str:
        return str(self.paths[place]) if self.paths else "standard input"

    def _place(self, row: int) -> str:
        place = max(i for i, start in enumerate(self._starts) if start <= row)
        return f"{self._name(place)}: line {row - self._starts[place] + 1}"


def open_input(patterns: Sequence[str], stdin: BinaryIO | None = None) -> Input:
    """Finds the files of a job's rows.

    Args:
      patterns: paths, or globs, whose files are taken in order of their names; gzip files are known
        by what they begin with. "-" alone is standard input, which is copied to a temporary file,
        as it is read twice.
      stdin: where "-" is read from.

    Raises:
      ValueError: if one names nothing, or standard input cannot be had.
      OSError: if it cannot be read.
    """
    if "-" in patterns:
        if len(patterns) > 1:
            raise ValueError("--input=- is standard input, and stands alone")
        if stdin is None:
            raise ValueError("--input=-: standard input is closed")
        spooled = tempfile.TemporaryFile()
        shutil.copyfileobj(stdin, spooled)
        spooled.flush()
        return Input([], spooled)
    paths: dict[str, pathlib.Path] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        found = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded))
        if not found:
            raise ValueError(f"--input={pattern}: no such file")
        for path in found:
            if not os.path.isfile(path) and not os.path.exists(path):
                raise ValueError(f"--input={path}: no such file")
            if os.path.isdir(path):
                raise ValueError(f"--input={path} is a directory; give its files, as {path}/*")
            if not os.path.isfile(path):
                raise ValueError(
                    f"--input={path} is no regular file, and rows are read twice: give --input=-"
                )
            paths.setdefault(os.path.realpath(path), pathlib.Path(path))
    return Input(list(paths.values()))


def _lines(file: BinaryIO, digest: Any) -> Iterator[bytes | None]:
    """The lines of a file without their ends, None for one that is too long.

    Empty lines at the end are none.
    """
    empty, first = 0, True
    while line := file.readline(MAX_LINE_BYTES):
        digest.update(line)
        whole: bytes | None = line.removeprefix(_BOM) if first else line
        first = False
        if not line.endswith(b"\n") and len(line) == MAX_LINE_BYTES:
            whole = None
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                digest.update(rest)
            digest.update(rest)
        if whole is not None and not whole.strip():
            empty += 1
            continue
        yield from [b""] * empty
        empty = 0
        yield whole


def line_of(data: bytes | None, own_id: str, where: str) -> Line:
    """What a line of JSON is.

    Args:
      data: of the line, None for one that is too long.
      own_id: what it is called if it has no custom_id, or is an error.
      where: see `Line`.
    """
    try:
        if data is None:
            raise ValueError(f"it has more than {MAX_LINE_BYTES >> 20} MiB")
        if not data:
            raise ValueError("it is empty; put a JSON object there, or take the line out")
        try:
            text = data.decode()
        except UnicodeDecodeError as e:
            raise ValueError(
                f"it is not UTF-8 (byte 0x{data[e.start]:02x} at position {e.start + 1})"
            ) from None
        value = parse_json(text.strip(), "it")
    except ValueError as e:
        return Line(own_id, where, None, str(e))
    return line_of_value(value, own_id, where)


def line_of_value(value: Any, own_id: str, where: str) -> Line:
    """As `line_of`, of what a line is in JSON."""
    try:
        if not isinstance(value, dict):
            raise ValueError(f'{shown(value)} must be a JSON object, such as {{"prompt": "Hello"}}')
        row_id = value.get("custom_id")
        if row_id is None:
            if "body" in value:
                raise ValueError("custom_id is missing; give each row one of its own")
            return Line(own_id, where, value, None)
        if not isinstance(row_id, str) or not 0 < len(row_id) <= _MAX_ID_LENGTH:
            raise ValueError(
                f"custom_id={shown(row_id)} must be a string of 1 to {_MAX_ID_LENGTH} characters"
            )
        if (position := lone_surrogate(row_id)) is not None:
            raise ValueError(
                f"custom_id={shown(row_id)} must be Unicode text: character {position} is half of "
                "a surrogate pair"
            )
        return Line(row_id, where, value, None)
    except ValueError as e:
        return Line(own_id, where, None, str(e))
