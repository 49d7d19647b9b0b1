# SPDX-License-Identifier: Apache-2.0
"""Runs a job: rows of any iterator through an engine that is always full, results to a sink."""

import collections
import contextlib
import dataclasses
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator

import tqdm

from jpaged.engine import Engine
from jpaged.host.checks import at_least, checked, function, instance_of
from jpaged.host.outputs import RequestOutput
from jpaged.host.params import SamplingParams
from jpaged.jobs.rows import Result, Row, Sink
from jpaged.jobs.snapshot import Snapshot

logger = logging.getLogger(__name__)

# Rows that are in the engine at once, for each sequence that runs: what waits is there when a
# sequence ends, and a step admits at most as many as run.
_WINDOW = 4
# In order, results wait for a slow row before them: so many for each row in the engine.
_MAX_HELD = 16
_END = Row(row_id="")
# Looking at the engine for the progress bar takes longer than all else that a step is here.
_SHOW_S = 0.5


@dataclasses.dataclass(frozen=True)
class Report:
    """What came of a job.

    Attributes:
      num_done: rows whose results the sink was given.
      num_errors: of these, rows with an error.
      num_left: rows that were begun and stopped; the iterator may have more.
      stopped: whether `stop` ended the job before its rows were done.
    """

    num_done: int
    num_errors: int
    num_left: int
    stopped: bool


def row_seed(seed: int, row_id: str) -> int:
    """The seed of a row without one: 32 bits of BLAKE2b of the job's seed, a colon and its id."""
    digest = hashlib.blake2b(f"{seed}:{row_id}".encode(errors="surrogatepass"), digest_size=4)
    return int.from_bytes(digest.digest(), "little")


def run(
    rows: Iterable[Row | None],
    sink: Sink,
    engine: Engine,
    *,
    seed: int = 0,
    window: int | None = None,
    ordered: bool = False,
    stop: Callable[[], object] = lambda: False,
    grace_s: float = 0.0,
    on_step: Callable[[], object] = lambda: None,
    progress: bool = False,
    total: int | None = None,
    num_before: int = 0,
    snapshot: Snapshot | None = None,
) -> Report:
    """Answers rows, as many at once as fit, and gives each result to the sink when it has ended.

    Rows are taken from the iterator only as the engine has room, so there may be more of them than
    memory holds. A row that cannot be served is a result with an error, never the end of the job.

    Args:
      rows: with ids that differ. None among them says that there is none at the moment: those that
        live go on, and the iterator is asked after each step; while none lives, it waits itself.
      sink: what it raises ends the job.
      engine: with no request of anybody's; `job.run` has it for itself.
      seed: of the job; see `row_seed`.
      window: rows in the engine at most; None takes four for each of its max_num_seqs. Priorities
        of rows count among those that are there.
      ordered: whether results come in the order of the rows; up to 16 windows of them wait for one
        before them, and then no more rows are begun.
      stop: asked after each step; once it is true no row is begun, those that wait are left, and
        those that run have `grace_s` seconds to end.
      grace_s: likewise.
      on_step: called after each step, as in `Engine.generate`.
      progress: whether to show a progress bar on standard error.
      total: rows of the job, for the bar; None does not say.
      num_before: of these, rows that were done before.
      snapshot: has what rows come to before they end, and what they came to in a run before, from
        where they go on; None has them begin anew.

    Returns:
      How many rows came to what.

    Raises:
      ValueError: if an argument is wrong, or the engine has other requests.
      BaseException: whatever rows, sink or engine raise; what was live has been aborted then.
    """
    instance_of("engine", engine, Engine)
    seed = checked("seed", seed, int)
    window = checked("window", window, int | None, at_least(1))
    function("stop", stop)
    function("on_step", on_step)
    if snapshot is not None:
        instance_of("snapshot", snapshot, Snapshot)
    if engine.has_unfinished_requests:
        raise ValueError("the engine has live requests: a job takes an engine for itself")
    window = window or _WINDOW * engine.config.max_num_seqs
    job = _Job(sink, engine, seed, window, ordered, snapshot)
    with contextlib.ExitStack() as stack:
        stack.callback(job.leave)
        if progress:
            # miniters=0 redraws the bar with time, also while no row ends.
            bar = tqdm.tqdm(total=total, initial=num_before, unit="row", miniters=0)
            job.bar = stack.enter_context(bar)
        return job.run(iter(rows), stop, grace_s, on_step)


class _Job:
    """One run: the rows that are in the engine, and the results that wait for others."""

    def __init__(
        self,
        sink: Sink,
        engine: Engine,
        seed: int,
        window: int,
        ordered: bool,
        snapshot: Snapshot | None,
    ):
        self.bar: tqdm.tqdm | None = None
        self._show_at = 0.0
        self._sink, self._engine, self._seed, self._snapshot = sink, engine, seed, snapshot
        self._window, self._max_held = window, _MAX_HELD * window if ordered else None
        self._live: dict[str, tuple[int, Row]] = {}
        self._held: dict[int, Result] = {}
        self._num_begun = self._num_done = self._num_errors = 0

    def run(
        self,
        rows: Iterator[Row | None],
        stop: Callable[[], object],
        grace_s: float,
        on_step: Callable[[], object],
    ) -> Report:
        deadline: float | None = None
        more = True
        while more or self._live:
            if deadline is None and stop():
                deadline, more = time.monotonic() + grace_s, False
                self._take_snapshot()
                self._leave_waiting()
            while more and len(self._live) < self._window and self._has_room():
                row = next(rows, _END)
                if row is None:
                    break
                if row is _END:
                    more = False
                else:
                    self._begin(row)
            if deadline is not None and time.monotonic() >= deadline:
                self._take_snapshot()
                break
            if self._live:
                for output in self._engine.step():
                    self._end(output)
                on_step()
            self._sink.tick()
            if self._snapshot is not None and self._snapshot.is_due:
                self._take_snapshot()
            self._show()
        num_left = self._num_begun - self._num_done
        return Report(self._num_done, self._num_errors, num_left, deadline is not None)

    def leave(self) -> None:
        """Aborts what is live, which no result comes of."""
        for request_id in list(self._live):
            with contextlib.suppress(Exception):  # it has ended, or the engine with it
                self._engine.abort(request_id)
        self._live.clear()

    def _has_room(self) -> bool:
        return self._max_held is None or len(self._held) < self._max_held

    def _begin(self, row: Row) -> None:
        position = self._num_begun
        self._num_begun += 1
        error, params = row.error, row.params
        if error is None:
            try:
                if params.seed is None:
                    params = dataclasses.replace(params, seed=row_seed(self._seed, row.row_id))
                self._live[self._add(row, params)] = position, row
                return
            except ValueError as e:
                error = re.sub(r"^request '\d+': ", "", str(e))
        self._give(position, Result(row, None, error))

    def _add(self, row: Row, params: SamplingParams) -> str:
        """Queues a row, from where a run before left it. Returns: the request's id."""
        resume = [] if self._snapshot is None else self._snapshot.progress(row.row_id)
        if resume:
            try:
                return self._engine.add_request(row.prompt, params, resume=resume)
            except ValueError as e:
                logger.warning("row %r begins anew, not from its snapshot: %s", row.row_id, e)
        return self._engine.add_request(row.prompt, params)

    def _take_snapshot(self) -> None:
        if self._snapshot is not None and self._live:
            self._snapshot.take(
                (row.row_id, self._engine.progress(request_id))
                for request_id, (_, row) in self._live.items()
            )

    def _end(self, output: RequestOutput) -> None:
        position, row = self._live.pop(output.request_id)
        reasons = collections.Counter(c.finish_reason for c in output.outputs)
        if not output.outputs or reasons[None] or reasons["abort"]:
            return  # the step was cut short: it is no result, and the row is left
        error = next((c.error for c in output.outputs if c.error is not None), None)
        self._give(position, Result(row, output, error))

    def _give(self, position: int, result: Result) -> None:
        if self._max_held is None:
            self._write(result)
            return
        self._held[position] = result
        # Positions are those of rows begun, and each of them is given once.
        while (ready := self._held.pop(self._num_done, None)) is not None:
            self._write(ready)

    def _write(self, result: Result) -> None:
        self._sink.write(result)
        self._num_done += 1
        self._num_errors += result.error is not None
        if self.bar is not None:
            self.bar.update()

    def _show(self) -> None:
        if self.bar is not None and self._live and time.monotonic() >= self._show_at:
            self._show_at = time.monotonic() + _SHOW_S
            self.bar.set_postfix_str(self._engine.stats().progress_line(), refresh=False)
            self.bar.update(0)

    def _leave_waiting(self) -> None:
        """Aborts the rows that have no pages: they would only begin as others end."""
        pages = self._engine.pool_snapshot().pages
        running = {owner.rpartition("#")[0] for page in pages for owner in page.owners}
        for request_id in self._live.keys() - running:
            self._engine.abort(request_id)
            del self._live[request_id]
