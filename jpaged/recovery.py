# SPDX-License-Identifier: Apache-2.0
"""Knows whether an engine's state is whole, whatever interrupts what changes it."""

import logging
import sys
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

_CUT_SHORT = 0  # no thread has this identifier


class EngineDeadError(RuntimeError):
    """The engine cannot serve any more, because the device cannot; make a new one."""


class Change:
    """Surrounds what changes an engine: `with change: ...`; not nested.

    A change is taken for cut short until it has run to its end, so it does not matter where an
    interrupt or an error strikes: inside it, while it is entered or left, or in whatever handles
    the interrupt before. The next call sees it, and makes the state anew.
    """

    def __init__(self):
        """Nothing has changed yet."""
        # Who is changing the state; None if it is whole.
        self._thread: int | None = None
        self._dead_reason = ""

    def __enter__(self) -> None:
        self._thread = threading.get_ident()

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        self._thread = None if kind is None else _CUT_SHORT

    def was_cut_short(self) -> bool:
        """Whether the state must be made anew before it is used.

        Raises:
          RuntimeError: if another thread is changing it just now.
        """
        thread = self._thread
        if thread is None:
            return False
        if thread not in (_CUT_SHORT, threading.get_ident()) and thread in sys._current_frames():
            raise RuntimeError(
                "another thread is in a call of this engine, which serves one at a time: have one "
                "thread call it, or share a lock"
            )
        return True

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
        self._thread = None

    def check_alive(self) -> None:
        """Raises EngineDeadError if the engine is dead, each time with the same message."""
        if self._dead_reason:
            raise EngineDeadError(self._dead_reason)
