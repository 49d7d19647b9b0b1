# SPDX-License-Identifier: Apache-2.0
"""A decoder's shape as Hugging Face's config.json says it: read and written."""

import dataclasses
import logging
import os
import pathlib
import typing
from typing import Any

from jpaged.models import generation_config
from jpaged.models.config import ModelConfig, RopeScaling
from jpaged.models.families import FAMILIES, Family
from jpaged.models.json_fields import FieldPolicy, ModelConfigError, listed, read_json, shown, typed

logger = logging.getLogger(__name__)


def load_config(directory: pathlib.Path) -> ModelConfig:
    """Reads `config.json`, and the stop tokens of `generation_config.json` where there is one.

    Raises:
      FileNotFoundError: if `config.json` is missing.
      ModelConfigError: if it is not JSON or describes a model that is not supported.
    """
    path = directory / "config.json"
    fields = read_json(path)
    try:
        config = config_from_hf(fields)
    except ModelConfigError as e:
        raise ModelConfigError(f"{path}: {e}") from e
    generation_path = directory / generation_config.FILE
    if not os.path.lexists(generation_path):
        return config
    # Chat models list more stop tokens there than in config.json, and that file wins. Where it has
    # none, or null, config.json's count: transformers would go on to the longest length then.
    eos = read_json(generation_path).get("eos_token_id")
    ids = _token_ids(f"{generation_config.FILE}: eos_token_id", eos, config.vocab_size)
    return dataclasses.replace(config, eos_token_ids=ids) if ids else config


# config.json's name of a field and ours.
_FIELDS: tuple[tuple[str, str], ...] = (
    ("vocab_size", "vocab_size"),
    ("hidden_size", "hidden_size"),
    ("intermediate_size", "intermediate_size"),
    ("num_hidden_layers", "num_layers"),
    ("num_attention_heads", "num_q_heads"),
    ("rms_norm_eps", "rms_norm_eps"),
    ("tie_word_embeddings", "tie_word_embeddings"),
    ("max_position_embeddings", "max_position_embeddings"),
)
_TYPES = typing.get_type_hints(ModelConfig)
# Names of ours that errors use, and that readers of config.json look for in vain.
_THEIR_NAMES = (
    ("num_layers", "num_hidden_layers"),
    ("num_q_heads", "num_attention_heads"),
    ("num_kv_heads", "num_key_value_heads"),
    ("original_max_position", "original_max_position_embeddings"),
)
_ROPE_FIELDS = ("rope_parameters", "rope_scaling")
# Fields that are read by hand, here and in `models.checkpoint`.
_DERIVED_FIELDS = frozenset(
    {
        "architectures",
        "model_type",
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "original_max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
        "layer_types",
        "mlp_layer_types",
        "transformers_weights",
    }
)


def config_from_hf(fields: dict[str, Any]) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`, as transformers 4 or 5 writes it.

    A field that changes the result is honoured or refused by name, also where it is not known,
    because ignoring it would give wrong text without a word. One that changes nothing, or nothing
    at the value it has (null, false, zero and empty for one that is not known), is passed over.
    What is left out is taken as transformers takes it for the family. Fields of
    generation_config.json that stand here are `models.generation_config`'s.

    Args:
      fields: the parsed JSON object.

    Returns:
      The config.

    Raises:
      ModelConfigError: naming the field, its value and what is supported.
    """
    try:
        return _config(fields)
    except ModelConfigError as e:
        calls = [
            f"{ours} is {theirs}"
            for ours, theirs in _THEIR_NAMES
            if f"{ours}=" in str(e) and theirs not in str(e)
        ]
        if not calls:
            raise
        raise ModelConfigError(f"{e} (in config.json, {' and '.join(calls)})") from e


def _config(fields: dict[str, Any]) -> ModelConfig:
    name = _family_name(fields)
    family = FAMILIES[name]
    _check_fields(name, family, fields)
    given = {field: value for field, value in fields.items() if value is not None}
    values: dict[str, Any] = {"family": name, "qk_norm": family.qk_norm}
    for hf_name, our_name in _FIELDS:
        value = given.get(hf_name, family.defaults[hf_name])
        values[our_name] = typed(hf_name, value, _TYPES[our_name])
    num_heads, hidden_size = values["num_q_heads"], values["hidden_size"]
    # A null is not a missing field here: transformers gives each query head its own then.
    kv_heads = fields.get("num_key_value_heads", family.defaults.get("num_key_value_heads"))
    values["num_kv_heads"] = typed(
        "num_key_value_heads", num_heads if kv_heads is None else kv_heads, int
    )
    head_dim = given.get("head_dim", family.defaults.get("head_dim"))
    # Of no heads at all, ModelConfig complains.
    if head_dim is None and num_heads > 0 and hidden_size % num_heads:
        raise ModelConfigError(
            f"hidden_size={hidden_size} must be a multiple of num_attention_heads={num_heads} "
            "where config.json has no head_dim"
        )
    values["head_dim"] = typed(
        "head_dim", hidden_size // max(num_heads, 1) if head_dim is None else head_dim, int
    )
    values |= _rope(fields, family)
    _check_layer_types(name, given, values["num_layers"])
    vocab_size = values["vocab_size"]
    if "bos_token_id" in given:
        bos = _token_ids(
            "bos_token_id", typed("bos_token_id", given["bos_token_id"], int), vocab_size
        )
        values["bos_token_id"] = bos[0] if bos else None
    values["eos_token_ids"] = _token_ids("eos_token_id", fields.get("eos_token_id"), vocab_size)
    return ModelConfig(**values)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `config_from_hf`, in the form transformers 5 writes and reads."""
    fields: dict[str, Any] = {
        "architectures": [config.family],
        "model_type": FAMILIES[config.family].model_type,
        "hidden_act": "silu",
    }
    fields |= {hf_name: getattr(config, our_name) for hf_name, our_name in _FIELDS}
    fields |= {"num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        s = config.rope_scaling
        rope |= {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            rope |= {
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_max_position,
            }
    fields["rope_parameters"] = rope
    fields["bos_token_id"] = config.bos_token_id
    fields["eos_token_id"] = list(config.eos_token_ids) or None
    return fields


def _token_ids(field: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """Those that can be chosen; others change nothing, as -1, which some files have for none."""
    if value is None:
        return ()
    ids = [typed(field, i, int) for i in (value if isinstance(value, list) else [value])]
    known = tuple(token_id for token_id in ids if 0 <= token_id < vocab_size)
    if any(token_id >= vocab_size for token_id in ids):
        logger.warning(
            "%s=%s: what is not below vocab_size=%d is no token, and is ignored",
            field,
            shown(value),
            vocab_size,
        )
    return known


def _family_name(fields: dict[str, Any]) -> str:
    """The architecture that transformers' AutoModelForCausalLM would take.

    It goes by model_type alone; architectures that say something else are a contradiction.
    """
    names = fields.get("architectures") or []
    model_type = fields.get("model_type")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelConfigError(
            f"architectures={shown(names)} must be a list of names; supported: {sorted(FAMILIES)}"
        )
    if model_type is not None:
        typed("model_type", model_type, str)
    supported = [name for name in dict.fromkeys(names) if name in FAMILIES]
    if not names:
        supported = [name for name, f in FAMILIES.items() if f.model_type == model_type]
    if len(supported) != 1 or (len(set(names)) > 1 and model_type is None):
        raise ModelConfigError(
            f"architectures={shown(names)} with model_type={shown(model_type)} is not supported; "
            f"supported: {sorted(FAMILIES)}"
        )
    return supported[0]


def _check_fields(name: str, family: Family, fields: dict[str, Any]) -> None:
    if fields.get("model_type") not in (None, family.model_type):
        raise ModelConfigError(
            f"model_type={shown(fields['model_type'])} does not go with architecture {name}, "
            f"whose model_type is {family.model_type!r}"
        )
    policy = FieldPolicy(
        read={hf_name for hf_name, _ in _FIELDS} | _DERIVED_FIELDS,
        neutral=family.neutral_fields,
        inert=family.inert_fields | generation_config.FIELDS,
        inert_prefixes=("unsloth_",),
    )
    if refused := policy.refused(fields):
        field = min(refused)
        raise ModelConfigError(
            f"{field}={shown(fields[field])} is not supported for {name}; supported: "
            f"{refused[field]}"
        )
    if unknown := policy.unknown(fields):
        raise ModelConfigError(
            f"config.json has fields that are not supported for {name}: {listed(unknown)}. They "
            "could change what the model computes, so they are not ignored"
        )


def _check_layer_types(name: str, given: dict[str, Any], num_layers: int) -> None:
    for field, supported in (
        ("layer_types", ("full_attention", "attention")),
        ("mlp_layer_types", ("dense",)),
    ):
        kinds = given.get(field) or []
        if not isinstance(kinds, list) or not all(kind in supported for kind in kinds):
            raise ModelConfigError(
                f"{field}={shown(kinds)} is not supported for {name}; supported: "
                f"{supported[0]!r} in every layer"
            )
        if kinds and len(kinds) != num_layers:
            raise ModelConfigError(
                f"{field} has {len(kinds)} entries for num_hidden_layers={num_layers}: they "
                "contradict each other"
            )


def _rope(fields: dict[str, Any], family: Family) -> dict[str, Any]:
    """rope_theta and rope_scaling: transformers 5 keeps all in rope_parameters, 4 beside it."""
    places = [
        {
            key: value
            for key, value in typed(field, fields[field], dict).items()
            if value is not None
        }
        for field in _ROPE_FIELDS
        if fields.get(field)
    ]
    original = fields.get("original_max_position_embeddings")
    for place in places:
        # Where transformers looks first.
        if original is not None and place.get("rope_type", place.get("type")) == "llama3":
            place.setdefault("original_max_position_embeddings", original)
    scalings = [_rope_scaling(place) for place in places]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise ModelConfigError(
            f"rope_parameters={shown(places[0])} and rope_scaling={shown(places[1])} contradict "
            "each other; keep one of them"
        )
    given = [place.get("rope_theta") for place in (*places, fields)]
    thetas = {typed("rope_theta", theta, float) for theta in given if theta is not None}
    if len(thetas) > 1:
        raise ModelConfigError(f"rope_theta is given as {sorted(thetas)}; keep one of them")
    scaling = scalings[0] if scalings else None
    if (
        original is not None
        and scaling is not None
        and scaling.kind == "llama3"
        and typed("original_max_position_embeddings", original, int)
        != scaling.original_max_position
    ):
        raise ModelConfigError(
            f"original_max_position_embeddings={original} in config.json and "
            f"{scaling.original_max_position} in its rope parameters contradict each other; keep "
            "one of them"
        )
    return {
        "rope_theta": thetas.pop() if thetas else family.defaults["rope_theta"],
        "rope_scaling": scaling,
    }


# What other kinds of rope read, and the plain one does not.
_SCALED_ROPE_FIELDS = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "high_freq_factor",
        "long_factor",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "short_factor",
        "truncate",
    }
)


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    read = {"rope_type", "type", "rope_theta"}

    def number(field: str, of_kind: type = float) -> Any:
        read.add(field)
        if field not in rope:
            raise ModelConfigError(
                f"rope_type={kind!r} needs the field {field!r}, which is missing"
            )
        return typed(f"rope_type={kind!r}: {field}", rope[field], of_kind)

    if kind == "default":
        scaling = None
        if unread := {field: rope[field] for field in sorted(_SCALED_ROPE_FIELDS & set(rope))}:
            logger.warning("ignored, for rope_type='default' has no use of it: %s", listed(unread))
    elif kind == "linear":
        scaling = RopeScaling(kind=kind, factor=number("factor"))
    elif kind == "llama3":
        scaling = RopeScaling(
            kind=kind,
            factor=number("factor"),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
            original_max_position=number("original_max_position_embeddings", int),
        )
    else:
        raise ModelConfigError(
            f"rope_type={shown(kind)} is not supported; supported: 'default', 'linear', 'llama3'"
        )
    if rope.get("partial_rotary_factor", 1) == 1:
        read.add("partial_rotary_factor")
    unused = _SCALED_ROPE_FIELDS if kind == "default" else frozenset()
    if unknown := sorted(set(rope) - read - unused):
        raise ModelConfigError(
            f"rope parameters {shown(unknown)} are not supported with rope_type={kind!r}; "
            f"supported: {sorted(read)}"
        )
    return scaling
