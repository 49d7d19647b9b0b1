# SPDX-License-Identifier: Apache-2.0
"""The user's unit of work, and the scheduler's."""

from __future__ import annotations

import enum
import time
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf

import numpy as np

from jpaged.host.growth.base import Growth
from jpaged.host.growth.sampling import Sampling
from jpaged.host.logits_processors import LogitsProcessors, Processing
from jpaged.host.params import LogprobsMode, SamplingParams
from jpaged.host.scored import ScoredTokens
from jpaged.host.step import Draw
from jpaged.host.swap import SwappedGroup


class Status(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = enum.auto()  # holds no pages
    RUNNING = enum.auto()  # holds pages, is scheduled
    DRAINING = enum.auto()  # its last step is on the device; is not scheduled again
    FINISHED = enum.auto()


class Sequence:
    """One stream of tokens; the unit that is scheduled, preempted and finished.

    Attributes:
      request: whose sample this is.
      sample_index: which of the request's `n` samples.
      token_ids: prompt and generated tokens that the host knows: a list that grows, or what the
        request's growth says.
      draw: how its tokens are drawn.
      key: `(request_id, sample_index)`.
      num_prompt_tokens: how many of them are the prompt.
      num_computed_tokens: tokens whose keys and values are in pages, or are about to be by steps
        already scheduled.
      num_lost_tokens: how many were when it was preempted, to be computed again; 0 once it runs.
      num_inflight_tokens: tokens sampled on the device, or about to be, and not read yet: those of
        steps that run and of steps that wait.
      sample_slot: where the newest of them stands among its step's samples.
      max_total_tokens: prompt and generated tokens at which the sequence ends by length.
      table_id: the sequence's key in the `PageTable`, or None while it holds no pages.
      swapped: what was swapped to host memory with it, or None.
      num_addressed_pages: how many of its first pages are those of the `PrefixCache`.
      num_pending_forks: samples still to be forked off when the prompt has been computed.
      status: see `Status`.
      finish_reason: "stop", "length", "abort" or "error" once finished.
      error: what went wrong, where that ended it.
      cumulative_logprob: sum over the generated tokens that the host knows.
      logprobs: per generated token, `{token_id: logprob}`, where the request wants them.
      text: what the tokens say, as far as it is certain.
    """

    __slots__ = (
        "cumulative_logprob",
        "draw",
        "error",
        "finish_reason",
        "key",
        "logprobs",
        "max_total_tokens",
        "num_addressed_pages",
        "num_computed_tokens",
        "num_inflight_tokens",
        "num_lost_tokens",
        "num_pending_forks",
        "num_prompt_tokens",
        "request",
        "sample_index",
        "sample_slot",
        "status",
        "swapped",
        "table_id",
        "text",
        "token_ids",
    )

    def __init__(self, request: Request, sample_index: int, max_total_tokens: int):
        self.request = request
        self.sample_index = sample_index
        self.token_ids: SequenceOf[int] = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_inflight_tokens = 0
        self.num_lost_tokens = 0
        self.sample_slot = 0
        self.max_total_tokens = max_total_tokens
        self.draw = _draw_of(request, sample_index)
        self.key = request.request_id, sample_index
        self.table_id: int | None = None
        self.swapped: SwappedGroup | None = None
        self.num_addressed_pages = 0
        self.num_pending_forks = 0
        self.status = Status.WAITING
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.cumulative_logprob = 0.0
        self.logprobs: list[dict[int, float]] = []
        self.text = ""

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Whose turn it is before others: the least. Of a request that has been added."""
        return *self.request.order, self.sample_index

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence, those that only the device knows included."""
        return len(self.token_ids) + self.num_inflight_tokens

    @property
    def num_known_tokens(self) -> int:
        """Tokens of the sequence that the host knows."""
        return len(self.token_ids)

    @property
    def generated_token_ids(self) -> list[int]:
        """Tokens after the prompt that the host knows."""
        return list(self.token_ids[self.num_prompt_tokens :])

    def processing(self) -> Processing | None:
        """What is done to the logits that its next token is chosen from; None if nothing is."""
        processors = self.request.processors
        assert processors is not None, "nothing is asked for"
        num_generated = self.num_computed_tokens - self.num_prompt_tokens
        return processors.processing(
            self.sample_index, self.token_ids, self.num_prompt_tokens, num_generated
        )

    def receive(self, token_id: int, logprob: float) -> None:
        """Adds the oldest token that was in flight."""
        self.num_inflight_tokens -= 1
        self.cumulative_logprob += logprob
        assert isinstance(self.token_ids, list)
        # The last thing: an interrupt strikes when all is done, or nothing.
        self.token_ids.append(token_id)

    def continue_from(self, other: Sequence) -> None:
        """Takes over what the host knows of another sequence with the same prompt."""
        self.token_ids = list(other.token_ids)
        self.cumulative_logprob = other.cumulative_logprob
        self.logprobs = list(other.logprobs)
        self.text = other.text

    def stop_reason(self, eos_token_ids: Collection[int]) -> str | None:
        """Why the newest token ends the sequence, "stop" or "length"; None if it does not."""
        token_id, params = self.token_ids[-1], self.request.params
        if token_id in params.stop_token_ids:
            return "stop"
        if token_id in eos_token_ids and not params.ignore_eos:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_total_tokens else None

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id!r}#{self.sample_index}, {self.status.name}, "
            f"{self.num_computed_tokens}/{self.num_tokens} tokens computed)"
        )


class Request:
    """A prompt, its parameters and the samples that grow from it.

    Attributes:
      request_id: unique among live requests.
      cache_salt: see `Engine.add_request`.
      cache_root: where its prefixes begin in the `PrefixCache`, or None if it does not use it.
      prompt_token_ids: at least one token.
      params: how to sample and when to stop, with no default left to resolve.
      seed: the seed in use, `params.seed` or a drawn one.
      stream: whether every step that adds to a sample reports it.
      growth: how it grows from its prompt.
      is_single: whether it has one sequence, which goes on by itself.
      sequences: what has grown, in order of `sample_index`; later ones appear when they fork.
      processors: what changes its logits before a token is chosen, or None.
      scored: given tokens whose log-probabilities it wants, or None.
      num_forks: requests that were forked from it so far.
      order: its priority, the age of what it was forked from, and its own; the scheduler sets it.
      arrival_s, first_token_s: `time.perf_counter()` readings; the second is None before it.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        seed: int,
        max_model_len: int,
        stream: bool = False,
        cache_salt: str | None = None,
        growth: Growth | None = None,
    ):
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.seed = seed
        self.stream = stream
        self.cache_salt = cache_salt
        self.arrival_s = time.perf_counter()
        self.first_token_s: float | None = None
        self.cache_root: int | None = None
        self.growth: Growth = growth or Sampling(params.num_samples)
        self.is_single = self.growth.max_sequences == 1 and not self.growth.waits_for_host
        self.processors: LogitsProcessors | None = None
        self.scored: ScoredTokens | None = None
        self.num_forks = 0
        self.order: tuple[int, int, int] = (params.priority, 0, 0)
        assert params.max_tokens is not None, "not resolved"
        self.max_total_tokens = min(len(prompt_token_ids) + params.max_tokens, max_model_len)
        first = Sequence(self, 0, self.max_total_tokens)
        first.num_pending_forks = params.num_samples - 1
        self.sequences = [first]

    @property
    def finished(self) -> bool:
        """Whether every one of its sequences has ended, and no more are to come."""
        return all(seq.status is Status.FINISHED for seq in self.sequences) and (
            not self.growth.expects(len(self.sequences))
        )

    def fork_sequence(self, parent: Sequence) -> Sequence:
        """Returns the next sample, with all that `parent` has computed but its pages."""
        child = Sequence(self, len(self.sequences), parent.max_total_tokens)
        child.num_computed_tokens = parent.num_computed_tokens
        child.num_addressed_pages = parent.num_addressed_pages
        self.sequences.append(child)
        return child


def _draw_of(request: Request, sample_index: int) -> Draw:
    params = request.params
    assert params.temperature is not None and params.top_k is not None, "not resolved"
    assert params.top_p is not None and params.min_p is not None, "not resolved"
    return Draw(
        # What is not used is greedy, which costs least.
        params.temperature if request.growth.chooser is None else 0.0,
        params.top_k,
        params.top_p,
        params.min_p,
        request.seed,
        sample_index,
        params.logprobs or 0,
        LogprobsMode.RAW.value if params.logprobs is None else params.logprobs_mode,
    )


def fork_seed(seed: int, index: int) -> int:
    """The seed of a request's `index`-th fork: another one for each, the same in every run."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
