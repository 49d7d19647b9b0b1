# SPDX-License-Identifier: Apache-2.0
"""What a request gives back."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from jpaged.host import sequence
from jpaged.host.beam import Hypothesis, path
from jpaged.host.sequence import Request


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sample.

    Attributes:
      text: what the tokens say, a stop string cut off; "" for a model without a tokenizer.
      token_ids: the generated tokens, one that ended the sample included.
      cumulative_logprob: sum of the tokens' log-probabilities under the model, before temperature
        and filters.
      logprobs: per token, `{token_id: log-probability}` of the chosen token and of the likeliest
        ones; None unless asked for.
      finish_reason: "stop", "length", "abort" or "error"; None while it grows.
      score: of a beam, what it is ranked by; None for a sample.
      error: what went wrong and where to look, with the finish_reason "error"; else None.
    """

    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[dict[int, float]] | None
    finish_reason: str | None
    score: float | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A request as far as it has come.

    Attributes:
      request_id: as given or returned by `add_request`.
      prompt_token_ids: the prompt as the model saw it.
      outputs: the samples, in order; of best_of or beam_width, the n best, best first. A search
        that failed has one more, with the error, if n beams had ended; one that was aborted before
        it began has an empty one.
      finished: whether this is the last output of the request. `GenerationInterrupted` has some
        that are not: those of prompts whose answers it cut off.
      time_to_first_token_s: seconds from arrival to the first sampled token; None before it.
      latency_s: seconds from arrival until now, or until the end.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[Completion]
    finished: bool
    time_to_first_token_s: float | None
    latency_s: float


# By request id, of each request the newest output that its owner did not take yet.
Mailbox: TypeAlias = dict[str, RequestOutput]


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during `generate`; carries what was produced until then.

    Attributes:
      outputs: one a prompt, in order; unfinished samples have the finish_reason "abort", and the
        outputs with such samples are not `finished`.
    """

    def __init__(self, outputs: Sequence[RequestOutput]):
        super().__init__("interrupted")
        self.outputs = list(outputs)


def output_of(
    request: Request, decode: Callable[[list[int]], str], *, finished: bool
) -> RequestOutput:
    """Freezes a request as far as it has come.

    Args:
      request: what to report.
      decode: gives the text of a beam's tokens.
      finished: whether nothing more will come; before, all samples are reported, and those beams
        only that have ended.
    """
    first, params = request.first_token_s, request.params
    if request.beam_search is not None:
        search = request.beam_search
        best = search.best(params.n) if finished else search.finished[: params.n]
        outputs = [_beam_completion(hypothesis, request, decode) for hypothesis in best]
        if finished and search.error and all(beam.error is None for beam in outputs):
            outputs.append(Completion("", [], 0.0, None, "error", error=search.error))
        if finished and not outputs:
            outputs.append(Completion("", [], 0.0, None, "abort"))
    else:
        samples = request.sequences
        if finished and params.num_samples > params.n:
            samples = sorted(samples, key=_rank, reverse=True)[: params.n]
        outputs = [_sample_completion(sample) for sample in samples]
    return RequestOutput(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        outputs=outputs,
        finished=finished,
        time_to_first_token_s=None if first is None else first - request.arrival_s,
        latency_s=time.perf_counter() - request.arrival_s,
    )


def _sample_completion(sample: sequence.Sequence) -> Completion:
    wants_logprobs = sample.request.params.logprobs is not None
    token_ids = sample.generated_token_ids
    return Completion(
        text=sample.text,
        token_ids=token_ids,
        cumulative_logprob=sample.cumulative_logprob,
        # Where a step was interrupted, there may be those of one token more.
        logprobs=sample.logprobs[: len(token_ids)] if wants_logprobs else None,
        finish_reason=sample.finish_reason,
        error=sample.error,
    )


def _rank(sample: sequence.Sequence) -> tuple[bool, float]:
    """What the best samples are chosen by: no error, then the mean log-probability."""
    mean = sample.cumulative_logprob / max(len(sample.generated_token_ids), 1)
    return sample.error is None, mean


def _beam_completion(
    hypothesis: Hypothesis, request: Request, decode: Callable[[list[int]], str]
) -> Completion:
    assert request.beam_search is not None
    nodes = path(hypothesis.node)
    token_ids = [node.token_id for node in nodes]
    return Completion(
        text=decode(token_ids),
        token_ids=token_ids,
        cumulative_logprob=hypothesis.node.cumulative_logprob,
        logprobs=None if request.params.logprobs is None else [n.logprobs or {} for n in nodes],
        finish_reason=hypothesis.finish_reason,
        score=hypothesis.score,
        error=request.beam_search.error if hypothesis.finish_reason == "error" else None,
    )
