# SPDX-License-Identifier: Apache-2.0
"""The output of a job on disk: only ever appended to, and taken up again after any end.

Records are appended as rows end, in groups that are written and synced together. When all rows are
there, the file is sorted into the order of the input, as a whole or not at all. So the finished
file depends on its records alone, and each of these on its row: how often, when and in which order
the rows were computed leaves no trace.
"""

import contextlib
import errno
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from jpaged.host.checks import shown
from jpaged.jobs.inputs import RowIds
from jpaged.jobs.rows import Result, Sink

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NONE = -1
_BUFFER_BYTES = 2**20


class OutputError(Exception):
    """The output cannot be written; it holds whole records.

    Attributes:
      is_full: whether that is for want of space, so that the job can go on when there is some.
    """

    def __init__(self, path: pathlib.Path, error: OSError):
        """Says why."""
        super().__init__(f"{path} cannot be written: {error.strerror or error}")
        self.is_full = error.errno in _FULL


class OutputFile(Sink):
    """Appends records to a file that this process alone writes.

    Attributes:
      path: of the file.
      num_done: rows with a record, those of earlier runs included.
      num_errors: of these, with an error.
      num_dropped_bytes: what an earlier run had not written whole, and is gone.
    """

    def __init__(
        self,
        path: pathlib.Path,
        ids: RowIds,
        encode: Callable[[Result], bytes],
        *,
        sync_rows: int = 256,
        sync_s: float = 5.0,
    ):
        """Opens a file, or makes it, and finds which rows it has.

        Args:
          path: of the file.
          ids: of the job's rows.
          encode: makes the line of a result, with its custom_id.
          sync_rows: records are written and synced when there are so many.
          sync_s: or when the first of them has waited so many seconds.

        Raises:
          BlockingIOError: if another process writes it.
          ValueError: if it has records of other rows.
          OSError: if it cannot be opened.
        """
        self.path, self._ids, self._encode = path, ids, encode
        self._sync_rows, self._sync_s = sync_rows, sync_s
        self._offsets = np.full(len(ids), _NONE, np.int64)
        self._pending: list[tuple[int, bytes]] = []
        self._pending_since = 0.0
        self._is_sorted = True
        self._last = _NONE
        self.num_done = self.num_errors = self.num_dropped_bytes = 0
        self._fd = _open_locked(path)
        try:
            self._size = self._recover()
        except BaseException:
            os.close(self._fd)
            raise

    def lacks(self, row_id: str) -> bool:
        """Whether a row is one of this output's, and has no record on disk."""
        index = self._ids.index(row_id)
        return index is not None and self._offsets[index] == _NONE

    @property
    def is_done(self) -> bool:
        """Whether every row has a record."""
        return self.num_done == len(self._ids)

    def write(self, result: Result) -> None:
        """Takes a result; it is on disk after the next `sync`. Raises: OutputError."""
        index = self._ids.index(result.row.row_id)
        if index is None or self._offsets[index] != _NONE:
            raise ValueError(f"custom_id={shown(result.row.row_id)} has a record, or is no row")
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending.append((index, self._encode(result)))
        self._count(index, failed=result.error is not None)
        if len(self._pending) >= self._sync_rows:
            self.sync()

    def tick(self) -> None:
        """Syncs what has waited long enough. Raises: OutputError."""
        if self._pending and time.monotonic() - self._pending_since >= self._sync_s:
            self.sync()

    def sync(self) -> None:
        """Writes what is pending, to the disk. Raises: OutputError; the file ends whole then."""
        pending, self._pending = self._pending, []
        try:
            data = memoryview(b"".join(line for _, line in pending))
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError as e:
            self._cut(pending)
            raise OutputError(self.path, e) from e
        for index, line in pending:
            self._offsets[index] = self._size
            self._size += len(line)

    def sort(self) -> None:
        """Puts the records of all rows into the order of the input; the old file stays until then.

        Raises:
          OutputError: if there is no space for a second copy.
        """
        assert self.is_done and not self._pending, "rows are missing"
        if self._is_sorted and self._size == os.fstat(self._fd).st_size:
            return
        with replacing(self.path, "sorting") as file, open(self.path, "rb") as source:
            for offset in self._offsets.tolist():
                source.seek(offset)
                file.write(source.readline())
        self._is_sorted = True

    def close(self) -> None:
        """Lets others write it. What is pending is dropped; the end of `with` syncs it first."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._pending:
                self.sync()
        finally:
            self.close()

    def _count(self, index: int, *, failed: bool) -> None:
        self._is_sorted &= index > self._last
        self._last = index
        self.num_done += 1
        self.num_errors += failed

    def _cut(self, pending: list[tuple[int, bytes]]) -> None:
        """Leaves the whole records that came through."""
        with contextlib.suppress(OSError):
            there = os.fstat(self._fd).st_size
            for _, line in pending:
                if self._size + len(line) > there:
                    break
                self._size += len(line)
            os.ftruncate(self._fd, self._size)

    def _recover(self) -> int:
        """Finds what there is, and drops what is no whole record. Returns: the size then."""
        size = 0
        for line in _whole_lines(self.path):
            try:
                record = json.loads(line)
                row_id, failed = record["custom_id"], record["error"] is not None
            except (ValueError, TypeError, KeyError, RecursionError):
                break
            index = self._ids.index(row_id) if isinstance(row_id, str) else None
            if index is None:
                raise ValueError(
                    f"{self.path} has a record of custom_id={shown(row_id)}, which the input has "
                    "not; name another --output"
                )
            if self._offsets[index] == _NONE:
                self._offsets[index] = size
                self._count(index, failed=failed)
            else:
                self._is_sorted = False
            size += len(line)
        self.num_dropped_bytes = os.fstat(self._fd).st_size - size
        if self.num_dropped_bytes:
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)
        return size


@contextlib.contextmanager
def replacing(path: pathlib.Path, suffix: str) -> Iterator[BinaryIO]:
    """Writes a file that takes the place of another when it is on disk as a whole.

    Args:
      path: of the file.
      suffix: of its name until then.

    Raises:
      OutputError: if it cannot be written; nothing has changed then.
    """
    target = path.with_name(f"{path.name}.{suffix}")
    try:
        with open(target, "wb", _BUFFER_BYTES) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(target, path)
        sync_directory(path.parent)
    except OSError as e:
        with contextlib.suppress(OSError):
            target.unlink()
        raise OutputError(path, e) from e


def sync_directory(path: pathlib.Path) -> None:
    """Has the names of a directory's files on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _whole_lines(path: pathlib.Path) -> Iterator[bytes]:
    with open(path, "rb", _BUFFER_BYTES) as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield line


def _open_locked(path: pathlib.Path) -> int:
    """Opens a file to append to, of which no other process has the lock."""
    import fcntl  # here, as there is none on Windows

    while True:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Sorting puts a new file in place of the one that is locked.
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                sync_directory(path.parent)
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
