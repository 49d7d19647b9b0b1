# SPDX-License-Identifier: Apache-2.0
"""Runs recorded steps again: the same arrays, without a scheduler, requests or text."""

from collections.abc import Iterable, Iterator

from jpaged.device.runner import ModelRunner
from jpaged.host.batch import ShapeBuckets, build_batch
from jpaged.host.growth.base import Outcome
from jpaged.host.step import StepPlan
from jpaged.host.step_log import LoggedStep


def replay(
    steps: Iterable[LoggedStep], runner: ModelRunner, buckets: ShapeBuckets
) -> Iterator[tuple[StepPlan, Outcome]]:
    """Runs steps one after the other, and reads each.

    Args:
      steps: from the first that was recorded on, as pages hold what earlier steps wrote.
      runner: with a pool as large as that of the engine that recorded them.
      buckets: its shapes; the same ones give the same bits.

    Yields:
      Each step that computed something, and what it found.
    """
    for step in steps:
        plan = step.plan
        runner.swap(plan.swap_outs, plan.swap_ins)
        if plan.num_rows:
            (found,) = runner.run(build_batch(plan, step, buckets), plan.copies).outcomes()
            yield plan, found
