# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest

PROGRAM = """
import gc, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from jpaged.scripts import interrupts

def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)

{body}
"""


def run(body):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body)], capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr
    return done.returncode, done.stdout


def test_while_starting():
    assert run("interrupts.exit_at_once(); ctrl_c(); time.sleep(9); print('lost')") == (130, "")


def test_the_first_raises_and_the_second_ends():
    body = """
interrupts.raise_once()
try:
    ctrl_c()
    time.sleep(9)
except KeyboardInterrupt:
    print("saved", flush=True)
    ctrl_c()
    time.sleep(9)
    print("lost")
"""
    assert run(body) == (130, "saved\n")


def test_what_is_ignored_stays_ignored():
    body = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
interrupts.exit_at_once()
ctrl_c()
interrupts.raise_once()
ctrl_c()
print("goes on")
"""
    assert run(body) == (0, "goes on\n")


def test_where_an_exception_would_only_be_printed():
    """It is raised a moment later instead: jax has such a callback at each garbage collection."""
    for cause in (
        "gc.callbacks.append(lambda *_: ctrl_c()); gc.collect(); gc.callbacks.clear()",
        "Dying()",
        "import weakref; weakref.finalize(Dying, ctrl_c); del Dying; gc.collect()",
    ):
        body = f"""
class Dying:
    def __del__(self):
        ctrl_c()

interrupts.raise_once()
try:
    {cause}
    time.sleep(9)
except KeyboardInterrupt:
    print("raised")
"""
        assert run(body) == (0, "raised\n"), cause


@pytest.mark.parametrize(("known", "result"), [(False, "raised again\n"), (True, "goes on\n")])
def test_what_a_library_swallows_is_raised_again(known, result):
    body = f"""
interrupts._AGAIN_S = 0.2
interrupts.raise_once()
try:
    ctrl_c()
except KeyboardInterrupt:
    if {known}:
        interrupts.handled()
try:
    time.sleep(1)
    print("goes on")
except KeyboardInterrupt:
    print("raised again")
"""
    assert run(body) == (0, result)


def test_what_handles_it_is_not_struck_again():
    """The repair of an engine, for instance, may take longer than that."""
    body = """
interrupts._AGAIN_S = 0.2
interrupts.raise_once()
try:
    ctrl_c()
    time.sleep(9)
except KeyboardInterrupt:
    time.sleep(1)
    interrupts.handled()
    print("handled")
time.sleep(0.5)
print("goes on")
"""
    assert run(body) == (0, "handled\ngoes on\n")
