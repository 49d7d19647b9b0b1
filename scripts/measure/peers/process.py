# SPDX-License-Identifier: Apache-2.0
"""Our side of the talk with a peer (see `worker`): its process, and what it answers."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import threading
from collections.abc import Mapping
from typing import Any

_ROOT = pathlib.Path(__file__).resolve().parents[3]
_END_S = 3.0


class PeerError(Exception):
    """A peer that cannot be run, or failed; one line says which and why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerSpec:
    """How a peer is run.

    Attributes:
      name: that reports have.
      python: interpreter of its environment.
      flag: that named the interpreter.
      module: that is run with it.
      options: of its first line.
      env: variables that its process gets beside those of this one.
    """

    name: str
    python: str
    flag: str
    module: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


class PeerProcess:
    """A peer with a model in memory, in a process of its own.

    Attributes:
      loaded: its answer to the first line.
    """

    def __init__(self, spec: PeerSpec, job: Mapping[str, Any], log: pathlib.Path, timeout_s: float):
        """Starts it and waits until it has loaded.

        Args:
          spec: the peer.
          job: its first line, without `options`.
          log: file that gets what it prints.
          timeout_s: how long it may take for an answer, in seconds.

        Raises:
          PeerError: if it cannot be run, or fails.
        """
        self._spec, self._log, self._timeout_s = spec, log, timeout_s
        try:
            with open(log, "wb") as messages:
                self._process = subprocess.Popen(
                    [spec.python, "-m", spec.module],
                    cwd=_ROOT,
                    env=os.environ | spec.env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=messages,
                    text=True,
                    encoding="utf-8",
                    start_new_session=True,  # Ctrl-C is ours to handle
                )
        except OSError as e:
            raise PeerError(f"--{spec.flag}={spec.python}: {e.strerror}") from e
        try:
            self.loaded = self._ask({**job, "options": dict(spec.options)})
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompts: list[list[int]], output_lens: list[int]
    ) -> tuple[float, list[list[int]]]:
        """Has it continue prompts; the seconds that it took, and the tokens.

        Raises:
          PeerError: if it fails, or gives other counts of tokens than it was asked for.
        """
        answer = self._ask({"prompts": prompts, "output_lens": output_lens})
        counts = [len(tokens) for tokens in answer["tokens"]]
        if counts != output_lens:
            raise PeerError(
                f"{self._spec.name} gave {sum(counts)} tokens in {len(counts)} answers, not "
                f"{sum(output_lens)} in {len(output_lens)}: its figures would be of other work"
            )
        return answer["seconds"], answer["tokens"]

    def close(self) -> None:
        """Ends the process and those that it started; an idle one ends by itself."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        try:
            self._process.wait(_END_S if hasattr(self, "loaded") else 0)
        except subprocess.TimeoutExpired:
            pass
        self._kill()
        self._process.wait()

    def _ask(self, line: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(self._timeout_s, give_up)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
            text = self._process.stdout.readline()
        except OSError:  # it has ended
            text = ""
        finally:
            timer.cancel()
        if late.is_set():
            raise PeerError(
                f"{self._spec.name} gave no answer within {self._timeout_s:g} s; raise --timeout_s"
            )
        if not text:
            code = self._process.wait()
            raise PeerError(
                f"{self._spec.name} (--{self._spec.flag}={self._spec.python}) ended with code "
                f"{code}; it said last: {self._last_words()}"
            )
        try:
            answer = json.loads(text)
        except ValueError:
            raise PeerError(
                f"{self._spec.name} (--{self._spec.flag}={self._spec.python}) said {text[:80]!r}, "
                "which is no answer: does its interpreter print when it starts?"
            ) from None
        if "error" in answer:
            raise PeerError(f"{self._spec.name} failed: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
