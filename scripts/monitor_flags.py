# SPDX-License-Identifier: Apache-2.0
"""Flags of what a run tells while it goes on."""

import contextlib
from collections.abc import Callable, Iterator

from absl import flags

from jpaged import Engine
from jpaged.telemetry.monitor import METRICS_INTERVAL_S, Monitor

# As in `flags`.
flags.disclaim_key_flags()


def define_monitor_flags() -> None:
    """Defines them."""
    flags.DEFINE_float(
        "stats_interval_s",
        60.0,
        "Seconds between two lines of JSON on standard error that tell how the run does: tokens a "
        "second, pages, sequences that wait, share computed again, seconds left. 0 writes none.",
        lower_bound=0.0,
    )
    flags.DEFINE_string(
        "metrics_file",
        None,
        "File of metrics in Prometheus' text format, for instance for node_exporter's textfile "
        f"collector, replaced every {METRICS_INTERVAL_S:.0f} seconds and at the end.",
    )


@contextlib.contextmanager
def monitored(
    engine: Engine, num_done: Callable[[], int], total: int
) -> Iterator[Callable[[], None]]:
    """Tells of what an engine does meanwhile.

    Args:
      engine: what runs.
      num_done: how many requests are done.
      total: of how many.

    Yields:
      What is to be called after each step.

    Raises:
      ValueError: if the file of metrics cannot be written.
    """
    monitor = Monitor(
        engine.stats,
        total=total,
        interval_s=flags.FLAGS.stats_interval_s,
        metrics_file=flags.FLAGS.metrics_file,
        num_before=num_done(),
    )
    try:
        yield lambda: monitor.look(num_done())
    finally:
        monitor.close(num_done())
