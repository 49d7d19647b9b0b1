# SPDX-License-Identifier: Apache-2.0
"""How likely a model finds texts that are given: teacher forcing through pages."""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from jpaged.host.checks import shown
from jpaged.host.outputs import RequestOutput
from jpaged.host.sequence import Request
from jpaged.requests import Prompt, RequestMaker

# Makes requests, whose ids are given.
MakeRequests: TypeAlias = Callable[[RequestMaker, Iterator[str]], list[Request]]


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a completion is after its prompt, under the model as it is.

    Attributes:
      token_ids: the completion's tokens.
      logprobs: of each its log-probability, in nats, given the prompt and those before.
      is_greedy: whether each is the likeliest there, as greedy sampling would have chosen it.
    """

    token_ids: list[int]
    logprobs: list[float]
    is_greedy: bool

    @property
    def logprob(self) -> float:
        """Of the whole completion: the sum."""
        return sum(self.logprobs)


class ScoreMethods(abc.ABC):
    """Scores completions of one prompt, for who scores pairs."""

    @abc.abstractmethod
    def _answer(self, make: MakeRequests, *watched: Any) -> list[RequestOutput]:
        """Makes requests, and runs them until all have ended; see `Engine.generate`."""

    def score_all(
        self,
        pairs: Sequence[tuple[Prompt, Prompt]],
        *,
        progress: bool = False,
        on_step: Callable[[], object] = lambda: None,
        on_score: Callable[[int, Score], object] | None = None,
    ) -> list[Score]:
        """Scores completions, each of a prompt of its own; see `score`.

        Args:
          pairs: prompts and their completions: two texts, or two lists of token ids.
          progress: as in `Engine.generate`.
          on_step: likewise.
          on_score: called with a pair's index and its score, once, when it is known.

        Returns:
          The scores, in the order of the pairs.

        Raises:
          ValueError: if a pair cannot be served; then none has been started.
          RuntimeError: if the model gives what is no number; the message says where to look.
          GenerationInterrupted: on Ctrl-C.
        """
        starts: list[int] = []

        def make(maker: RequestMaker, request_ids: Iterator[str]) -> list[Request]:
            requests = _requests_of(pairs, maker, request_ids)
            starts.extend(own.scored.first + 1 for own in requests if own.scored is not None)
            return requests

        scores: dict[int, Score] = {}

        def on_output(index: int, output: RequestOutput) -> None:
            scores[index] = _score_of(output, starts[index])
            if on_score is not None:
                on_score(index, scores[index])

        self._answer(make, progress, on_step, on_output)
        return [scores[index] for index in range(len(starts))]

    def score(self, prompt: Prompt, completions: Sequence[Prompt]) -> list[Score]:
        """Scores completions of one prompt, whose pages they share.

        The prompt is computed once, up to its last full page, unless the prefix cache is off. What
        is scored is not drawn: temperature, filters, penalties and biases do not count.

        Args:
          prompt: text, or token ids. Of text, the tokens are those of prompt and completion
            together, as in lm-evaluation-harness: spaces at the prompt's end belong to what
            follows them.
          completions: likewise, at least one token each. With the prompt they may have one token
            more than max_model_len: the last is predicted, and nothing is computed of it.

        Returns:
          The scores, in the order of the completions.

        Raises:
          ValueError: if one cannot be served; then none has been started.
          RuntimeError: if the model gives what is no number.
        """
        if isinstance(completions, str | bytes) or not isinstance(completions, Sequence):
            raise ValueError(
                f"completions={shown(completions)} must be a list of completions, each a string or "
                "a list of token ids; if it is one, wrap it in [ ]"
            )
        return self.score_all([(prompt, completion) for completion in completions])


def _requests_of(
    pairs: Sequence[tuple[Prompt, Prompt]], maker: RequestMaker, request_ids: Iterator[str]
) -> list[Request]:
    """Makes a request of each pair; see `Engine.score_all`.

    Raises:
      ValueError: if one is no pair, or could never be served.
    """
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Sequence):
        raise ValueError(f"pairs={shown(pairs)} must be a list of prompts with their completions")
    requests = []
    for pair, request_id in zip(pairs, request_ids, strict=False):
        if isinstance(pair, str | bytes) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(
                f"request {request_id!r}: {shown(pair)} must be a prompt and its completion"
            )
        requests.append(maker.make_scored(*pair, request_id))
    return requests


def _score_of(output: RequestOutput, start: int) -> Score:
    """Reads the score of a completion that begins at token `start`.

    Raises:
      RuntimeError: if the request has failed.
    """
    found = output.prompt_logprobs
    assert found is not None, "nothing was scored"
    (completion,) = output.outputs
    if completion.finish_reason != "length":
        raise RuntimeError(f"request {output.request_id!r}: {completion.error or 'was aborted'}")
    known = [own for own in found[start:] if own is not None]
    assert len(known) == len(found) - start, "a token was not scored"
    tokens = [next(iter(own)) for own in known]
    logprobs = [own[token] for own, token in zip(known, tokens, strict=True)]
    return Score(tokens, logprobs, all(len(own) == 1 for own in known))
