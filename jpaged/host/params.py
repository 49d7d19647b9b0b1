# SPDX-License-Identifier: Apache-2.0
"""How a request wants its tokens chosen and when it wants to stop."""

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator
from typing import Any

from jpaged.host.checks import (
    INT32_MAX,
    Rule,
    SequenceBias,
    TokenBias,
    at_least,
    check_fields,
    one_of,
    shown,
)


class LogprobsMode(enum.StrEnum):
    """Of which logits log-probabilities of generated tokens are; see `SamplingParams`.

    Those of prompts and scores are always of the first kind.
    """

    RAW = "raw"  # those that the model gives
    TEMPERATURE = "temperature"  # of these, changed by processors, and divided by temperature
    FILTERS = "filters"  # of these, what top_k, top_p and min_p leave


# Samples, beams or forks of one request: each is an object of the host, however few run at once.
MAX_NUM_SAMPLES = 2**14
# What 32-bit floats hold, with room for a quotient.
_MAX_FLOAT = 1e30
# Of tokens and sequences that something belongs to: each takes a place in every sample's list.
_MAX_ENTRIES = 2**14

_NOT_NEGATIVE = Rule("free of negative numbers", lambda ids: min(ids, default=0) >= 0)
_PENALTY = (Rule("between -2 and 2 (0 is none)", lambda p: -2 <= p <= 2),)


_SEQUENCES = (
    Rule(f"of at most {_MAX_ENTRIES} sequences", lambda ids: len(ids) <= _MAX_ENTRIES),
    Rule("free of sequences without a token", all),
    Rule("free of negative numbers", lambda ids: min(map(min, ids), default=0) >= 0),
)


def _of_ids(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda pairs: holds([ids for ids, _ in pairs])


_RULES = {
    "max_tokens": at_least(1),
    "temperature": (
        Rule("finite and at least 0 (0 is greedy)", lambda t: 0 <= t < math.inf),
        Rule(f"at most {_MAX_FLOAT:g}", lambda t: t <= _MAX_FLOAT),
    ),
    "top_k": at_least(0, " (0 keeps every token)"),
    "top_p": (Rule("above 0 and at most 1 (1 keeps every token)", lambda p: 0 < p <= 1),),
    "min_p": (Rule("between 0 and 1 (0 keeps every token)", lambda p: 0 <= p <= 1),),
    "repetition_penalty": (
        Rule("finite and above 0 (1 is none)", lambda p: 0 < p < math.inf),
        Rule(
            f"between {1 / _MAX_FLOAT:g} and {_MAX_FLOAT:g}",
            lambda p: 1 / _MAX_FLOAT <= p <= _MAX_FLOAT,
        ),
    ),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "logit_bias": (
        Rule(f"of at most {_MAX_ENTRIES} tokens", lambda pairs: len(pairs) <= _MAX_ENTRIES),
        Rule("free of negative tokens", lambda pairs: min(pairs, default=(0,))[0] >= 0),
        Rule("between -100 and 100", lambda pairs: all(-100 <= bias <= 100 for _, bias in pairs)),
    ),
    "sequence_bias": (
        *(Rule(says, _of_ids(holds)) for says, holds in _SEQUENCES),
        Rule(
            f"between {-_MAX_FLOAT:g} and {_MAX_FLOAT:g}",
            lambda pairs: all(-_MAX_FLOAT <= bias <= _MAX_FLOAT for _, bias in pairs),
        ),
    ),
    "min_tokens": at_least(0),
    "suppress_tokens": (_NOT_NEGATIVE,),
    "bad_words_ids": _SEQUENCES,
    "allowed_token_ids": (_NOT_NEGATIVE, Rule("of at least one token", bool)),
    "n": (*at_least(1), Rule(f"at most {MAX_NUM_SAMPLES}", lambda n: n <= MAX_NUM_SAMPLES)),
    "best_of": (Rule(f"at most {MAX_NUM_SAMPLES}", lambda n: n <= MAX_NUM_SAMPLES),),
    "beam_width": (Rule(f"at most {MAX_NUM_SAMPLES}", lambda n: n <= MAX_NUM_SAMPLES),),
    "length_penalty": (Rule("finite", math.isfinite),),
    "early_stopping": (
        Rule("False, True or 'never'", lambda value: value in (False, True, "never")),
    ),
    "seed": (Rule("in [0, 2**32)", lambda seed: 0 <= seed < 2**32),),
    "stop": (Rule("free of empty strings", all),),
    "stop_token_ids": (_NOT_NEGATIVE,),
    "logprobs": at_least(0),
    "logprobs_mode": one_of(*(mode.value for mode in LogprobsMode)),
    "prompt_logprobs": at_least(0),
    "priority": (Rule("in [-2**63, 2**63)", lambda priority: -(2**63) <= priority < 2**63),),
}

# What a search for beams does not look at, with the values that say nothing.
_SAMPLING_ONLY = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
_NOT_OF_BEAMS = {
    **_SAMPLING_ONLY,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "best_of": None,
    "stop": (),
    "logprobs_mode": LogprobsMode.RAW.value,
}
# Likewise of the rest that a model may have a default for, lengths apart.
_NEUTRAL = {
    "repetition_penalty": 1.0,
    "sequence_bias": (),
    "suppress_tokens": (),
    "bad_words_ids": (),
    "length_penalty": 1.0,
    "early_stopping": False,
    "renormalize_logits": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's sampling parameters, checked when made; None is a parameter's default.

    Where "the model's default" is said, that is what the model's generation_config.json has, unless
    the engine ignores the file (`EngineConfig.generation_config`), and else the value in brackets.

    The logits are changed in the order of transformers and vLLM: logit_bias and sequence_bias are
    added, then come repetition_penalty, frequency_penalty and presence_penalty; what min_tokens,
    suppress_tokens, bad_words_ids and allowed_token_ids rule out is never chosen, whatever the rest
    does. Then filters apply in the order temperature, top_k, top_p, min_p; a tie at a filter's edge
    is kept whole. Log-probabilities are reported as the model has them, unless logprobs_mode says
    otherwise.

    Attributes:
      max_tokens: most tokens to generate, >= 1; None is the model's default (no limit), as far as
        max_model_len and the pool have room for it.
      temperature: divides the logits; 0 is greedy. None is the model's default (1), greedy where
        its do_sample is false.
      top_k: keep the k likeliest tokens; 0 keeps all. None is the model's default (0).
      top_p: keep the smallest set of likeliest tokens whose probability reaches this, in (0, 1].
        None is the model's default (1).
      min_p: keep tokens at least this fraction as likely as the likeliest, in [0, 1]. None is the
        model's default (0).
      repetition_penalty: divides the logits above 0 of tokens that prompt or answer have already,
        and multiplies those below; above 1 is against repetition. None is the model's default (1).
      presence_penalty: subtracted from the logits of tokens that the answer has already, those of
        the prompt apart, in [-2, 2], as OpenAI and vLLM define it; above 0 is against repetition.
        Beam search has none.
      frequency_penalty: likewise, as often as the answer has them.
      logit_bias: what is added to the logits of tokens, in [-100, 100], as OpenAI defines it: a
        dictionary, whose keys may also be text such as "15", or pairs; kept as pairs.
      sequence_bias: what is added to the logit of a sequence's last token where the others, of
        prompt or answer, are the newest: as transformers defines it, [[[10, 45], -2.0], ...], or a
        dictionary; kept as pairs. Comes on top of logit_bias. None is the model's default (none).
      min_tokens: tokens that end a sample are not chosen before it has so many; stop strings may
        end it sooner. None is the model's min_new_tokens (0).
      suppress_tokens: tokens that are never chosen. None is the model's default (none).
      bad_words_ids: sequences that are never completed, as transformers defines them: the last
        token is not chosen where the others, of prompt or answer, are the newest. One token that
        ends a sample is left alone. None is the model's default (none).
      allowed_token_ids: the only tokens that are chosen, as in vLLM; what ends a sample must be
        among them to do so. None allows all.
      n: samples to draw from the prompt, >= 1, or best beams to return; they share its pages. Fewer
        beams come back where there are not so many continuations, or after an abort. At most 16384,
        as best_of and beam_width.
      best_of: draws so many samples and returns the `n` of them whose tokens have the highest
        log-probability on average; None draws `n`.
      beam_width: searches with so many beams instead of sampling, as transformers' `num_beams`;
        temperature, filters and stop strings must be left alone, and the model's defaults of them
        do not apply. Penalties and suppression change the scores. All beams are computed in one
        step, and wait for one with room. None samples.
      length_penalty: beams are compared by the sum of their log-probabilities divided by their
        length to this power; above 0 favours long ones. None is the model's default (1).
      early_stopping: when beam search ends: True as soon as `beam_width` beams have ended; False
        when none that runs looks better now than those; "never" when none could ever be better.
        None is the model's default (False).
      renormalize_logits: whether beams are compared by probabilities that add up to 1 again after a
        penalty or suppression, as transformers' option. None is the model's default (False).
      seed: makes the request reproducible, in [0, 2**32); None draws one.
      stop: strings that end a sample; they are cut from its text. One that has a special token in
        it, such as "<|im_end|>", is found also where special tokens are no text. A tokenizer whose
        text is certain at its end only (see `jpaged.detokenizer`) is searched then.
      stop_token_ids: tokens that end a sample beside the model's own; they are kept in token_ids.
      ignore_eos: whether to go on after the model's end-of-sequence tokens.
      logprobs: how many likeliest tokens to report with each token; None reports none.
      logprobs_mode: what the log-probabilities of generated tokens are of. "raw": the model's
        logits. "temperature": these as penalties, biases and forbidden tokens change them, divided
        by temperature, or by 1 where it is 0. "filters": of these, what top_k, top_p and min_p
        leave, scaled to add up to 1; greedy sampling has none. What cannot be drawn is not among
        the likeliest. cumulative_logprob, best_of, and prompt_logprobs are of the model's logits
        in any case, and beam search has no other mode.
      prompt_logprobs: how many likeliest tokens to report at each place of the prompt, beside the
        log-probability of the token that is there; None reports none. All of the prompt is
        computed for it, also what other requests left in the prefix cache.
      skip_special_tokens: whether the tokenizer's special tokens are left out of the text; the
        token that ends a sample is left out in any case.
      priority: requests with a lower one are served first, as in vLLM, in [-2**63, 2**63); those
        with equal ones as they came. It decides who waits, starts and keeps its pages, never what
        an answer is.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: TokenBias = ()
    sequence_bias: SequenceBias | None = None
    min_tokens: int | None = None
    suppress_tokens: tuple[int, ...] | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    n: int = 1
    best_of: int | None = None
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    renormalize_logits: bool | None = None
    seed: int | None = None
    stop: tuple[str, ...] | str = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logprobs_mode: str = LogprobsMode.RAW.value
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    priority: int = 0

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        check_fields(self, _RULES)
        for name in ("best_of", "beam_width"):
            value = getattr(self, name)
            if value is not None and value < self.n:
                raise ValueError(f"{name}={shown(value)} must be at least n={self.n}, or None")
        if (self.min_tokens or 0) > (self.max_tokens or INT32_MAX):
            raise ValueError(
                f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}"
            )
        if self.beam_width is None:
            return
        for name, neutral in _NOT_OF_BEAMS.items():
            if (value := getattr(self, name)) not in (None, neutral):
                raise ValueError(
                    f"{name}={shown(value)} has no meaning in beam search: leave it at "
                    f"{neutral!r}, or beam_width at None"
                )

    def resolve(
        self, defaults: "SamplingParams | None" = None, room: int = INT32_MAX
    ) -> "SamplingParams":
        """The parameters with a model's defaults, or neutral values, where they are None.

        Args:
          defaults: the model's; see `jpaged.defaults`.
          room: most tokens to generate where the request does not say.
        """
        defaults = defaults or SamplingParams()
        sampling = {name: getattr(defaults, name) for name in _SAMPLING_ONLY}
        if self.beam_width is not None:
            sampling = dict[str, Any].fromkeys(sampling)
        # What a model asks for gives way to what a request asks for.
        longest = max(min(defaults.max_tokens or room, room), self.min_tokens or 1)
        shortest = min(defaults.min_tokens or 0, self.max_tokens or longest)
        own = {
            name: (getattr(self, name), default, neutral)
            for name, default, neutral in (
                *((name, sampling[name], neutral) for name, neutral in _SAMPLING_ONLY.items()),
                *((name, getattr(defaults, name), neutral) for name, neutral in _NEUTRAL.items()),
                ("max_tokens", longest, None),
                ("min_tokens", shortest, None),
            )
        }
        return dataclasses.replace(
            self,
            **{
                name: next(value for value in values if value is not None)
                for name, values in own.items()
            },
        )

    @property
    def token_ids(self) -> Iterator[tuple[str, int]]:
        """All tokens that are named, each with the name of its field."""
        for name in ("stop_token_ids", "suppress_tokens", "allowed_token_ids"):
            yield from ((name, token) for token in getattr(self, name) or ())
        fields: Any = self.logit_bias, self.sequence_bias, self.bad_words_ids
        yield from (("logit_bias", token) for token, _ in fields[0])
        yield from (("sequence_bias", token) for ids, _ in fields[1] or () for token in ids)
        yield from (("bad_words_ids", token) for ids in fields[2] or () for token in ids)

    @property
    def num_samples(self) -> int:
        """Sequences that grow from the prompt one by one; 1 for the beams of a beam search."""
        return 1 if self.beam_width is not None else self.best_of or self.n


DEFAULT_PARAMS = SamplingParams()
"""What the model's own settings say, or else nothing: greedy, as long as there is room for."""
