# SPDX-License-Identifier: Apache-2.0
"""Tokens that are given, not drawn, and whose log-probabilities are wanted."""

import math
from collections.abc import Mapping, Sequence


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
      is_finite: whether all that is known are numbers; else the request fails when it draws.
    """

    def __init__(self, token_ids: Sequence[int], first: int, num_likeliest: int):
        """Wants all tokens behind position `first`."""
        self.token_ids = list(token_ids)
        self.first = first
        self.num_likeliest = num_likeliest
        self.found: list[dict[int, float] | None] = [None] * len(self.token_ids)
        self.is_finite = True
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
        self.is_finite = self.is_finite and math.isfinite(logprob)
        token = self.token_ids[position + 1]
        kept = dict(list(likeliest.items())[: self.num_likeliest])
        self.found[position + 1] = {token: logprob, **kept}
