# SPDX-License-Identifier: Apache-2.0
"""What is added to the logits of single tokens: always, after certain tokens, or as they repeat.

Few tokens have such a thing, so it goes to the device as lists of tokens and numbers, padded to one
of a few widths. What depends on the newest token, which only the device may know, is decided there
in any case: a sum is then made in the same order whether the host knows it or not.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

_FIRST_WIDTH = 32
_GROWTH = 8


class BiasEntries(typing.NamedTuple):
    """What is added to logits.

    Of one token, at most one entry holds always, and at most one after any newest token: that one
    replaces the other, which it has in it.

    Attributes:
      tokens: i32[entries], to whose logits.
      after: i32[entries], the newest token after which it holds; -1 is any.
      values: f32[entries]; -inf for a token that cannot be chosen.
    """

    tokens: np.ndarray
    after: np.ndarray
    values: np.ndarray


class CountEntries(typing.NamedTuple):
    """How often tokens were generated: i32[entries] each, no token twice."""

    tokens: np.ndarray
    counts: np.ndarray


class _Completion(typing.NamedTuple):
    """The last two tokens of a sequence, and what is added to the last after what is before."""

    rank: int
    after: int
    token: int
    value: np.float32


class TokenBiases:
    """Biases of tokens, and of tokens that would complete a sequence; -inf forbids.

    Sums are transformers' (`SequenceBiasLogitsProcessor`), in float32 and in its order: first that
    of the token itself, then those of sequences by their lengths, in the order in which a length
    comes up first.
    """

    def __init__(
        self,
        logit_bias: Iterable[tuple[int, float]],
        sequence_bias: Mapping[tuple[int, ...], float],
        bad_words: Iterable[tuple[int, ...]],
    ):
        """Sorts them by what must be there for them to hold.

        Args:
          logit_bias: of tokens.
          sequence_bias: of sequences of one token or more; comes on top.
          bad_words: sequences of two tokens or more that are not completed.
        """
        self._always: dict[int, np.float32] = {t: np.float32(v) for t, v in logit_bias}
        self._pairs: list[_Completion] = []
        # By all that comes before the last two tokens.
        self._longer: dict[tuple[int, ...], list[_Completion]] = {}
        ranks: dict[int, int] = {}
        forbidden = dict.fromkeys(bad_words, -np.inf)
        for ids, value in (*sequence_bias.items(), *forbidden.items()):
            value, token = np.float32(value), ids[-1]
            if len(ids) == 1:
                self._always[token] = self._always.get(token, np.float32(0)) + value
                continue
            rank = ranks.setdefault(len(ids), len(ranks))
            completion = _Completion(rank, ids[-2], token, value)
            group = self._longer.setdefault(ids[:-2], []) if ids[:-2] else self._pairs
            group.append(completion)
        self._lengths = sorted({len(before) for before in self._longer})
        self._usual = self._entries([])
        self.max_entries = len(self._usual.tokens) + sum(map(len, self._longer.values()))

    @property
    def num_tokens_before(self) -> int:
        """How many tokens before the newest one decide what holds."""
        return self._lengths[-1] if self._lengths else 0

    def entries(self, before: Sequence[int]) -> BiasEntries:
        """What is added where these tokens come before the newest one."""
        found = [
            completion
            for length in self._lengths
            if length <= len(before)
            for completion in self._longer.get(tuple(before[-length:]), ())
        ]
        return self._entries(found) if found else self._usual

    def _entries(self, found: Sequence[_Completion]) -> BiasEntries:
        totals = {(-1, token): value for token, value in self._always.items()}
        for _, after, token, value in sorted([*self._pairs, *found], key=lambda c: c.rank):
            own = self._always.get(token, np.float32(0))
            totals[after, token] = totals.get((after, token), own) + value
        keys = np.array(list(totals), np.int32).reshape(-1, 2)
        return BiasEntries(keys[:, 1], keys[:, 0], np.array(list(totals.values()), np.float32))


class TokenCounts:
    """How often each token of a list that only grows is in it."""

    def __init__(self):
        self._num_counted = 0
        self._places: dict[int, int] = {}
        self._entries = np.zeros((2, _FIRST_WIDTH), np.int32)

    def entries(self, token_ids: Sequence[int], first: int) -> CountEntries:
        """Counts of the tokens from place `first` on, which is always the same."""
        for token in token_ids[first + self._num_counted :]:
            place = self._places.setdefault(token, len(self._places))
            if place == self._entries.shape[1]:
                self._entries = np.pad(self._entries, ((0, 0), (0, place)))
            self._entries[0, place] = token
            self._entries[1, place] += 1
        self._num_counted = len(token_ids) - first
        tokens, counts = self._entries[:, : len(self._places)].copy()
        return CountEntries(tokens, counts)


def padded_width(num_entries: int) -> int:
    """The width that lists of so many entries are padded to: one of few, so that programs are."""
    width = _FIRST_WIDTH if num_entries else 0
    while width < num_entries:
        width *= _GROWTH
    return width


def widths_up_to(num_entries: int) -> list[int]:
    """All widths that lists of so many entries, or fewer, are padded to."""
    widths = [0]
    while widths[-1] < num_entries:
        widths.append(padded_width(widths[-1] + 1))
    return widths
