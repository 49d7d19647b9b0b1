# SPDX-License-Identifier: Apache-2.0
"""Runs programs as users do."""

import atexit
import functools
import json
import os
import pathlib
import subprocess
import sys
from types import MappingProxyType

from jpaged.pallas_kernels.versions import quick_to_compile
from tests.scripts.forking import Forks

ROOT = pathlib.Path(__file__).resolve().parents[2]


def environment(**changes):
    """What programs are started with: they compile as fast as tests do, and keep it for others."""
    quick = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_to_compile()}
    return os.environ | quick | changes


def ended(*command, stdin="", fresh=False, **changes):
    """Runs `python -m *command` to its end.

    Args:
      command: a module and its arguments.
      stdin: text or bytes, as what it prints is then; not a terminal, so it is never waited for.
      fresh: starts Python, as changes do; otherwise it is a fork that has jax imported.
      changes: of its environment.
    """
    changed = environment(**changes)
    if not (fresh or changes):
        return _forks(frozenset(_lasting(changed).items())).run(command, stdin, timeout=600)
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=isinstance(stdin, str),
        env=changed,
        timeout=600,
    )


def _lasting(variables):
    return {name: value for name, value in variables.items() if name != "PYTEST_CURRENT_TEST"}


@functools.lru_cache(1)
def _forks(variables):
    """One for the environment that tests have; a test that changes it has another."""
    forks = Forks(dict(variables))
    atexit.register(forks.close)
    return forks


def run(*command, code=0, fresh=False):
    """Runs `python -m *command`; gives its output, or what it said where it must fail."""
    done = ended(*command, fresh=fresh)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


# A job in the background of a shell inherits that Ctrl-C is ignored; this takes it back.
_WITH_CTRL_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def start(*command, options=(), changes=MappingProxyType({}), **streams):
    """Starts `python -m *command` as from a terminal.

    Args:
      command: a module and its arguments.
      options: of Python.
      changes: of its environment.
      streams: of `subprocess.Popen`, in place of nothing to read and pipes to write to.
    """
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-c", _WITH_CTRL_C, *options, "-m", *command],
        cwd=ROOT,
        env=environment(**changes),
        **pipes | streams,
    )


def read_until(pipe, sign):
    """Reads until bytes have come, and returns all that came."""
    seen = b""
    while sign not in seen:
        piece = os.read(pipe.fileno(), 2**16)
        assert piece, f"the process ended after {seen.decode()!r}"
        seen += piece
    return seen


def run_report(*command, fresh=False):
    """The JSON object of the last line that `python -m *command` prints."""
    return json.loads(run(*command, fresh=fresh).splitlines()[-1])
