# SPDX-License-Identifier: Apache-2.0
"""Runs programs as users do."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*command, code=0):
    """Runs `python -m *command`; gives its output, or what it said where it must fail."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=600,
    )
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


# A job in the background of a shell inherits that Ctrl-C is ignored; this takes it back.
_WITH_CTRL_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def start(*command, options=(), **streams):
    """Starts `python -m *command` as from a terminal.

    Args:
      command: a module and its arguments.
      options: of Python.
      streams: of `subprocess.Popen`, in place of nothing to read and pipes to write to.
    """
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-c", _WITH_CTRL_C, *options, "-m", *command], cwd=ROOT, **pipes | streams
    )


def read_until(pipe, sign):
    """Reads until bytes have come, and returns all that came."""
    seen = b""
    while sign not in seen:
        piece = os.read(pipe.fileno(), 2**16)
        assert piece, f"the process ended after {seen.decode()!r}"
        seen += piece
    return seen


def run_report(*command):
    """The JSON object of the last line that `python -m *command` prints."""
    return json.loads(run(*command).splitlines()[-1])
