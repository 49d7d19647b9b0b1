# SPDX-License-Identifier: Apache-2.0
"""Jobs: many rows through one engine, that go on where they were stopped, with the same results."""

from jpaged.jobs.rows import Result, Row, Sink
from jpaged.jobs.run import Report, row_seed, run
from jpaged.jobs.snapshot import Snapshot

__all__ = ["Report", "Result", "Row", "Sink", "Snapshot", "row_seed", "run"]
