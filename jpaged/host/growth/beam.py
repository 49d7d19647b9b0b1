# SPDX-License-Identifier: Apache-2.0
"""Beam search on the host: which beams go on, which have ended, and when to stop.

The semantics are those of `transformers.GenerationMixin._beam_search` (5.x) without sampling, for
one prompt; what a device computes for it is `jpaged.device.sampling.beam_candidates`.
"""

from __future__ import annotations

import bisect
import collections.abc
import dataclasses
import itertools
import typing
from collections.abc import Collection, Mapping, Sequence

from jpaged.host.growth.base import Candidate, Selection
from jpaged.host.outputs import Completion
from jpaged.host.params import SamplingParams


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
    nodes: list[Node] = []
    while node is not None and (count is None or len(nodes) < count):
        nodes.append(node)
        node = node.parent
    return nodes[::-1]


class BeamTokens(collections.abc.Sequence[int]):
    """Prompt and generated tokens of a beam, the latter as nodes; never changes."""

    __slots__ = ("_node", "_prompt")

    def __init__(self, prompt: list[int], node: Node | None):
        self._prompt, self._node = prompt, node

    def __len__(self) -> int:
        return len(self._prompt) + (self._node.length if self._node else 0)

    @typing.overload
    def __getitem__(self, index: int) -> int: ...

    @typing.overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        """One token, or those of a slice without a step."""
        if not isinstance(index, slice):
            place = range(len(self))[index]
            return self[place : place + 1][0]
        start, end, step = index.indices(len(self))
        assert step == 1, "a beam's tokens are read in order"
        prompt = self._prompt[start:end]
        first = max(start, len(self._prompt))
        if end <= first:
            return prompt
        generated = path(self._node, len(self) - first)
        return prompt + [node.token_id for node in generated[: end - first]]


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
    """The beams of one request, between steps; see `base.Growth`.

    All of them are computed in one step, or none is, and only when the host knows where the step
    before has taken them.

    Attributes:
      width: beams that run at most, and hypotheses that are kept at most.
      num_candidates: how many continuations a step must offer.
      nodes: last tokens of the running beams, in order of score; `[None]` for the prompt.
      scores: sums of the log-probabilities that their tokens were chosen by.
      finished: hypotheses, best first.
      running: whether there is something to go on with.
      error: what went wrong, where that ended the search.
    """

    waits_for_host = True

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: list[int],
        max_new_tokens: int,
        eos_token_ids: Collection[int],
    ):
        """Starts from the prompt.

        Args:
          params: with a beam_width, resolved.
          prompt_token_ids: the prompt.
          max_new_tokens: length at which every beam ends.
          eos_token_ids: the model's own; ignored where the parameters say so.
        """
        assert params.beam_width is not None and params.length_penalty is not None
        self.width = self.max_sequences = self.reserved_places = params.beam_width
        self._length_penalty = params.length_penalty
        self._early_stopping = params.early_stopping
        self._wanted_logprobs = params.logprobs
        self._prompt = prompt_token_ids
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

    @property
    def chooser(self) -> BeamSearch:
        """The search."""
        return self

    @property
    def num_rows(self) -> int:
        """All beams that run."""
        return len(self.nodes)

    def expects(self, num_sequences: int) -> bool:
        """Whether the search goes on."""
        return self.running

    def selection(self) -> Selection:
        """The best continuations of the beams that run."""
        return Selection(tuple(self.scores), self.width, self.num_candidates)

    def tokens(self, index: int) -> BeamTokens:
        """Those of a beam."""
        return BeamTokens(self._prompt, self.nodes[index])

    def accept(
        self,
        candidates: Sequence[Candidate],
        likeliest: Sequence[Mapping[int, float]] | None = None,
    ) -> list[int]:
        """Takes a step's best continuations, and says which beams they continue.

        Args:
          candidates: best first: the best `num_candidates` of all continuations of the running
            beams, or all if there are fewer.
          likeliest: per running beam, the likeliest tokens; None if none are wanted.

        Returns:
          For each beam that runs now, the one before that it continues; none if the search ended.
        """
        logprobs = None
        if (wanted := self._wanted_logprobs) is not None:
            rows = likeliest or [dict[int, float]()] * len(self.nodes)
            logprobs = [dict(itertools.islice(row.items(), wanted)) for row in rows]
        length = 1 + (self.nodes[0].length if self.nodes[0] else 0)
        ended: list[Hypothesis] = []
        parents: list[int] = []
        nodes: list[Node | None] = []
        scores: list[float] = []
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

    def best(self, count: int, *, finished: bool) -> list[Completion]:
        """The best hypotheses; beams fill up what is lacking that an error or an abort cut off."""
        found = [*self.finished]
        if finished:
            found += [*self._cut_off, *self._running("abort")]
        beams = [self._completion(hypothesis) for hypothesis in found[:count]]
        if finished and self.error and all(beam.error is None for beam in beams):
            beams.append(Completion("", [], 0.0, None, "error", error=self.error))
        if finished and not beams:
            beams.append(Completion("", [], 0.0, None, "abort"))
        return beams

    def _completion(self, hypothesis: Hypothesis) -> Completion:
        nodes = path(hypothesis.node)
        return Completion(
            text="",
            token_ids=[node.token_id for node in nodes],
            cumulative_logprob=hypothesis.node.cumulative_logprob,
            logprobs=None if self._wanted_logprobs is None else [n.logprobs or {} for n in nodes],
            finish_reason=hypothesis.finish_reason,
            score=hypothesis.score,
            error=self.error if hypothesis.finish_reason == "error" else None,
        )

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
