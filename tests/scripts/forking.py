# SPDX-License-Identifier: Apache-2.0
"""Runs modules as `python -m` does, in forks of a process that has imported what they import.

A program that refuses its flags does nothing else for a second; with this it takes a tenth of one.
No device is there when it forks, so that no thread is.
"""

import gc
import importlib
import json
import os
import pathlib
import runpy
import socket
import subprocess
import sys
import tempfile
import warnings

ROOT = pathlib.Path(__file__).resolve().parents[2]
# All that defines no flag when it is imported: a program defines those that it has.
MODULES = [
    "jpaged",
    "jpaged.scripts.conversations",
    "jpaged.scripts.flags",
    "jpaged.scripts.json_prompts",
    "jpaged.scripts.output",
    "jpaged.scripts.profile_flags",
    "jpaged.scripts.prompts",
    "jpaged.scripts.sampling_flags",
]


class Forks:
    """A process that forks.

    Args:
      environment: of it and of all that it runs.
    """

    def __init__(self, environment):
        self.environment = environment
        self._socket, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            cwd=ROOT,
            # numpy would begin with threads, which a fork does not have.
            env=environment | {"OPENBLAS_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()

    def run(self, command, stdin, timeout):
        """As `subprocess.run` of `python -m *command`, with text or bytes for text or bytes."""
        text = isinstance(stdin, str)
        with (
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
        ):
            given.write(stdin.encode() if text else stdin)
            given.seek(0)
            self._socket.settimeout(timeout)
            fds = [given.fileno(), out.fileno(), err.fileno()]
            socket.send_fds(self._socket, [json.dumps(command).encode()], fds)
            code = json.loads(self._socket.recv(64))
            for file in (out, err):
                file.seek(0)
            results = [file.read() for file in (out, err)]
        if text:
            results = [found.decode().replace("\r\n", "\n") for found in results]
        return subprocess.CompletedProcess(command, code, *results)

    def close(self):
        self._socket.close()
        self._process.wait()


def _fork(connection):
    """Forks for each command that comes; returns in a fork, with its command."""
    while True:
        data, fds, *_ = socket.recv_fds(connection, 2**20, 3)
        if not data:
            sys.exit()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jax's, of threads that are not there
            pid = os.fork()
        if not pid:
            connection.close()
            for target, fd in enumerate(fds):
                os.dup2(fd, target)
                os.close(fd)
            return json.loads(data)
        for fd in fds:
            os.close(fd)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.send(json.dumps(code).encode())


if __name__ == "__main__":
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # what is imported stays: a fork need not copy it to look at it
    threads = list(pathlib.Path("/proc/self/task").glob("*"))
    assert len(threads) <= 1, threads
    module, *arguments = _fork(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
