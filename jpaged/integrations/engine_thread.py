# SPDX-License-Identifier: Apache-2.0
"""An engine with a thread of its own, that answers the rows of many callers together."""

import atexit
import collections
import concurrent.futures
import copy
import logging
import threading
import weakref
from collections.abc import Iterator, Sequence

from jpaged.engine import Engine
from jpaged.jobs import Result, Row, Sink, run
from jpaged.recovery import EngineDeadError

logger = logging.getLogger(__name__)

# A step may compile, and one on a device that hangs never ends: a process must.
_CLOSE_S = 60.0
_MAX_REASON = 500  # characters of what the device says, which may be pages

_Future = concurrent.futures.Future[list[Result]]


class EngineFailedError(RuntimeError):
    """The engine failed, or was closed, before a call's rows had their results."""


class EngineThread:
    """Runs an engine for callers in any number of threads, whose rows share its steps.

    Rows join those that run as soon as there is room, whosever they are, so that the engine is as
    full as all callers together make it. What a row comes to depends on none of that: see
    `jobs.run`.

    Invariants:
      Every call returns or raises: what ends the engine's work is an error of each call that waits.
      After a failure the next call finds an engine that serves, if the device does.

    Example:
      engine = EngineThread(Engine.load("demo"))
      results = engine.run([Row(row_id="a", prompt="Once"), Row(row_id="b", prompt="The dog")])
    """

    def __init__(self, engine: Engine, *, seed: int = 0):
        """Starts the thread, which has the engine for itself from now on.

        Args:
          engine: with no request of anybody's.
          seed: of the job; see `jobs.row_seed`.
        """
        inbox = self._inbox = _Inbox()
        thread = threading.Thread(
            target=_serve, args=(engine, seed, inbox), name="jpaged-engine", daemon=True
        )
        # The thread does not know this object, so that it ends when nobody does. At exit it ends
        # before jax does, whose hook is older.
        self._close = weakref.finalize(self, _end, inbox, thread)
        self._close.atexit = False
        atexit.register(self._close)
        thread.start()

    def run(self, rows: Sequence[Row]) -> list[Result]:
        """Answers rows, beside those of other callers.

        Returns:
          A result for each row, in their order; that of a wrong row has an error.

        Raises:
          EngineFailedError: if the engine fails meanwhile, or is closed; no row has a result then.
        """
        return self._inbox.put(rows).result()

    def close(self) -> None:
        """Ends the thread, and the calls that wait, with an error; more than once is once."""
        self._close()
        atexit.unregister(self._close)


class _Inbox(Sink):
    """The calls that wait: a job takes their rows from here, and gives back what came of them."""

    def __init__(self):
        self._changed = threading.Condition()
        self._waiting: collections.deque[tuple[_Call, int, Row]] = collections.deque()
        self._begun: dict[int, tuple[_Call, int]] = {}
        self._closed_because = ""

    @property
    def is_closed(self) -> bool:
        return bool(self._closed_because)

    def put(self, rows: Sequence[Row]) -> _Future:
        """Queues the rows of a call. Returns: what will have its results."""
        call = _Call(len(rows))
        with self._changed:
            if self.is_closed:
                raise EngineFailedError(self._closed_because)
            # Copies, as rows are known by which object they are: two calls may have equal ones.
            self._waiting.extend((call, i, copy.copy(row)) for i, row in enumerate(rows))
            self._changed.notify_all()
        return call.future

    def wait(self) -> None:
        """Waits until there are rows, or it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.is_closed)

    def __iter__(self) -> Iterator[Row | None]:
        """Yields rows as they come, None while there is none and others run; ends when closed."""
        while True:
            with self._changed:
                if not self._begun:
                    self.wait()
                if self.is_closed:
                    return
                row = None
                if self._waiting:
                    call, place, row = self._waiting.popleft()
                    self._begun[id(row)] = call, place
            yield row

    def write(self, result: Result) -> None:
        with self._changed:
            call, place = self._begun.pop(id(result.row), (None, 0))
        if call is not None:  # closed meanwhile
            call.give(place, result)

    def tick(self) -> None:
        pass

    def fail(self, reason: str, error: BaseException | None, *, close: bool = False) -> None:
        """Ends all calls that wait, and those to come if it is closed by it."""
        with self._changed:
            if close and not self.is_closed:
                self._closed_because = reason
            calls = {call for call, _, _ in self._waiting} | {c for c, _ in self._begun.values()}
            self._waiting.clear()
            self._begun.clear()
            self._changed.notify_all()
        for call in calls:
            call.fail(reason, error)


class _Call:
    """The results of a call, until there are all."""

    def __init__(self, num_rows: int):
        self.future: _Future = concurrent.futures.Future()
        self._results: dict[int, Result] = {}
        self._num_rows = num_rows
        if not num_rows:
            self.future.set_result([])

    def give(self, place: int, result: Result) -> None:
        self._results[place] = result
        if len(self._results) == self._num_rows:
            self.future.set_result([self._results[i] for i in range(self._num_rows)])

    def fail(self, reason: str, error: BaseException | None) -> None:
        own = EngineFailedError(reason)  # each caller's thread adds its own traceback
        own.__cause__ = error
        self.future.set_exception(own)


def _serve(engine: Engine, seed: int, inbox: _Inbox) -> None:
    while not inbox.is_closed:
        inbox.wait()
        try:
            run(inbox, inbox, engine, seed=seed, stop=lambda: inbox.is_closed)
        except BaseException as e:
            logger.warning("the engine failed", exc_info=True)
            text = " ".join(f"{type(e).__name__}: {e}".split())[:_MAX_REASON]
            reason = f"the engine failed, and the rows of this call have no results: {text}"
            inbox.fail(reason, e, close=isinstance(e, EngineDeadError))
    # Rows that came between the last step and now, or were left in it.
    inbox.fail("the engine was closed", None, close=True)


def _end(inbox: _Inbox, thread: threading.Thread) -> None:
    inbox.fail("the engine was closed", None, close=True)
    if thread is not threading.current_thread():  # which may collect garbage, and so this
        thread.join(_CLOSE_S)
