# SPDX-License-Identifier: Apache-2.0
"""Traces some of an engine's steps with jax's profiler, and says where their time went."""

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
import types
from typing import Any

import jax

from jpaged.device.memory import default_dtype
from jpaged.engine import Engine
from jpaged.host.stats import EngineStats
from jpaged.measure import machine
from jpaged.measure.breakdown import Work, draw, make_breakdown
from jpaged.measure.floor import floor_of
from jpaged.measure.kinds import Scopes
from jpaged.measure.rates import copy_rates, product_rate
from jpaged.measure.trace import read_trace
from jpaged.pallas_kernels.versions import compiled_programs

STARTS = ("decode", "first")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What to trace.

    Attributes:
      directory: for the trace, breakdown.txt and breakdown.json; made if it is missing.
      steps: how many.
      start: from which step on: "decode", the first after one that did nothing but decode and
        compiled nothing; "first", the first of all.

    Raises:
      ValueError: if a value is out of range, or the directory cannot be written.
    """

    directory: str
    steps: int = 40
    start: str = "decode"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"profile_steps={self.steps} must be at least 1")
        if self.start not in STARTS:
            raise ValueError(f"profile_start={self.start!r}: choose among {', '.join(STARTS)}")
        path = pathlib.Path(self.directory)
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as e:
            raise ValueError(
                f"profile={self.directory} cannot be written: {os.strerror(e.errno or 0)}; name "
                "a directory"
            ) from e


class Profile:
    """Traces a window of an engine's steps: `with Profile(engine, config) as profile: ...`.

    Whoever runs the engine calls `look` after each step, and does not reset its totals meanwhile.
    The profiler is one for the whole process.

    Attributes:
      found: afterwards, the breakdown as `breakdown.make_breakdown` gives it, with `hardware`,
        `versions` and `trace`, the trace's path; None if nothing was traced.
    """

    def __init__(self, engine: Engine, config: ProfileConfig | None):
        """Traces nothing yet; None never does."""
        self.found: dict[str, Any] | None = None
        self._engine, self._config = engine, config
        self._before: EngineStats | None = None  # the reading at which the trace began
        self._after: EngineStats | None = None
        self._last = engine.stats()
        self._programs: list[str] = []

    def __enter__(self) -> "Profile":
        """Begins, at once where the first step is to be in the trace.

        Raises:
          RuntimeError: if something else profiles this process.
        """
        if self._config is not None and self._config.start == "first":
            self._begin(self._last, self._config)
        return self

    def look(self) -> None:
        """Begins or ends the trace, where it is time; called after each step."""
        config = self._config
        if config is None or self._after is not None:
            return
        stats, last = self._engine.stats(), self._last
        self._last = stats
        if self._before is not None:
            if stats.totals.num_steps - self._before.totals.num_steps >= config.steps:
                self._end(stats)
        elif (
            stats.num_compilations == last.num_compilations
            and stats.totals.num_steps > last.totals.num_steps
            and stats.totals.num_prefill_tokens == last.totals.num_prefill_tokens
        ):
            self._begin(stats, config)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        """Ends the trace if it still runs, reads it, measures the floor, and writes both."""
        if self._before is not None and self._after is None:
            with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
                self._end(self._last)
        if kind is None and self._after is not None and self._before is not None:
            assert self._config is not None
            self.found = self._breakdown(self._before, self._after, self._config)

    def _begin(self, stats: EngineStats, config: ProfileConfig) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # else every call of Python's is an event
        jax.profiler.start_trace(config.directory, profiler_options=options)
        self._before = stats

    def _end(self, stats: EngineStats) -> None:
        self._after = stats
        self._programs = compiled_programs()  # while they are alive
        jax.profiler.stop_trace()

    def _breakdown(
        self, before: EngineStats, after: EngineStats, config: ProfileConfig
    ) -> dict[str, Any] | None:
        directory = pathlib.Path(config.directory)
        path = max(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
        data = jax.profiler.ProfileData.from_file(str(path))
        trace = read_trace(data, Scopes(self._programs))
        first, last = before.totals, after.totals
        steps = last.num_steps - first.num_steps
        if not (steps and trace.steps):
            return None
        used = (last.used_page_steps - first.used_page_steps) * after.page_bytes
        work = Work(
            steps=steps,
            rows=last.running_steps - first.running_steps,
            prefill_tokens=last.num_prefill_tokens - first.num_prefill_tokens,
            page_bytes=used,
            compilations=after.num_compilations - before.num_compilations,
        )
        dtype = default_dtype(self._engine.config)
        floor = floor_of(
            self._engine.model_config,
            dtype,
            tokens=work.tokens,
            samples=work.rows / steps,
            page_bytes=used / steps,
            copy_bytes_per_s=max(copy_rates().values()),
            product_flops_per_s=product_rate(dtype),
        )
        found = {
            "hardware": machine.hardware(),
            "versions": machine.versions(),
            "trace": str(path),
            **make_breakdown(trace, work, floor),
        }
        text = json.dumps(found, indent=1) + "\n"
        (directory / "breakdown.json").write_text(text, encoding="utf-8")
        (directory / "breakdown.txt").write_text(draw(found), encoding="utf-8")
        return found
