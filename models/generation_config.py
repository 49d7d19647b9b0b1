# SPDX-License-Identifier: Apache-2.0
"""generation_config.json: how a model's makers want it sampled.

Each field is what it is in transformers 5, except for do_sample and top_k where they are missing
(see `jpaged.defaults`) and for eos_token_id (see `models.config_json.load_config`).
"""

import contextlib
import dataclasses
import logging
import math
import pathlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from jpaged.models.json_fields import FieldPolicy, ModelConfigError, listed, read_json, shown, typed
from jpaged.models.paths import is_there

logger = logging.getLogger(__name__)

FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Sampling settings that come with a model; None, and no tokens, where it has none.

    Attributes:
      do_sample: False asks for greedy decoding.
      temperature: divides the logits; at least 0.
      top_k: how many of the most likely tokens are kept; 0 keeps all.
      top_p: the mass of the most likely tokens that are kept, above 0.
      min_p: a token's least probability, as a share of the most likely one's.
      repetition_penalty: divides positive and multiplies negative logits of the tokens that were
        seen; above 0, and 1 changes nothing.
      sequence_bias: what is added to the logit of a sequence's last token where the others are the
        newest tokens, as pairs; of equal sequences the last counts.
      min_new_tokens: no end of sequence before so many tokens.
      max_new_tokens: at most so many tokens.
      max_length: at most so many tokens of prompt and answer together, where nothing says
        max_new_tokens.
      suppress_tokens: never generated.
      bad_words_ids: sequences of tokens that are never completed; one token that ends an answer is
        left alone.
      length_penalty: beams are compared by their score over their length to this power.
      early_stopping: when a beam search ends: False, True or "never".
      renormalize_logits: whether what a penalty or suppression leaves is made a distribution again,
        which changes the scores of beams, and nothing else.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    min_new_tokens: int | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    renormalize_logits: bool | None = None

    def __post_init__(self):
        for name, holds, rule in (
            ("temperature", lambda v: 0 <= v < math.inf, "finite and at least 0"),
            ("top_k", lambda v: v >= 0, "at least 0"),
            ("top_p", lambda v: 0 < v <= 1, "above 0 and at most 1"),
            ("min_p", lambda v: 0 <= v <= 1, "between 0 and 1"),
            ("repetition_penalty", lambda v: 0 < v < math.inf, "finite and above 0"),
            ("min_new_tokens", lambda v: v >= 0, "at least 0"),
            ("max_new_tokens", lambda v: v >= 1, "at least 1"),
            ("max_length", lambda v: v >= 1, "at least 1"),
            ("length_penalty", math.isfinite, "finite"),
            ("early_stopping", lambda v: v in (False, True, "never"), "false, true or 'never'"),
        ):
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ModelConfigError(f"{name}={value} must be {rule}")


_TYPES = MappingProxyType(
    {
        "do_sample": bool,
        "temperature": float,
        "top_k": int,
        "top_p": float,
        "min_p": float,
        "repetition_penalty": float,
        "sequence_bias": list,
        "min_new_tokens": int,
        "max_new_tokens": int,
        "max_length": int,
        "suppress_tokens": list,
        "bad_words_ids": list,
        "length_penalty": float,
        "early_stopping": bool,
        "renormalize_logits": bool,
    }
)

# What transformers' `generate` would do otherwise with another value.
_NEUTRAL = MappingProxyType(
    {
        "begin_suppress_tokens": (),
        "constraints": (),
        "dola_layers": (),
        "encoder_no_repeat_ngram_size": (0,),
        "encoder_repetition_penalty": (1.0,),
        "epsilon_cutoff": (0.0,),
        "eta_cutoff": (0.0,),
        "exponential_decay_length_penalty": (),
        "force_words_ids": (),
        "forced_bos_token_id": (),
        "forced_eos_token_id": (),
        "guidance_scale": (1.0,),
        "max_time": (),
        "min_length": (0,),
        "no_repeat_ngram_size": (0,),
        "num_beam_groups": (1,),
        "num_beams": (1,),
        "num_return_sequences": (1,),
        "penalty_alpha": (0.0,),
        "stop_strings": (),
        "token_healing": (False,),
        "top_h": (),
        "typical_p": (1.0,),
        "watermarking_config": (),
    }
)

_INERT = frozenset(
    {
        # Read by models.config_json, with config.json's.
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        # Only read with groups of beams.
        "diversity_penalty",
        "low_memory",
        # A row that is not finite ends its request here.
        "remove_invalid_values",
        # Drafts that are checked give the same text.
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "is_assistant",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "prompt_lookup_num_tokens",
        "speculation_type",
        "target_lookbehind",
        "use_mtp",
        # How transformers computes, and what it returns beside the tokens.
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "disable_compile",
        "max_cache_len",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "prefill_chunk_size",
        "return_dict_in_generate",
        "return_legacy_cache",
        "use_cache",
        # Where the file comes from.
        "_commit_hash",
        "_from_model_config",
        "_name_or_path",
        "transformers_version",
        "transformers.js_config",
    }
)

_POLICY = FieldPolicy(
    read=frozenset(_TYPES), neutral=_NEUTRAL, inert=_INERT, inert_prefixes=("unsloth_",)
)

# Every field of transformers' GenerationConfig; older releases wrote some into config.json.
FIELDS = frozenset(_TYPES) | frozenset(_NEUTRAL) | _INERT


def load_generation_config(directory: pathlib.Path) -> GenerationConfig:
    """Reads a model's sampling settings, from where transformers takes them.

    That is generation_config.json, and without one config.json, into which old releases wrote the
    same fields. Stop tokens are not among them: `models.config_json.load_config` reads those.

    Args:
      directory: the model's.

    Returns:
      The settings; none where the directory has no such file.

    Raises:
      ModelConfigError: if the file is damaged, a value has a wrong type or range, or a field asks
        for something that is not supported and would change the text.
    """
    path = directory / FILE
    if is_there(path):
        fields = read_json(path)
        if unknown := _POLICY.unknown(fields):
            logger.warning("%s: ignored, for they are not known: %s", path, listed(unknown))
    else:
        path = directory / "config.json"
        if not is_there(path):
            return GenerationConfig()
        fields = {field: value for field, value in read_json(path).items() if field in FIELDS}
    with faults_of(path):
        return _from_fields(fields)


@contextlib.contextmanager
def faults_of(path: pathlib.Path) -> Iterator[None]:
    """Says of what is wrong with sampling settings in which file it is, and how to go without."""
    try:
        yield
    except ModelConfigError as e:
        raise ModelConfigError(
            f'{path}: {e}; correct the file, or load with EngineConfig(generation_config="ignore") '
            "or --generation_config=ignore, without the model's sampling settings"
        ) from e


def _from_fields(fields: Mapping[str, Any]) -> GenerationConfig:
    if refused := _POLICY.refused(fields):
        field = min(refused)
        raise ModelConfigError(
            f"{field}={shown(fields[field])} is not supported; supported: {refused[field]}"
        )
    # Here too an empty value of another type says nothing.
    empty = [field for field in ("bad_words_ids", "sequence_bias") if fields.get(field) in ({}, "")]
    fields = {field: value for field, value in fields.items() if field not in empty}
    values = {
        field: _typed(field, fields[field], kind)
        for field, kind in _TYPES.items()
        if fields.get(field) is not None
    }
    if "suppress_tokens" in values:
        ids = [typed("suppress_tokens", token, int) for token in values["suppress_tokens"]]
        # transformers compares them with the ids of the vocabulary; a negative one is none.
        values["suppress_tokens"] = tuple(token for token in ids if token >= 0)
    if "bad_words_ids" in values:
        words = values["bad_words_ids"]
        values["bad_words_ids"] = tuple(_sequence("bad_words_ids", ids) for ids in words)
    if "sequence_bias" in values:
        pairs = map(_pair, values["sequence_bias"])
        values["sequence_bias"] = tuple({ids: bias for ids, bias in pairs}.items())
    return GenerationConfig(**values)


def _sequence(field: str, value: Any) -> tuple[int, ...]:
    """A sequence of tokens, which transformers refuses where it is empty or has a negative one."""
    ids = tuple(typed(field, token, int) for token in typed(field, value, list))
    if not ids or min(ids) < 0:
        raise ModelConfigError(f"{field}={shown(value)} must be token ids, at least one of them")
    return ids


def _pair(value: Any) -> tuple[tuple[int, ...], float]:
    pair = typed("sequence_bias", value, list)
    if len(pair) != 2:
        raise ModelConfigError(f"sequence_bias={shown(value)} must be pairs: [[10, 45], -2.0]")
    bias = typed("sequence_bias", pair[1], float)
    if not math.isfinite(bias):
        raise ModelConfigError(f"sequence_bias={bias} must be finite; bad_words_ids forbids")
    return _sequence("sequence_bias", pair[0]), bias


def _typed(field: str, value: Any, kind: type) -> Any:
    return value if (field, value) == ("early_stopping", "never") else typed(field, value, kind)
