# SPDX-License-Identifier: Apache-2.0
"""Makes requests, and refuses those that could not be served, before anything has changed."""

import dataclasses
import itertools
import math
import numbers
import secrets
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import psutil
import tokenizers

from jpaged.defaults import Defaults
from jpaged.host.admission import SchedulerConfig, check_fits, max_tokens_in
from jpaged.host.checks import Rule, at_least, checked, instance_of, integers, lone_surrogate, shown
from jpaged.host.continuation import resume_sequences
from jpaged.host.growth import growth_of
from jpaged.host.logits_processors import LogitsProcessors
from jpaged.host.outputs import Completion
from jpaged.host.page_table import PageTable
from jpaged.host.params import MAX_NUM_SAMPLES, SamplingParams
from jpaged.host.scored import ScoredTokens
from jpaged.host.sequence import Request, fork_seed
from jpaged.models.config import ModelConfig
from jpaged.text import encode

# Text, or token ids: a sequence of integers, or a NumPy array of one dimension.
Prompt = str | Sequence[int] | np.ndarray

# Of a sample's list of tokens on the host, at least.
_BYTES_PER_TOKEN = 8
_FORKS = (*at_least(1), Rule(f"at most {MAX_NUM_SAMPLES}", lambda k: k <= MAX_NUM_SAMPLES))


class RequestMaker:
    """Turns what a caller gives into requests."""

    def __init__(
        self,
        model_config: ModelConfig,
        tokenizer: tokenizers.Tokenizer | None,
        config: SchedulerConfig,
        table: PageTable,
        defaults: Defaults | None = None,
        check: Callable[[SamplingParams], None] | None = None,
    ):
        """Remembers what requests are held against: what the model asks for itself, and a check."""
        self._defaults = defaults or Defaults()
        self._model_config = model_config
        self._tokenizer = tokenizer
        self._config = config
        self._table = table
        self._check_more = check

    def make_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        request_ids: Iterator[str],
    ) -> list[Request]:
        """Makes a request of each prompt; see `Engine.generate`.

        Args:
          prompts: likewise.
          params: likewise.
          request_ids: as many as are needed.

        Raises:
          ValueError: if one could never be served.
        """
        one = isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence | np.ndarray)
        one = one or (isinstance(prompts, np.ndarray) and prompts.ndim != 2)
        if one or (len(prompts) and _is_number(prompts[0])):
            raise ValueError(
                f"prompts={shown(prompts)} must be a list of prompts, each a string or a list of "
                "token ids; if it is one prompt, wrap it in [ ]"
            )
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        elif isinstance(params, str) or not isinstance(params, Sequence):
            raise ValueError(f"params={shown(params)} must be SamplingParams, or a list of them")
        if len(params) != len(prompts):
            raise ValueError(
                f"{len(params)} SamplingParams do not pair with {len(prompts)} prompts"
            )
        return [
            self.make(prompt, own, request_id, stream=False)
            for prompt, own, request_id in zip(prompts, params, request_ids, strict=False)
        ]

    def make(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        stream: bool,
        cache_salt: str | None = None,
        resume: Sequence[Completion] = (),
        scored: ScoredTokens | None = None,
    ) -> Request:
        """Makes a request of a prompt; see `Engine.add_request`.

        Of one that draws nothing `scored` has all tokens, the prompt and one more.

        Raises:
          ValueError: if it could never be served.
        """
        request_id = checked("request_id", request_id, str)
        stream = checked("stream", stream, bool)
        cache_salt = checked("cache_salt", cache_salt, str | None)
        instance_of(f"request {request_id!r}: params", params, SamplingParams)
        token_ids = self._encode(prompt, request_id)
        params = self._resolved(params, len(token_ids), request_id)
        self._check(params, request_id, stream)
        vocab_size = self._model_config.vocab_size
        if outside := [t for t in token_ids if not 0 <= t < vocab_size]:
            raise ValueError(
                f"request {request_id!r}: token id {shown(outside[0])} is outside the vocabulary, "
                f"[0, {vocab_size})"
            )
        seed = params.seed if params.seed is not None else secrets.randbits(32)
        # The last token of a score is known: it is not computed, and needs no place.
        most = self._config.max_model_len + (scored is not None)
        request = self._new(request_id, token_ids, params, seed, stream, cache_salt, most)
        if scored is not None:
            request.scored = scored
        check_fits(request, self._config, self._table)
        _check_host_memory(request)
        if isinstance(resume, str) or not isinstance(resume, Sequence):
            raise ValueError(
                f"request {request_id!r}: resume={shown(resume)} must be a list of Completion"
            )
        resume_sequences(request, resume, vocab_size)
        return request

    def make_scored(self, prompt: Prompt, completion: Prompt, request_id: str) -> Request:
        """Makes a request that scores a completion; see `scoring.ScoreMethods.score`.

        Args:
          prompt: likewise.
          completion: likewise.
          request_id: for messages, too.

        Raises:
          ValueError: if it could never be served.
        """
        token_ids, first = self._encode_pair(prompt, completion, request_id)
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, prompt_logprobs=1)
        # The likeliest says whether greedy sampling had chosen the same.
        scored = ScoredTokens(token_ids, first - 1, 1)
        request = self.make(token_ids[:-1], params, request_id, stream=False, scored=scored)
        vocab_size = self._model_config.vocab_size
        if not 0 <= token_ids[-1] < vocab_size:
            raise ValueError(
                f"request {request_id!r}: token id {shown(token_ids[-1])} is outside the "
                f"vocabulary, [0, {vocab_size})"
            )
        request.processors = None  # a penalty of the model's own settings changes no score
        return request

    def _encode_pair(
        self, prompt: Prompt, completion: Prompt, request_id: str
    ) -> tuple[list[int], int]:
        """The tokens of a prompt and its completion; which of them is the completion's first."""
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError(
                f"request {request_id!r}: prompt={shown(prompt)} and "
                f"completion={shown(completion)} must be two strings or two lists of token ids"
            )
        if not isinstance(prompt, str):
            before = self._encode(prompt, request_id)
            return [*before, *self._encode(completion, request_id, "completion")], len(before)
        assert isinstance(completion, str)
        # Spaces belong to the word that follows them, as the tokenizer has learned them.
        kept = prompt.rstrip() or prompt
        completion = prompt[len(kept) :] + completion
        before = self._encode(kept, request_id)
        whole = self._encode(kept + completion, request_id)
        if len(whole) <= len(before):
            raise ValueError(
                f"request {request_id!r}: completion={shown(completion)} adds no token to the "
                "prompt; give at least one character more"
            )
        return whole, len(before)

    def fork(
        self,
        parent: Request,
        k: int,
        request_ids: Iterator[str],
        params: SamplingParams | None,
        *,
        stream: bool,
    ) -> list[Request]:
        """Makes requests that know what another does; see `Engine.fork`.

        Raises:
          ValueError: if the request cannot be forked.
        """
        own = parent.params
        if params is not None:
            instance_of("params", params, SamplingParams)
            own = self._resolved(params, len(parent.prompt_token_ids), parent.request_id)
        stream = checked("stream", stream, bool)
        self._check(own, parent.request_id, stream)
        if parent.growth.max_sequences > 1 or parent.growth.waits_for_host:
            raise ValueError(
                f"request {parent.request_id!r} has several samples or beams: only a request with "
                "one can be forked"
            )
        if own.num_samples > 1 or own.beam_width is not None:
            raise ValueError("forks have one sample each: leave n, best_of and beam_width alone")
        if params is not None and own.prompt_logprobs is not None:
            raise ValueError(
                f"prompt_logprobs={own.prompt_logprobs} is for requests that compute their prompt, "
                "which a fork does not: leave it at None"
            )
        own = dataclasses.replace(own, prompt_logprobs=None)
        if own.logprobs is not None and parent.params.logprobs is None:
            raise ValueError(
                f"logprobs={own.logprobs} cannot be given for the tokens before the fork: request "
                f"{parent.request_id!r} has none; give it logprobs too"
            )
        if own.logprobs is not None and own.logprobs_mode != parent.params.logprobs_mode:
            raise ValueError(
                f"logprobs_mode={own.logprobs_mode!r} must be {parent.params.logprobs_mode!r}, as "
                f"of the tokens that request {parent.request_id!r} has before the fork"
            )
        k = checked("k", k, int, _FORKS)
        (source,) = parent.sequences
        assert own.max_tokens is not None
        if len(source.generated_token_ids) >= own.max_tokens:
            raise ValueError(
                f"max_tokens={own.max_tokens} must exceed the {len(source.generated_token_ids)} "
                f"tokens that request {parent.request_id!r} has generated"
            )
        seed = own.seed if params and own.seed is not None else parent.seed
        kept = parent.cache_salt, self._config.max_model_len
        children: list[Request] = []
        for request_id in itertools.islice(request_ids, k):
            own_seed = fork_seed(seed, parent.num_forks + len(children) + 1)
            child = self._new(request_id, parent.prompt_token_ids, own, own_seed, stream, *kept)
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
                f"request {request_id!r}: stop={shown(params.stop)} needs a tokenizer, which this "
                "model has not; use stop_token_ids"
            )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            if count is not None and count > vocab_size:
                raise ValueError(
                    f"request {request_id!r}: {name}={count} exceeds the vocabulary of {vocab_size}"
                )
        for name, token in params.token_ids:
            if token >= vocab_size:
                raise ValueError(
                    f"request {request_id!r}: {name} has token {shown(token)}, which is outside "
                    f"the vocabulary, [0, {vocab_size})"
                )
        if params.beam_width is not None:
            assert params.max_tokens is not None and params.length_penalty is not None
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
        if self._check_more is not None:
            try:
                self._check_more(params)
            except ValueError as e:
                raise ValueError(f"request {request_id!r}: {e}") from None

    def _processors(self, params: SamplingParams, request_id: str) -> LogitsProcessors | None:
        config = self._model_config
        try:
            return LogitsProcessors.of(params, config.eos_token_ids, config.vocab_size)
        except ValueError as e:
            raise ValueError(f"request {request_id!r}: {e}") from None

    def _new(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        seed: int,
        stream: bool,
        cache_salt: str | None,
        max_model_len: int,
    ) -> Request:
        processors = self._processors(params, request_id)
        assert params.max_tokens is not None, "not resolved"
        room = min(params.max_tokens, max_model_len - len(token_ids))
        request = Request(
            request_id,
            token_ids,
            params,
            seed=seed,
            max_model_len=max_model_len,
            stream=stream,
            cache_salt=cache_salt,
            growth=growth_of(params, token_ids, room, self._model_config.eos_token_ids),
        )
        request.processors = processors
        if params.prompt_logprobs is not None:
            request.scored = ScoredTokens(token_ids, 0, params.prompt_logprobs)
        return request

    def _encode(self, prompt: Prompt, request_id: str, name: str = "prompt") -> list[int]:
        where = f"request {request_id!r}"
        empty = f"{where}: the {name} is empty; give at least one character or token"
        if isinstance(prompt, str) and not prompt:
            raise ValueError(empty)
        if not isinstance(prompt, str):
            try:
                token_ids = integers(prompt)
            except TypeError as e:
                raise ValueError(
                    f"{where}: {name}={shown(prompt)} must be a string or {e}"
                ) from None
        elif self._tokenizer is None:
            raise ValueError(
                f"{where}: the model has no tokenizer.json, so its prompts must be lists of token "
                "ids"
            )
        elif (position := lone_surrogate(prompt)) is not None:
            raise ValueError(
                f"{where}: character {position} of the prompt is {prompt[position]!a}, half of a "
                "surrogate pair, which is no text"
            )
        else:
            try:
                token_ids = encode(self._tokenizer, prompt)
            except ValueError as e:
                raise ValueError(f"{where}: {e}") from e
        if not token_ids:
            text = isinstance(prompt, str)
            raise ValueError(f"{where}: prompt={shown(prompt)} has no tokens" if text else empty)
        return token_ids

    def _resolved(
        self, params: SamplingParams, num_prompt_tokens: int, request_id: str
    ) -> SamplingParams:
        """With the defaults; where nobody says how long, as long as the request has room."""
        most, defaults = self._config.max_model_len, self._defaults
        if params.max_tokens is None and defaults.max_length is not None:
            if num_prompt_tokens >= defaults.max_length:
                raise ValueError(
                    f"request {request_id!r}: a prompt of {num_prompt_tokens} tokens leaves none "
                    "for an answer, as generation_config.json has "
                    f"max_length={defaults.max_length}; give max_tokens, or "
                    "EngineConfig(generation_config='ignore'), --generation_config=ignore"
                )
            most = min(most, defaults.max_length)
        if self._config.reservation == "paged":
            width = params.beam_width or 1
            most = min(most, max_tokens_in(self._config, self._table, num_prompt_tokens, width))
        return params.resolve(defaults.params, max(most - num_prompt_tokens, 1))


def _check_host_memory(request: Request) -> None:
    """Refuses samples that the host could not hold when all have ended, however few run at once."""
    count, length = request.params.num_samples, request.max_total_tokens
    num_bytes = count * length * _BYTES_PER_TOKEN
    if num_bytes < 2**28:
        return  # most: the machine is not asked
    available = psutil.virtual_memory().available
    if num_bytes > available:
        raise ValueError(
            f"request {request.request_id!r}: {count} samples of up to {length} tokens take "
            f"{num_bytes / 2**30:.1f} GiB of host memory, of which {available / 2**30:.1f} GiB are "
            "available; lower n, best_of or max_tokens"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Number | np.generic)
