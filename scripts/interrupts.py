# SPDX-License-Identifier: Apache-2.0
"""What Ctrl-C does at which time of a program's life. Imports nothing that takes time."""

import contextlib
import gc
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from types import FrameType

CODE = 130  # what shells report of a program that Ctrl-C has ended
AGAIN = 75  # EX_TEMPFAIL of sysexits.h: run it again
_RETRY_S = 0.01
_AGAIN_S = 2.0


def exit_at_once() -> None:
    """Has Ctrl-C end the program with code 130, at a time when there is nothing to be saved.

    Where it is ignored, as in a job in the background of a shell, it stays ignored.
    """
    _handle(lambda signum, frame: os._exit(CODE))


def end_to_go_on() -> None:
    """Has Ctrl-C and SIGTERM end the program at once, which goes on when it is run `AGAIN`."""
    _stop(lambda signum, frame: os._exit(AGAIN))


def raise_once() -> None:
    """Has Ctrl-C raise `KeyboardInterrupt`, and a second one end the program at once.

    Libraries may swallow the exception (C code that looks something up, for instance), so it is
    raised again after a while unless the program calls `handled`, which one that goes on must do.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if signum != signal.SIGINT and _is_being_handled():
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
            return
        lost = _is_lost(frame)
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_REAL, _RETRY_S if lost else _AGAIN_S)
            if lost:
                return
        exit_at_once()
        raise KeyboardInterrupt

    _handle(interrupt)
    if sys.platform != "win32":
        signal.signal(signal.SIGALRM, interrupt)


class Note:
    """What `noted` and `noted_to_go_on` yield.

    Attributes:
      asked: whether Ctrl-C was pressed, or SIGTERM came.
    """

    def __init__(self):
        self.asked = False


@contextlib.contextmanager
def noted() -> Iterator[Note]:
    """Has a first Ctrl-C be noted, for work to end where it can; the next ones as `raise_once`.

    Afterwards Ctrl-C raises `KeyboardInterrupt` as if there had been none.
    """
    note = Note()

    def interrupt(signum: int, frame: FrameType | None) -> None:
        note.asked = True
        raise_once()

    _handle(interrupt)
    try:
        yield note
    finally:
        handled()
        raise_once()


@contextlib.contextmanager
def noted_to_go_on() -> Iterator[Note]:
    """Has a first Ctrl-C or SIGTERM be noted; others, and any afterwards, as `end_to_go_on`."""
    note = Note()

    def stop(signum: int, frame: FrameType | None) -> None:
        note.asked = True
        end_to_go_on()

    _stop(stop)
    try:
        yield note
    finally:
        end_to_go_on()


def handled() -> None:
    """The program knows of Ctrl-C, so it is not raised again."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_REAL, 0)


def _is_being_handled() -> bool:
    """Whether the program is in an except, finally or with block because of Ctrl-C."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _is_lost(frame: FrameType | None) -> bool:
    """Whether Python would only print what is raised here: in finalizers and their like."""
    callbacks = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    while frame is not None:
        code = frame.f_code
        if code in callbacks or code.co_name == "__del__" or code.co_filename == weakref.__file__:
            return True
        frame = frame.f_back
    return False


def _stop(handler: Callable[[int, FrameType | None], None]) -> None:
    _handle(handler)
    signal.signal(signal.SIGTERM, handler)


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
