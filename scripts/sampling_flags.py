# SPDX-License-Identifier: Apache-2.0
"""The flags of `SamplingParams`."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from absl import flags

from jpaged.host.params import LogprobsMode, SamplingParams
from jpaged.scripts.prompts import decode_flag, parse_ids

flags.disclaim_key_flags()  # as in scripts.flags

_EARLY_STOPPINGS = {"false": False, "true": True, "never": "never"}
_FILE = "None takes the model's generation_config.json, else "


def _early_stoppings(name: str, default: Any, text: str, **where: Any) -> None:
    flags.DEFINE_enum(name, default, list(_EARLY_STOPPINGS), text, **where)


def _modes(name: str, default: Any, text: str, **where: Any) -> None:
    flags.DEFINE_enum(name, default, [mode.value for mode in LogprobsMode], text, **where)


_WHOLE, _REAL, _BOOL = flags.DEFINE_integer, flags.DEFINE_float, flags.DEFINE_bool
_TOKENS, _TEXTS = flags.DEFINE_multi_integer, flags.DEFINE_multi_string
# By field: what defines its flag, and the help text.
SAMPLING_FLAGS: Mapping[str, tuple[Callable[..., Any], str]] = MappingProxyType(
    {
        "max_tokens": (_WHOLE, f"Most tokens to generate for a prompt. {_FILE}{{longest}}."),
        "temperature": (
            _REAL,
            f"Divides the logits; 0 is greedy. {_FILE}0.7; 1 in a beam search.",
        ),
        "top_k": (_WHOLE, f"Keep the k likeliest tokens; 0 keeps all. {_FILE}0."),
        "top_p": (_REAL, f"Keep the likeliest tokens up to this probability. {_FILE}1."),
        "min_p": (_REAL, f"Keep tokens this fraction as likely as the likeliest. {_FILE}0."),
        "repetition_penalty": (
            _REAL,
            f"Above 1: makes tokens less likely that prompt or answer have already. {_FILE}1.",
        ),
        "presence_penalty": (
            _REAL,
            "Subtracted from the logits of tokens that the answer has already, in [-2, 2].",
        ),
        "frequency_penalty": (_REAL, "Likewise, as often as the answer has them."),
        "logit_bias": (
            _TEXTS,
            "TOKEN:BIAS, what is added to the logit of a token, in [-100, 100], such as 15:-2.5; "
            "may be repeated.",
        ),
        "sequence_bias": (
            _TEXTS,
            "TOKENS:BIAS, what is added to the logit of the last of these tokens where the others "
            f"are the newest ones, such as '10 45:-2.0'; may be repeated. {_FILE}none.",
        ),
        "min_tokens": (_WHOLE, f"Choose no token that ends an answer before so many. {_FILE}0."),
        "suppress_tokens": (
            _TOKENS,
            f"A token that is never chosen; may be repeated. {_FILE}none.",
        ),
        "bad_words_ids": (
            _TEXTS,
            f"Tokens, such as '10 45', that never follow each other; may be repeated. {_FILE}none.",
        ),
        "allowed_token_ids": (
            _TOKENS,
            "A token that is chosen, and no other; may be repeated. None allows all.",
        ),
        "n": (_WHOLE, "Samples to draw from each prompt, or best beams to print."),
        "best_of": (_WHOLE, "Draw so many samples and print the n likeliest a token."),
        "beam_width": (_WHOLE, "Search with so many beams instead of drawing samples."),
        "length_penalty": (
            _REAL,
            f"Rank beams by log-probability / length ** this; above 0 favours long ones. {_FILE}1.",
        ),
        "early_stopping": (
            _early_stoppings,
            "End a beam search when beam_width beams have ended (true), when none that runs looks "
            f"better (false), or when none could be (never). {_FILE}false.",
        ),
        "renormalize_logits": (
            _BOOL,
            "Rank beams by probabilities that add up to 1 again after what changes them. "
            f"{_FILE}false.",
        ),
        "seed": (_WHOLE, "Makes the run reproducible; None draws a new seed."),
        "stop": (_TEXTS, "A string that ends a sample; may be repeated."),
        "stop_token_ids": (_TOKENS, "A token that ends a sample; may be repeated."),
        "ignore_eos": (_BOOL, "Go on after the model's end of text."),
        "logprobs": (_WHOLE, "Report this many likeliest tokens with each token."),
        "logprobs_mode": (
            _modes,
            "What these are of: the model's logits (raw), these changed by penalties, biases and "
            "forbidden tokens and divided by temperature, or what filters leave of that.",
        ),
        "prompt_logprobs": (
            _WHOLE,
            "With --output=json, report each token of the prompt, and this many likeliest ones.",
        ),
        "skip_special_tokens": (_BOOL, "Leave the tokenizer's special tokens out of the text."),
        "priority": (
            _WHOLE,
            "Prompts with a lower one are served first; what is said of a prompt in a file counts. "
            "`jpaged batch` reads rows in their order, four times --max_num_seqs ahead, and orders "
            "those alone.",
        ),
    }
)


def define_sampling_flags(
    names: Iterable[str] = SAMPLING_FLAGS,
    *,
    longest: str = "128",
    flag_values: flags.FlagValues = flags.FLAGS,
) -> None:
    """Defines flags for fields of `SamplingParams`, with their names and defaults.

    Args:
      names: of the fields.
      longest: what max_tokens is where neither flag nor model say, for the help text.
      flag_values: where to define them.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    for name in names:
        define, text = SAMPLING_FLAGS[name]
        default: Any = defaults[name]
        default = list(default) if isinstance(default, tuple) else default
        define(name, default, text.format(longest=longest), flag_values=flag_values)


def sampling_params_from_flags(
    names: Iterable[str] = SAMPLING_FLAGS, flag_values: flags.FlagValues = flags.FLAGS
) -> SamplingParams:
    """Returns the parameters that the flags of `define_sampling_flags` describe.

    Raises:
      ValueError: if a value is out of range.
    """
    values = {name: _VALUES.get(name, _as_it_is)(flag_values[name].value) for name in names}
    return SamplingParams(**values)


def _as_it_is(value: Any) -> Any:
    return value


def _logit_bias(texts: list[str]) -> tuple[tuple[int, float], ...]:
    biases = [_bias("logit_bias", text) for text in texts]
    if wrong := [ids for ids, _ in biases if len(ids) != 1]:
        raise ValueError(f"--logit_bias has the tokens {wrong[0]}: give one, as in 15:-2.5")
    return tuple((ids[0], bias) for ids, bias in biases)


def _sequence_bias(texts: list[str] | None) -> tuple[tuple[tuple[int, ...], float], ...] | None:
    return tuple(_bias("sequence_bias", text) for text in texts) if texts else None


def _bad_words(texts: list[str] | None) -> tuple[tuple[int, ...], ...] | None:
    return tuple(parse_ids(f"--bad_words_ids={text}", text) for text in texts) if texts else None


def _bias(name: str, text: str) -> tuple[tuple[int, ...], float]:
    flag = f"--{name}={text}"
    ids, colon, bias = text.rpartition(":")
    try:
        value = float(bias)
    except ValueError:
        colon = ""
    if not colon:
        raise ValueError(f"{flag} must be token ids, a colon and a number, such as 15:-2.5")
    return parse_ids(flag, ids), value


# How the values of flags become those of fields, where they are not the same.
_VALUES: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "logit_bias": _logit_bias,
        "sequence_bias": _sequence_bias,
        "suppress_tokens": lambda tokens: tuple(tokens) if tokens else None,
        "bad_words_ids": _bad_words,
        "allowed_token_ids": lambda tokens: tuple(tokens) if tokens else None,
        "early_stopping": lambda name: _EARLY_STOPPINGS.get(name or ""),
        "stop": lambda texts: tuple(decode_flag("--stop", text) for text in texts),
    }
)
