# SPDX-License-Identifier: Apache-2.0
"""How the sequences of one request grow: what a scheduler and a reader of results must know."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence

from jpaged.host.outputs import Completion


class Candidate(typing.NamedTuple):
    """A continuation of a sequence that a search found.

    Attributes:
      score: of the sequence with it.
      parent: which sequence of the request it continues.
      token_id: with which token.
      logprob: of the token under the model, where the score does not tell.
    """

    score: float
    parent: int
    token_id: int
    logprob: float | None = None


class Outcome(typing.NamedTuple):
    """What a step found.

    Attributes:
      tokens: one a sample.
      logprobs: of the tokens under the model; NaN where the logits were not finite.
      likeliest: per sample `{token_id: log-probability}`, likeliest first; None if nobody asked.
      candidates: per search its continuations, best first.
      scores: per scored token its log-probability, NaN where the logits were not finite, and
        `{token_id: log-probability}` of the likeliest ones.
      reported: by sample, what its token's log-probability is by a mode that is not raw.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]
    likeliest: Sequence[Mapping[int, float]] | None
    candidates: Sequence[Sequence[Candidate]]
    scores: Sequence[tuple[float, Mapping[int, float]]] = ()
    reported: Mapping[int, float] = types.MappingProxyType({})


class Selection(typing.NamedTuple):
    """What a request wants of its samples together; see `step.Search`."""

    scores: tuple[float, ...]
    width: int
    num_candidates: int


class Chooser(typing.Protocol):
    """Chooses which sequences of a request go on, by what a step finds for all of them together."""

    def selection(self) -> Selection:
        """What is wanted of the samples."""
        ...

    def accept(
        self,
        candidates: Sequence[Candidate],
        likeliest: Sequence[Mapping[int, float]] | None,
    ) -> list[int]:
        """Takes what a step found.

        Args:
          candidates: what `selection` asked for, best first; fewer if there are no more.
          likeliest: of each sequence, as in `Outcome`.

        Returns:
          For each sequence from now on, which of those before it continues; none if it has ended.
        """
        ...

    def tokens(self, index: int) -> Sequence[int]:
        """Prompt and generated tokens of a sequence, as `accept` has numbered them."""
        ...

    def fail(self, error: str) -> None:
        """Ends it, as it cannot go on."""
        ...


class Growth(typing.Protocol):
    """How the sequences of one request grow, from one that is its prompt.

    Attributes:
      max_sequences: how many it may have at once.
      reserved_places: places that it takes from its first sequence's start on, so that it never
        waits for one; 0 takes a place as each starts.
      waits_for_host: whether nothing more of it is planned until the host has read the step before,
        which also says whether it ends.
    """

    max_sequences: int
    reserved_places: int
    waits_for_host: bool

    @property
    def chooser(self) -> Chooser | None:
        """Who says which sequences go on; None lets each go on with the token drawn for it."""
        ...

    @property
    def num_rows(self) -> int:
        """Sequences whose newest tokens are computed in one step, all or none."""
        ...

    def expects(self, num_sequences: int) -> bool:
        """Whether more is to come for a request that has so many sequences, all of them ended."""
        ...

    def best(self, count: int, *, finished: bool) -> list[Completion] | None:
        """The best answers, best first, without text; None where the sequences are the answers.

        Args:
          count: how many at most, one more with an error aside.
          finished: whether nothing more will come; before, only what has ended is an answer.
        """
        ...
