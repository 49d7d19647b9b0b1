# SPDX-License-Identifier: Apache-2.0
"""Makes requests, and refuses those that could not be served, before anything has changed."""

import math
import secrets
from collections.abc import Sequence

import tokenizers

from jpaged.admission import SchedulerConfig, check_fits
from jpaged.beam import start_search
from jpaged.page_table import PageTable
from jpaged.params import SamplingParams
from jpaged.sequence import Request, fork_seed
from models.config import ModelConfig

Prompt = str | Sequence[int]


class RequestMaker:
    """Turns what a caller gives into requests."""

    def __init__(
        self,
        model_config: ModelConfig,
        tokenizer: tokenizers.Tokenizer | None,
        config: SchedulerConfig,
        table: PageTable,
    ):
        """Remembers what requests are held against."""
        self._model_config = model_config
        self._tokenizer = tokenizer
        self._config = config
        self._table = table

    def make(
        self, prompt: Prompt, params: SamplingParams, request_id: str, *, stream: bool
    ) -> Request:
        """Makes a request of a prompt.

        Raises:
          ValueError: if it could never be served.
        """
        self._check(params, request_id, stream)
        token_ids = self._encode(prompt, request_id)
        vocab_size = self._model_config.vocab_size
        if outside := [t for t in token_ids if not 0 <= t < vocab_size]:
            raise ValueError(
                f"request {request_id!r}: token id {outside[0]} is outside the vocabulary, "
                f"[0, {vocab_size})"
            )
        seed = params.seed if params.seed is not None else secrets.randbits(32)
        request = self._new(request_id, token_ids, params, seed, stream)
        check_fits(request, self._config, self._table)
        return request

    def fork(
        self,
        parent: Request,
        request_ids: list[str],
        params: SamplingParams | None,
        *,
        stream: bool,
    ) -> list[Request]:
        """Makes requests that know what another does; see `Engine.fork`.

        Raises:
          ValueError: if the request cannot be forked.
        """
        own = params or parent.params
        self._check(own, parent.request_id, stream)
        if parent.params.num_samples > 1 or parent.beam_search is not None:
            raise ValueError(
                f"request {parent.request_id!r} has several samples or beams: only a request with "
                "one can be forked"
            )
        if own.num_samples > 1 or own.beam_width is not None:
            raise ValueError("forks have one sample each: leave n, best_of and beam_width alone")
        if own.logprobs is not None and parent.params.logprobs is None:
            raise ValueError(
                f"logprobs={own.logprobs} cannot be given for the tokens before the fork: request "
                f"{parent.request_id!r} has none; give it logprobs too"
            )
        (source,) = parent.sequences
        if len(source.generated_token_ids) >= own.max_tokens:
            raise ValueError(
                f"max_tokens={own.max_tokens} must exceed the {len(source.generated_token_ids)} "
                f"tokens that request {parent.request_id!r} has generated"
            )
        seed = own.seed if params and own.seed is not None else parent.seed
        children: list[Request] = []
        for request_id in request_ids:
            own_seed = fork_seed(seed, parent.num_forks + len(children) + 1)
            child = self._new(request_id, parent.prompt_token_ids, own, own_seed, stream)
            check_fits(child, self._config, self._table)
            child.arrival_s, child.first_token_s = parent.arrival_s, parent.first_token_s
            child.sequences[0].continue_from(source)
            children.append(child)
        parent.num_forks += len(children)
        return children

    def _check(self, params: SamplingParams, request_id: str, stream: bool) -> None:
        """Refuses parameters that this model cannot serve."""
        vocab_size = self._model_config.vocab_size
        if params.best_of is not None and params.best_of > params.n and stream:
            raise ValueError(
                f"request {request_id!r}: which of best_of={params.best_of} samples are the best "
                "is known at the end only: stream n samples, or do not stream"
            )
        if params.stop and self._tokenizer is None:
            raise ValueError(
                f"request {request_id!r}: stop={params.stop!r} needs a tokenizer, which this model "
                "has not; use stop_token_ids"
            )
        if params.logprobs is not None and params.logprobs > vocab_size:
            raise ValueError(
                f"request {request_id!r}: logprobs={params.logprobs} exceeds the vocabulary of "
                f"{vocab_size}"
            )
        if params.beam_width is not None:
            try:
                reach = float(min(params.max_tokens, self._config.max_model_len))
                usable = 0 < reach**params.length_penalty < math.inf
            except OverflowError:
                usable = False
            if not usable:
                raise ValueError(
                    f"request {request_id!r}: length_penalty={params.length_penalty} makes scores "
                    f"of {params.max_tokens} tokens infinite or 0; bring it closer to 0"
                )

    def _new(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        seed: int,
        stream: bool,
    ) -> Request:
        request = Request(
            request_id,
            token_ids,
            params,
            seed=seed,
            max_model_len=self._config.max_model_len,
            stream=stream,
        )
        if params.beam_width is not None:
            start_search(request, self._model_config.eos_token_ids)
        return request

    def _encode(self, prompt: Prompt, request_id: str) -> list[int]:
        if not len(prompt):
            raise ValueError(
                f"request {request_id!r}: the prompt is empty; give at least one character or token"
            )
        if not isinstance(prompt, str):
            try:
                return [int(token) for token in prompt]
            except (TypeError, ValueError):
                raise ValueError(
                    f"request {request_id!r}: a prompt must be text or a list of token ids, not "
                    f"{prompt!r:.80}"
                ) from None
        if self._tokenizer is None:
            raise ValueError(
                f"request {request_id!r}: the model has no tokenizer.json, so its prompts must be "
                "lists of token ids"
            )
        token_ids = self._tokenizer.encode(prompt).ids
        if not token_ids:
            raise ValueError(f"request {request_id!r}: the prompt {prompt!r:.80} has no tokens")
        return token_ids
