# SPDX-License-Identifier: Apache-2.0
"""The flags of `SamplingParams`."""

import dataclasses
from typing import Any

from absl import flags

from jpaged import SamplingParams
from jpaged.defaults import Defaults
from jpaged.scripts.prompts import decode_flag, parse_ids

flags.disclaim_key_flags()  # as in scripts.flags

_FILE = "None takes the model's generation_config.json, else "
_EARLY_STOPPINGS = {"false": False, "true": True, "never": "never"}


def define_sampling_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines a flag for every field of `SamplingParams`, with its name.

    Args:
      flag_values: where to define them.
    """

    def number(define: Any, name: str, text: str, default: Any = None) -> None:
        define(name, default, text, flag_values=flag_values)

    whole, real, flag = flags.DEFINE_integer, flags.DEFINE_float, flags.DEFINE_bool
    tokens, texts = flags.DEFINE_multi_integer, flags.DEFINE_multi_string
    number(whole, "max_tokens", f"Most tokens to generate for a prompt. {_FILE}128.")
    number(
        real,
        "temperature",
        f"Divides the logits; 0 is greedy. {_FILE}0.7; 1 with --beam_width.",
    )
    number(whole, "top_k", f"Keep the k likeliest tokens; 0 keeps all. {_FILE}0.")
    number(real, "top_p", f"Keep the likeliest tokens up to this probability. {_FILE}1.")
    number(real, "min_p", f"Keep tokens this fraction as likely as the likeliest. {_FILE}0.")
    number(
        real,
        "repetition_penalty",
        f"Above 1: makes tokens less likely that prompt or answer have already. {_FILE}1.",
    )
    number(
        real,
        "presence_penalty",
        "Subtracted from the logits of tokens that the answer has already, in [-2, 2].",
        0.0,
    )
    number(
        real,
        "frequency_penalty",
        "Likewise, as often as the answer has them.",
        0.0,
    )
    number(
        texts,
        "logit_bias",
        "TOKEN:BIAS, what is added to the logit of a token, in [-100, 100], such as 15:-2.5; may "
        "be repeated.",
        [],
    )
    number(
        texts,
        "sequence_bias",
        "TOKENS:BIAS, what is added to the logit of the last of these tokens where the others are "
        f"the newest ones, such as '10 45:-2.0'; may be repeated. {_FILE}none.",
    )
    number(
        whole,
        "min_tokens",
        f"Choose no token that ends an answer before so many. {_FILE}0.",
    )
    number(
        tokens,
        "suppress_tokens",
        f"A token that is never chosen; may be repeated. {_FILE}none.",
    )
    number(
        texts,
        "bad_words_ids",
        f"Tokens, such as '10 45', that never follow each other; may be repeated. {_FILE}none.",
    )
    number(
        tokens,
        "allowed_token_ids",
        "A token that is chosen, and no other; may be repeated. None allows all.",
    )
    number(whole, "n", "Samples to draw from each prompt, or best beams to print.", 1)
    number(whole, "best_of", "Draw so many samples and print the n likeliest a token.")
    number(whole, "beam_width", "Search with so many beams instead of drawing samples.")
    number(
        real,
        "length_penalty",
        f"Rank beams by log-probability / length ** this; above 0 favours long ones. {_FILE}1.",
    )
    flags.DEFINE_enum(
        "early_stopping",
        None,
        list(_EARLY_STOPPINGS),
        "End a beam search when beam_width beams have ended (true), when none that runs looks "
        f"better (false), or when none could be (never). {_FILE}false.",
        flag_values=flag_values,
    )
    number(
        flag,
        "renormalize_logits",
        "Rank beams by probabilities that add up to 1 again after what changes them. "
        f"{_FILE}false.",
    )
    number(whole, "seed", "Makes the run reproducible; None draws a new seed.")
    number(texts, "stop", "A string that ends a sample; may be repeated.", [])
    number(tokens, "stop_token_ids", "A token that ends a sample; may be repeated.", [])
    number(flag, "ignore_eos", "Go on after the model's end of text.", False)
    number(whole, "logprobs", "Report this many likeliest tokens with each token.")
    number(
        flag,
        "skip_special_tokens",
        "Leave the tokenizer's special tokens out of the text.",
        True,
    )


def sampling_params_from_flags(flag_values: flags.FlagValues = flags.FLAGS) -> SamplingParams:
    """Returns the parameters that the flags of `define_sampling_flags` describe.

    Raises:
      ValueError: if a value is out of range.
    """
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    values: dict[str, Any] = {name: flag_values[name].value for name in names}
    values["early_stopping"] = _EARLY_STOPPINGS.get(values["early_stopping"] or "")
    values["stop"] = tuple(decode_flag("--stop", stop) for stop in values["stop"])
    biases = [_bias("logit_bias", text) for text in values["logit_bias"]]
    if wrong := [ids for ids, _ in biases if len(ids) != 1]:
        raise ValueError(f"--logit_bias has the tokens {wrong[0]}: give one, as in 15:-2.5")
    values["logit_bias"] = tuple((ids[0], bias) for ids, bias in biases)
    for name, parse in (
        ("sequence_bias", _bias),
        ("bad_words_ids", lambda name, text: parse_ids(f"--{name}={text}", text)),
    ):
        if values[name] is not None:
            values[name] = tuple(parse(name, text) for text in values[name])
    for name in ("suppress_tokens", "allowed_token_ids"):
        values[name] = tuple(values[name]) if values[name] else None
    return SamplingParams(**values)


def with_fallbacks(params: SamplingParams, defaults: Defaults) -> SamplingParams:
    """Where neither a prompt nor the model say: answers that are neither dull nor endless."""
    values: dict[str, Any] = {}
    own = defaults.params
    if params.max_tokens is None and own.max_tokens is None and defaults.max_length is None:
        values["max_tokens"] = max(128, params.min_tokens or own.min_tokens or 0)
    sampled = params.beam_width is None
    if sampled and params.temperature is None and own.temperature is None:
        values["temperature"] = 0.7
    return dataclasses.replace(params, **values)


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
