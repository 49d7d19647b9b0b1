# SPDX-License-Identifier: Apache-2.0
"""Tells while a run goes on how it does: a line of JSON now and then, and a file of metrics."""

import datetime
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

from jpaged.host.checks import shown
from jpaged.host.stats import EngineStats
from jpaged.telemetry.metrics import metrics_of, write_metrics

logger = logging.getLogger(__name__)

METRICS_INTERVAL_S = 15.0
"""Seconds between two writings of metrics, which is how often Prometheus mostly asks."""


class Monitor:
    """Looks at an engine after each step, and tells when it is time.

    Rates are those since the line before; shares and counts are those of `EngineStats`.
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        *,
        total: int,
        interval_s: float = 60.0,
        metrics_file: str | os.PathLike[str] | None = None,
        num_before: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Begins; the metrics of an engine that has done nothing are written at once.

        Args:
          stats: `Engine.stats`.
          total: requests, or rows, of the run.
          interval_s: seconds between two lines; 0 writes none.
          metrics_file: file for Prometheus; None writes none.
          num_before: of these, how many were done before.
          clock: gives seconds.

        Raises:
          ValueError: if the file cannot be written.
        """
        self._stats, self._total, self._num_before = stats, total, num_before
        self._interval_s, self._clock = interval_s, clock
        self._begin_s = self._line_s = self._metrics_s = clock()
        self._before = stats()
        self._metrics = None if metrics_file is None else pathlib.Path(metrics_file).expanduser()
        if self._metrics is not None:
            try:
                write_metrics(self._metrics, metrics_of(self._before, num_before, total))
            except OSError as e:
                raise ValueError(
                    f"metrics_file={shown(str(metrics_file))} cannot be written: {e.strerror}"
                ) from e

    def look(self, num_done: int) -> None:
        """Called after each step, with how many requests are done; mostly only asks the time."""
        now = self._clock()
        if self._interval_s and now - self._line_s >= self._interval_s:
            stats = self._stats()
            logger.info("%s", json.dumps(self._line(stats, num_done, now)))
            self._before, self._line_s = stats, now
        if self._metrics is not None and now - self._metrics_s >= METRICS_INTERVAL_S:
            self._metrics_s = now
            self._write(num_done)

    def close(self, num_done: int) -> None:
        """Writes the metrics as they are at the end."""
        if self._metrics is not None:
            self._write(num_done)

    def _write(self, num_done: int) -> None:
        """A file that cannot be written is said, and is no reason to stop; it may be later."""
        assert self._metrics is not None
        try:
            write_metrics(self._metrics, metrics_of(self._stats(), num_done, self._total))
        except OSError as e:
            logger.warning("%s: metrics are not written: %s", self._metrics, e.strerror)

    def _line(self, stats: EngineStats, num_done: int, now: float) -> dict[str, Any]:
        totals, before, took_s = stats.totals, self._before.totals, now - self._line_s

        def rate(name: str) -> float:
            return round((getattr(totals, name) - getattr(before, name)) / took_s, 1)

        # Compiling is mostly over when it is first asked how long the rest takes.
        spent_s = now - self._begin_s - totals.compile_s
        done_now, eta_s = num_done - self._num_before, None
        if done_now > 0 and spent_s > 0:
            eta_s = round((self._total - num_done) * spent_s / done_now)
        moment = datetime.datetime.now(datetime.UTC)
        return {
            "time": moment.isoformat(timespec="seconds"),
            "elapsed_s": round(now - self._begin_s),
            "num_done": num_done,
            "num_total": self._total,
            "eta_s": eta_s,
            "generated_tokens_per_s": rate("num_generated_tokens"),
            "prefill_tokens_per_s": rate("num_prefill_tokens"),
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "num_used_pages": stats.num_used_pages,
            "num_cached_pages": stats.num_cached_pages,
            "num_usable_pages": stats.num_usable_pages,
            "utilisation": round(stats.utilisation, 4),
            "hit_rate": round(stats.hit_rate, 4),
            "num_disk_tokens": totals.num_disk_tokens,
            "num_preemptions": totals.num_preemptions,
            "recomputed_share": round(stats.recomputed_share, 4),
        }
