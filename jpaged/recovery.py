# SPDX-License-Identifier: Apache-2.0
"""Knows whether an engine's state is whole, whatever interrupts what changes it."""

import contextlib
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)


class EngineDeadError(RuntimeError):
    """The engine cannot serve any more, because the device cannot; make a new one."""


class Change:
    """Surrounds what changes an engine: `with change: ...`; not nested.

    A change is taken for cut short until it has run to its end, so it does not matter where an
    interrupt or an error strikes: inside it, while it is entered or left, or in whatever handles
    the interrupt before. The next call sees it, and makes the state anew. Who is in a change is
    known by the frame on the stack, which no interrupt leaves behind.
    """

    def __init__(self):
        """Nothing has changed yet."""
        self._whole = True
        # The function that makes the change, or repairs the state; and the one that will make more.
        self._frame: types.FrameType | None = None
        self._holder: types.FrameType | None = None
        self._dead_reason = ""

    def __enter__(self) -> None:
        self.check_caller()
        if not self._whole:
            raise RuntimeError("another thread's call of this engine was cut short: call again")
        self._frame = sys._getframe(1)
        self._whole = False

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        # In this order: a signal handler between them finds that it is inside.
        self._whole = kind is None
        self._frame = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other threads out between changes too."""
        before, self._holder = self._holder, sys._getframe(2)
        try:
            yield
        finally:
            self._holder = before

    def is_below(self) -> bool:
        """Whether the caller runs inside a change: a signal or log handler, or a destructor."""
        return self._frame is not None and _is_on_stack(self._frame, sys._getframe())

    def check_caller(self) -> None:
        """Raises RuntimeError if the caller is not the one whose turn it is."""
        own = sys._getframe()
        if self.is_below():
            raise RuntimeError(
                "called from inside another call of this engine, as by a signal handler, a log "
                "handler or a destructor: do it when that call is over"
            )
        for frame in (self._frame, self._holder):
            if frame is None or _is_on_stack(frame, own):
                continue
            others = sys._current_frames()
            del others[threading.get_ident()]
            if any(_is_on_stack(frame, other) for other in others.values()):
                raise RuntimeError(
                    "another thread is in a call of this engine, which serves one at a time: have "
                    "one thread call it, or share a lock"
                )

    def was_cut_short(self) -> bool:
        """Whether the state must be made anew before it is used."""
        return not self._whole

    def begin_repair(self) -> None:
        """The caller makes the state anew; until `settle`, calls from inside it only look."""
        self._frame = sys._getframe(1)

    def settle(self, recover: Callable[[], None]) -> None:
        """The host's state is whole again; if the rest cannot be made so, the engine is dead.

        Args:
          recover: makes the rest; may be interrupted, and is called again then.
        """
        try:
            recover()
        except Exception as e:
            logger.debug("the engine is dead", exc_info=True)
            self._dead_reason = (
                "the engine cannot go on: what it has on the device could not be made anew after "
                f"a failure ({type(e).__name__}: {e}). Make a new Engine; if that fails too, "
                "restart the process"
            )
        self._whole = True
        self._frame = None

    def check_alive(self) -> None:
        """Raises EngineDeadError if the engine is dead, each time with the same message."""
        if self._dead_reason:
            raise EngineDeadError(self._dead_reason)


def _is_on_stack(frame: types.FrameType, top: types.FrameType | None) -> bool:
    while top is not None and top is not frame:
        top = top.f_back
    return top is not None
