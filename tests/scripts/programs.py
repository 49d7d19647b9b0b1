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


def run_report(*command):
    """The JSON object of the last line that `python -m *command` prints."""
    return json.loads(run(*command).splitlines()[-1])
