# SPDX-License-Identifier: Apache-2.0
"""What a request gives back."""

import dataclasses
from collections.abc import Sequence


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
      prompt_logprobs: per token of the prompt, `{token_id: log-probability}` of it, under the model
        given those before, and of the likeliest ones; None for the first, which nothing predicts,
        and for what was not computed. None unless `SamplingParams.prompt_logprobs` asks for it.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[Completion]
    finished: bool
    time_to_first_token_s: float | None
    latency_s: float
    prompt_logprobs: list[dict[int, float] | None] | None = None


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during `generate`; carries what was produced until then.

    Attributes:
      outputs: one a prompt, in order; unfinished samples have the finish_reason "abort", and the
        outputs with such samples are not `finished`.
    """

    def __init__(self, outputs: Sequence[RequestOutput]):
        super().__init__("interrupted")
        self.outputs = list(outputs)
