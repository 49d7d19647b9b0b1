# SPDX-License-Identifier: Apache-2.0
"""The scores of a step as arrays, each at a place where samples have theirs."""

import itertools
import typing
from collections.abc import Sequence

import numpy as np

from jpaged.host.step import StepPlan


class ScoreBatch(typing.NamedTuple):
    """Given tokens whose log-probabilities are wanted.

    Attributes:
      targets: i32[num_rows], the token after each of `logits_indices`, or 0.
      slots: which of `logits_indices` are wanted, one a score.
    """

    targets: np.ndarray
    slots: Sequence[int] = ()


def score_slots(step: StepPlan) -> list[int]:
    """Where scores stand among what logits are wanted of: behind the samples, or where one is."""
    if not step.scores.rows:
        return []
    places = zip(step.samples.rows, step.samples.offsets, strict=True)
    drawn = {place: slot for slot, place in enumerate(places)}
    free = itertools.count(step.num_samples)
    scored = zip(step.scores.rows, step.scores.offsets, strict=True)
    return [drawn[place] if place in drawn else next(free) for place in scored]


def score_batch(step: StepPlan, slots: Sequence[int], num_rows: int) -> ScoreBatch | None:
    """The scores of a step as arrays, at the slots that `score_slots` gave them; None if none."""
    if not slots:
        return None
    targets = np.zeros(num_rows, np.int32)
    targets[list(slots)] = step.scores.targets
    return ScoreBatch(targets, slots)


def idle_scores(num_rows: int) -> ScoreBatch:
    """Of nothing, to compile with."""
    return ScoreBatch(np.zeros(num_rows, np.int32))
