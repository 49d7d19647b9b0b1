# SPDX-License-Identifier: Apache-2.0
"""Steps on disk, as they were planned, to be looked at and to be run again.

JSON Lines: the first object is a `StepLogHeader` with `format` and `version`, every other one a
`StepPlan`, and in `pages` the pages of each of its rows: how many of them are those that the row's
table had in the step before, and the rest; where layers have pages by groups, so for each group, in
a list. Arrays are base64. A name that ends in `.gz` is
compressed.
"""

import base64
import contextlib
import dataclasses
import gzip
import itertools
import json
import logging
import os
import pathlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, TextIO, cast

import numpy as np

from jpaged.host.admission import SchedulerConfig
from jpaged.host.checks import shown
from jpaged.host.logits_processors import Processing
from jpaged.host.page_pool import NULL_PAGE
from jpaged.host.step import Draw, Rows, Samples, Scores, Search, StepPlan
from jpaged.host.token_biases import BiasEntries, CountEntries

logger = logging.getLogger(__name__)

_FORMAT, _VERSION = "jpaged steps", 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLogHeader:
    """What steps were planned for, and what runs them again must have.

    Attributes:
      page_size, num_pages, max_num_seqs, max_num_batched_tokens, max_model_len, deterministic: as
        in `EngineConfig`, resolved.
      num_host_pages: pages that host memory has room for.
      num_groups: groups of layers that have pages of their own.
    """

    page_size: int
    num_pages: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    deterministic: bool
    num_host_pages: int
    num_groups: int = 1

    @property
    def pages_per_seq(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.max_model_len // self.page_size)


@dataclasses.dataclass(frozen=True)
class LoggedStep:
    """A step that was read from a log.

    Attributes:
      plan: as it was planned.
      pages: of each group of layers and each row, as its table had them then.
    """

    plan: StepPlan
    pages: tuple[tuple[tuple[int, ...], ...], ...]
    _pages_per_seq: int

    def snapshot(self, table_ids: Sequence[int], num_rows: int) -> np.ndarray:
        """The pages as an array; see `PageTable.snapshot`. The tables are those of all rows."""
        assert tuple(table_ids) == self.plan.rows.table_ids
        table = np.full((len(self.pages), num_rows, self._pages_per_seq), NULL_PAGE, np.int32)
        for group, rows in enumerate(self.pages):
            for row, pages in enumerate(rows):
                table[group, row, : len(pages)] = pages
        return table[0] if len(self.pages) == 1 else table


class StepLog:
    """Writes steps to a file as they are dispatched."""

    def __init__(self, path: str | os.PathLike[str], header: StepLogHeader):
        """Begins a file; one that is there is replaced.

        Raises:
          ValueError: if it cannot be written.
        """
        self._path = pathlib.Path(path).expanduser()
        self._page_size = header.page_size
        self._before: list[dict[int, list[int]]] = [{} for _ in range(header.num_groups)]
        try:
            self._file: TextIO | None = _open(self._path, "wt")
            self._end = weakref.finalize(self, _close, self._file)
            fields = {"format": _FORMAT, "version": _VERSION, **dataclasses.asdict(header)}
            self._file.write(json.dumps(fields) + "\n")
            self._file.flush()
        except (OSError, ValueError) as e:
            raise ValueError(
                f"record_steps={shown(str(path))} cannot be written: "
                f"{getattr(e, 'strerror', None) or e}"
            ) from e

    def write(self, plan: StepPlan, page_table: np.ndarray) -> None:
        """Adds a step. If that fails, as on a full disk, it is said, and nothing more is recorded.

        Args:
          plan: the step.
          page_table: i32[at least num_rows, pages_per_seq], the pages of its rows, or such tables
            of all groups.
        """
        if self._file is None:
            return
        tables = page_table if page_table.ndim == 3 else page_table[None]
        pages = [self._new_pages(plan, group, table) for group, table in enumerate(tables)]
        pages = pages[0] if len(pages) == 1 else pages
        line = json.dumps({**_as_fields(plan), "pages": pages}, separators=(",", ":"))
        try:
            self._file.write(line + "\n")
            self._file.flush()  # so that what is killed leaves whole lines
        except OSError as e:
            logger.error("%s: recording of steps ends: %s", self._path, e.strerror)
            self.close()

    def _new_pages(self, plan: StepPlan, group: int, table: np.ndarray) -> list[Any]:
        """Of each row, how many pages a group has as in the step before, and the rest."""
        rows, pages, own = plan.rows, [], {}
        for table_id, start, num_tokens, cells in zip(
            rows.table_ids, rows.starts, rows.num_tokens, table, strict=False
        ):
            found = own[table_id] = cells[: -(-(start + num_tokens) // self._page_size)].tolist()
            before = self._before[group].get(table_id, ())
            pairs = itertools.takewhile(lambda p: p[0] == p[1], zip(before, found, strict=False))
            kept = sum(1 for _ in pairs)
            pages.append([kept, found[kept:]])
        self._before[group] = own
        return pages

    def close(self) -> None:
        """Ends the file, as does forgetting the log."""
        self._file = None
        self._end()


def open_log(
    path: str | os.PathLike[str] | None,
    config: SchedulerConfig,
    num_pages: int,
    page_size: int,
    *,
    deterministic: bool = False,
    num_groups: int = 1,
) -> StepLog | None:
    """Begins the log of a scheduler's steps; None where none is wanted.

    Args:
      path: the file, or None.
      config: the scheduler's settings.
      num_pages: of the pool, the reserved one included.
      page_size: tokens a page holds.
      deterministic: whether steps have one shape.
      num_groups: groups of layers that have pages of their own.

    Raises:
      ValueError: if it cannot be written.
    """
    if path is None:
        return None
    header = StepLogHeader(
        page_size=page_size,
        num_pages=num_pages,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        deterministic=deterministic,
        num_host_pages=config.num_host_pages,
        num_groups=num_groups,
    )
    return StepLog(path, header)


def read_header(path: str | os.PathLike[str]) -> StepLogHeader:
    """What the steps of a file were planned for.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it holds no steps.
    """
    with _open(pathlib.Path(path).expanduser(), "rt") as file:
        return _header(path, file)


def read_steps(path: str | os.PathLike[str]) -> Iterator[LoggedStep]:
    """Reads the steps of a file, one at a time.

    A last line that was cut off, as of a process that was killed, is left out.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it does not hold steps; names the line.
    """
    with _open(pathlib.Path(path).expanduser(), "rt") as file:
        header = _header(path, file)
        before: list[dict[int, list[int]]] = [{} for _ in range(header.num_groups)]
        for number, line in enumerate(_whole_lines(file), start=2):
            try:
                fields = json.loads(line)
                plan = _from_fields(fields)
                pages = [fields["pages"]] if header.num_groups == 1 else fields["pages"]
                before = [
                    {
                        table_id: [*group.get(table_id, ())[:kept], *new]
                        for table_id, (kept, new) in zip(plan.rows.table_ids, own, strict=True)
                    }
                    for group, own in zip(before, pages, strict=True)
                ]
                found = tuple(tuple(map(tuple, group.values())) for group in before)
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f"{path}: line {number} is no step: {e!r}") from e
            yield LoggedStep(plan, found, header.pages_per_seq)


def _open(path: pathlib.Path, mode: str) -> TextIO:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return cast(TextIO, opener(path, mode, encoding="utf-8"))


def _close(file: TextIO) -> None:
    with contextlib.suppress(OSError):  # of what could not be written, which was said
        file.close()


def _whole_lines(file: TextIO) -> Iterator[str]:
    try:
        for line in file:
            if line.endswith("\n"):
                yield line
    except EOFError:  # of a compressed file that was cut off
        return


def _header(path: str | os.PathLike[str], file: TextIO) -> StepLogHeader:
    try:
        fields = json.loads(file.readline())
        if (fields.pop("format"), fields.pop("version")) != (_FORMAT, _VERSION):
            raise ValueError
        return StepLogHeader(**fields)
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, gzip.BadGzipFile) as e:
        raise ValueError(
            f"{path} holds no steps of this version: record some with record_steps"
        ) from e


def _as_fields(plan: StepPlan) -> dict[str, Any]:
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    token_ids = [list(map(int, ids)) for ids in plan.rows.token_ids]
    fields["rows"] = plan.rows._asdict() | {"token_ids": token_ids}
    processing = [own and _written(own) for own in plan.samples.processing]
    fields["samples"] = plan.samples._asdict() | {"processing": processing}
    return fields


def _from_fields(fields: dict[str, Any]) -> StepPlan:
    values = {f.name: fields[f.name] for f in dataclasses.fields(StepPlan) if f.name in fields}
    values["scores"] = Scores(*map(tuple, values.get("scores", ())))  # older files have none
    rows, samples = values["rows"], values["samples"]
    rows = {name: tuple(column) for name, column in rows.items()}
    rows["keys"] = tuple((request_id, index) for request_id, index in rows["keys"])
    samples = {name: tuple(column) for name, column in samples.items()}
    samples["draws"] = tuple(Draw(*draw) for draw in samples["draws"])
    samples["processing"] = tuple(own and _read(own) for own in samples["processing"])
    values["rows"], values["samples"] = Rows(**rows), Samples(**samples)
    values["searches"] = tuple(
        Search(first, tuple(scores), width, count)
        for first, scores, width, count in values["searches"]
    )
    for name in ("swap_outs", "swap_ins", "copies"):
        values[name] = tuple((src, dst) for src, dst in values[name])
    return StepPlan(**values)


def _written(value: Any) -> Any:
    """Arrays as base64, tuples as lists of what is in them."""
    if isinstance(value, np.ndarray):
        return base64.b64encode(value.tobytes()).decode()
    return list(map(_written, value)) if isinstance(value, tuple) else value


def _read(fields: list[Any]) -> Processing:
    own = Processing(*fields)
    return own._replace(
        seen=own.seen and _array(own.seen, np.uint8),
        blocked=own.blocked and _array(own.blocked, np.uint8),
        bias=own.bias and BiasEntries(*map(_array, own.bias, (np.int32, np.int32, np.float32))),
        counts=own.counts and CountEntries(*map(_array, own.counts, (np.int32, np.int32))),
    )


def _array(text: Any, dtype: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)
