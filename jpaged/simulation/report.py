# SPDX-License-Identifier: Apache-2.0
"""What a run was like, with or without a model, and how one compares with another."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jpaged.host.stats import Counters, EngineStats
from jpaged.simulation.workload import Workload

# The trace is shown with this many marks, and reported with this many numbers.
TRACE_POINTS = 60
# A run has ramped up once it has held this share of the pages that it ever holds.
_RAMPED_UP = 0.9
_BARS = "▁▂▃▄▅▆▇█"

Report = dict[str, Any]


class Trace:
    """How full the pool was over a run, one entry a step, counters starting from zero."""

    def __init__(self):
        self._utilisation: list[float] = []
        self._used: list[float] = []
        self._running: list[int] = []
        self._before = Counters()

    def record(self, stats: EngineStats) -> None:
        """Adds the step that was scheduled since the last call, if one was."""
        totals, before = stats.totals, self._before
        if totals.num_steps > before.num_steps:
            self._utilisation.append(stats.utilisation)
            self._used.append(stats.num_used_pages / stats.num_usable_pages)
            self._running.append(totals.running_steps - before.running_steps)
        self._before = totals

    def least_utilisation(self) -> float:
        """The least utilisation from the step on that first held nearly as many pages as ever."""
        if not self._used:
            return 1.0
        enough = _RAMPED_UP * max(self._used)
        start = next(i for i, used in enumerate(self._used) if used >= enough)
        return min(self._utilisation[start:])

    @property
    def mean_used(self) -> float:
        """Share of the pool's pages in use, mean over the steps."""
        return float(np.mean(self._used)) if self._used else 0.0

    def utilisation_over_time(self) -> list[float]:
        """Utilisation in at most `TRACE_POINTS` equal parts of the run, each a mean."""
        return _resample(self._utilisation)

    def used_over_time(self) -> list[float]:
        """Share of the pool's pages in use, likewise."""
        return _resample(self._used)

    def running_over_time(self) -> list[float]:
        """Running sequences, likewise."""
        return _resample(self._running)


def cache_report(stats: EngineStats, trace: Trace, workload: Workload) -> Report:
    """What can be said of a run with or without a model; `scripts.benchmark` documents the fields.

    Args:
      stats: as the run left them.
      trace: of the run's steps.
      workload: what was run.

    Returns:
      A JSON object.
    """
    totals = stats.totals
    return {
        "steps": totals.num_steps,
        "preemptions": totals.num_preemptions,
        "recomputed_tokens": totals.num_recomputed_tokens,
        "page_copies": totals.num_page_copies,
        "utilisation": {
            "mean": stats.mean_utilisation,
            "least_after_ramp_up": trace.least_utilisation(),
            "over_time": trace.utilisation_over_time(),
        },
        "pool_used": {
            "mean": trace.mean_used,
            "peak": totals.peak_used_pages / stats.num_usable_pages,
            "over_time": trace.used_over_time(),
        },
        "running": {
            "mean": stats.mean_running,
            "peak": totals.peak_running,
            "over_time": trace.running_over_time(),
        },
        "pool": {
            "pages": stats.num_usable_pages,
            "page_bytes": stats.page_bytes,
            "bytes": stats.num_usable_pages * stats.page_bytes,
        },
        "contiguous": {
            "pages": stats.contiguous_pages,
            "bytes": stats.contiguous_pages * stats.page_bytes,
            "fits": stats.num_usable_pages // stats.pages_per_seq,
        },
    }


def compare_runs(runs: dict[str, Report]) -> dict[str, float] | None:
    """Paged divided by max, number by number; None where there is one run only."""
    if len(runs) < 2:
        return None
    paged, reserved = runs["paged"], runs["max"]
    ratios = {
        "mean_running": paged["running"]["mean"] / reserved["running"]["mean"],
        "peak_running": paged["running"]["peak"] / reserved["running"]["peak"],
        "steps": paged["steps"] / reserved["steps"],
    }
    if "output_tokens_per_s" in paged:
        speeds = paged["output_tokens_per_s"], reserved["output_tokens_per_s"]
        ratios["output_tokens_per_s"] = speeds[0] / speeds[1]
    return ratios


def sparkline(shares: Sequence[float]) -> str:
    """One mark for each number between 0 and 1."""
    return "".join(_BARS[min(int(share * len(_BARS)), len(_BARS) - 1)] for share in shares)


def _resample(values: Sequence[float]) -> list[float]:
    parts = np.array_split(np.asarray(values, np.float64), min(len(values), TRACE_POINTS) or 1)
    return [round(float(part.mean()), 4) for part in parts if part.size]
