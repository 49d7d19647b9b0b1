# SPDX-License-Identifier: Apache-2.0
"""Tokens that are given, not drawn, and whose log-probabilities are wanted."""

import itertools
import typing
from collections.abc import Mapping, Sequence

import numpy as np

from jpaged.host.step import StepPlan


class ScoredTokens:
    """What a request wants to know of tokens that it was given: teacher forcing.

    Position `p` of the model's output predicts token `p + 1`; a scored position is one that
    predicts a token that is wanted.

    Attributes:
      token_ids: the prompt, and maybe one token behind it, which is known and not drawn.
      first: the first scored position.
      num_likeliest: likeliest tokens to report beside each.
      found: per token of `token_ids`, `{token_id: log-probability}` of it and of the likeliest
        ones, likeliest first but for the token itself; None where it is not wanted, or not known
        yet.
    """

    def __init__(self, token_ids: Sequence[int], first: int, num_likeliest: int):
        """Wants all tokens behind position `first`."""
        self.token_ids = list(token_ids)
        self.first = first
        self.num_likeliest = num_likeliest
        self.found: list[dict[int, float] | None] = [None] * len(self.token_ids)
        self._next = first

    @property
    def next_position(self) -> int:
        """The first scored position that is not known yet; behind the last if all are."""
        last = len(self.token_ids) - 1
        while self._next < last and self.found[self._next + 1] is not None:
            self._next += 1
        return self._next

    def positions(self, start: int, end: int) -> range:
        """Of some positions, those that are still to be scored."""
        return range(max(start, self.next_position), min(end, len(self.token_ids) - 1))

    def fitting(self, start: int, lacking: int, most: int, room: int) -> int:
        """How many tokens a row computes, as each scored position takes the place of a sample.

        Args:
          start: position of the first.
          lacking: tokens up to the last that is known, after which one is drawn in any case.
          most: tokens at most.
          room: places of samples beside that of the sequence itself.

        Returns:
          At least one.
        """
        count = min(lacking, most)
        # The place of the last position is that of the token that is drawn there.
        drawn = start + lacking - 1
        if count == lacking and len(self.positions(start, drawn)) <= room:
            return count
        count = min(count, max(lacking - 1, 1))
        scored = self.positions(start, start + count)
        return min(count, scored.start - start + room + 1) if scored else count

    def take(self, position: int, logprob: float, likeliest: Mapping[int, float]) -> None:
        """Notes what a position predicts."""
        token = self.token_ids[position + 1]
        kept = dict(list(likeliest.items())[: self.num_likeliest])
        self.found[position + 1] = {token: logprob, **kept}


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
