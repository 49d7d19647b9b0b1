# SPDX-License-Identifier: Apache-2.0
"""Beam search on the host: which beams go on, which have ended, and when to stop.

The semantics are those of `transformers.GenerationMixin._beam_search` (5.x) without sampling, for
one prompt; what a device computes for it is `jpaged.sampling.beam_candidates`.
"""

from __future__ import annotations

import bisect
import dataclasses
import typing
from collections.abc import Collection, Sequence

from jpaged import sequence
from jpaged.page_table import PageTable
from jpaged.params import SamplingParams


class Candidate(typing.NamedTuple):
    """A continuation of a beam.

    Attributes:
      score: of the beam with it.
      beam: which it continues.
      token_id: with which token.
      logprob: of the token under the model, where the score does not tell.
    """

    score: float
    beam: int
    token_id: int
    logprob: float | None = None


class Node:
    """A token of a beam, and what came before it; beams with a common past share its nodes.

    Attributes:
      parent: the token before; None for the first generated one.
      token_id: the token.
      length: generated tokens up to and including this one.
      cumulative_logprob: sum of the log-probabilities of these under the model.
      logprobs: `{token_id: log-probability}` at its position, where the request wants them.
    """

    __slots__ = ("cumulative_logprob", "length", "logprobs", "parent", "token_id")

    def __init__(
        self,
        parent: Node | None,
        token_id: int,
        cumulative_logprob: float,
        logprobs: dict[int, float] | None = None,
    ):
        self.parent = parent
        self.token_id = token_id
        self.cumulative_logprob = cumulative_logprob
        self.length = 1 if parent is None else parent.length + 1
        self.logprobs = logprobs


def path(node: Node | None, count: int | None = None) -> list[Node]:
    """The last `count` nodes up to `node`, or all of them, oldest first."""
    nodes = []
    while node is not None and (count is None or len(nodes) < count):
        nodes.append(node)
        node = node.parent
    return nodes[::-1]


class Beam(sequence.Sequence):
    """A sequence whose generated tokens are nodes; see `Sequence`.

    Attributes:
      node: the last token; None before the first generated one.
    """

    __slots__ = ("node",)

    def __init__(self, request: sequence.Request, sample_index: int, max_total_tokens: int):
        super().__init__(request, sample_index, max_total_tokens)
        self.token_ids = request.prompt_token_ids
        self.node: Node | None = None

    @property
    def num_known_tokens(self) -> int:
        """Tokens of the sequence that the host knows."""
        return self.num_prompt_tokens + (self.node.length if self.node else 0)

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence, one that only the device knows included."""
        return self.num_known_tokens + self.num_inflight_tokens

    def tokens(self, start: int, end: int) -> list[int]:
        """The tokens of positions `[start, end)`, all of which the host knows."""
        prompt = self.token_ids[start:end]
        first = max(start, self.num_prompt_tokens)
        if end <= first:
            return prompt
        generated = path(self.node, self.num_known_tokens - first)
        return prompt + [node.token_id for node in generated[: end - first]]


def start_search(request: sequence.Request, eos_token_ids: Collection[int]) -> None:
    """Has a request that wants beams begin with one: its prompt.

    Args:
      request: as it was made.
      eos_token_ids: the model's end-of-sequence tokens.
    """
    new_tokens = request.max_total_tokens - len(request.prompt_token_ids)
    request.beam_search = BeamSearch(request.params, new_tokens, eos_token_ids)
    request.sequences[:] = [Beam(request, 0, request.max_total_tokens)]


def continue_beams(
    table: PageTable, request: sequence.Request, parents: Sequence[int]
) -> list[sequence.Sequence]:
    """Gives beams the pages of those that they continue; forks and frees, copies nothing.

    Args:
      table: where beams have pages, unless they wait.
      request: with the beams before, as its sequences.
      parents: see `BeamSearch.advance`, which has run.

    Returns:
      The beams from now on; the first ones are the same objects as before. The others of before
      hold nothing.
    """
    search, before = request.beam_search, list(request.sequences)
    assert search is not None
    states = [(b.table_id, b.num_computed_tokens, b.num_addressed_pages) for b in before]
    after, continued = before[: len(parents)], set[int]()
    while len(after) < len(parents):
        after.append(Beam(request, len(after), request.max_total_tokens))
    for beam, parent, node in zip(after, parents, search.nodes, strict=True):
        table_id, computed, addressed = states[parent]
        if parent in continued and table_id is not None:
            table_id = table.fork(table_id)
        continued.add(parent)
        assert isinstance(beam, Beam)
        beam.node = node
        beam.table_id, beam.num_computed_tokens = table_id, computed
        beam.num_addressed_pages, beam.num_inflight_tokens = addressed, 0
    for parent, (table_id, *_) in enumerate(states):
        if parent not in continued and table_id is not None:
            table.free(table_id)
    for beam in before[len(parents) :]:
        beam.table_id = None
    return after


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A beam that has ended.

    Attributes:
      score: sum of what its tokens were chosen by, which is their log-probabilities unless
        processors changed them, divided by the length to the power of the length penalty.
      node: its last token.
      finish_reason: "stop", "length", "abort" or "error".
    """

    score: float
    node: Node
    finish_reason: str


class BeamSearch:
    """The beams of one request, between steps.

    Attributes:
      width: beams that run at most, and hypotheses that are kept at most.
      num_candidates: how many continuations a step must offer.
      nodes: last tokens of the running beams, in order of score; `[None]` for the prompt.
      scores: sums of the log-probabilities that their tokens were chosen by.
      finished: hypotheses, best first.
      running: whether there is something to go on with.
      error: what went wrong, where that ended the search.
    """

    def __init__(self, params: SamplingParams, max_new_tokens: int, eos_token_ids: Collection[int]):
        """Starts from the prompt.

        Args:
          params: with a beam_width, resolved.
          max_new_tokens: length at which every beam ends.
          eos_token_ids: the model's own; ignored where the parameters say so.
        """
        assert params.beam_width is not None and params.length_penalty is not None
        self.width = params.beam_width
        self._length_penalty = params.length_penalty
        self._early_stopping = params.early_stopping
        self._max_new_tokens = max_new_tokens
        self._stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        # So many that enough are left when every stop token of every beam is among the best.
        self.num_candidates = max(2, 1 + len(self._stops)) * self.width
        self.nodes: list[Node | None] = [None]
        self.scores = [0.0]
        self.finished: list[Hypothesis] = []
        self.running = True
        self.error: str | None = None
        self._cut_off: list[Hypothesis] = []

    def advance(
        self,
        candidates: Sequence[Candidate],
        logprobs: Sequence[dict[int, float]] | None = None,
    ) -> list[int]:
        """Takes a step's best continuations, and says which beams they continue.

        Args:
          candidates: best first: the best `num_candidates` of all continuations of the running
            beams, or all if there are fewer.
          logprobs: per running beam, the likeliest tokens to report; None if none are wanted.

        Returns:
          For each beam that runs now, the one before that it continues; none if the search ended.
        """
        length = 1 + (self.nodes[0].length if self.nodes[0] else 0)
        ended: list[Hypothesis] = []
        parents, nodes, scores = [], [], []
        for place, candidate in enumerate(candidates):
            score, parent, token, _ = candidate
            stops = token in self._stops
            if not stops and length < self._max_new_tokens:
                if len(nodes) == self.width:
                    continue
                parents.append(parent)
                scores.append(score)
                nodes.append(self._node(candidate, logprobs))
            elif place < self.width:
                # One that is not among the best `width` is dropped: it was a reserve.
                ended.append(
                    Hypothesis(
                        score / length**self._length_penalty,
                        self._node(candidate, logprobs),
                        "stop" if stops else "length",
                    )
                )
        if not (self._is_full and self._early_stopping is True):
            for hypothesis in ended:
                self._keep(hypothesis)
        self.nodes, self.scores = nodes, scores
        self.running = bool(nodes) and self._may_improve(length)
        if not self.running:
            self.nodes, self.scores, parents = [], [], []
        return parents

    def fail(self, error: str) -> None:
        """Ends the search, as it cannot go on; the beams that ran count as cut off by the error."""
        self.error = error
        self._cut_off = self._running("error")
        self.nodes, self.scores, self.running = [], [], False

    def best(self, count: int) -> list[Hypothesis]:
        """The best hypotheses; beams fill up what is lacking that an error or an abort cut off."""
        return [*self.finished, *self._cut_off, *self._running("abort")][:count]

    def _running(self, finish_reason: str) -> list[Hypothesis]:
        return [
            Hypothesis(score / node.length**self._length_penalty, node, finish_reason)
            # Of a search that was interrupted, there may be one more of the ones.
            for node, score in zip(self.nodes, self.scores, strict=False)
            if node is not None
        ]

    @property
    def _is_full(self) -> bool:
        return len(self.finished) == self.width

    def _keep(self, hypothesis: Hypothesis) -> None:
        # After equals: what was found first stays.
        bisect.insort_right(self.finished, hypothesis, key=lambda h: -h.score)
        del self.finished[self.width :]

    def _may_improve(self, length: int) -> bool:
        """Whether to go on, with beams of this length."""
        if not self._is_full:
            return True
        if self._early_stopping is True:
            return False
        # A guess, except with a penalty of 0: longer beams may still do better than this.
        reach = length
        if self._early_stopping == "never" and self._length_penalty > 0:
            reach = self._max_new_tokens
        return self.scores[0] / reach**self._length_penalty > self.finished[-1].score

    def _node(self, candidate: Candidate, logprobs: Sequence[dict[int, float]] | None) -> Node:
        score, beam, token, logprob = candidate
        parent = self.nodes[beam]
        total = score
        if logprob is None:
            logprob = score - self.scores[beam]
        else:
            total = (parent.cumulative_logprob if parent else 0.0) + logprob
        own = None if logprobs is None else {token: logprob} | logprobs[beam]
        return Node(parent, token, total, own)
