# SPDX-License-Identifier: Apache-2.0
"""A decoder's shape as Hugging Face's config.json says it: read and written."""

import dataclasses
import json
import pathlib
from typing import Any

from jpaged.models import generation_config
from jpaged.models.config import MlpSpec, ModelConfig
from jpaged.models.families import FAMILIES, TEXT_PARTS, text_part
from jpaged.models.families.base import Family
from jpaged.models.families.fields import Fields, token_ids
from jpaged.models.json_fields import FieldPolicy, ModelConfigError, listed, read_json, shown, typed
from jpaged.models.kv_scales import quantizes_kv_alone
from jpaged.models.paths import is_there
from jpaged.models.rope import LinearScaling, Llama3Scaling


def load_config(directory: pathlib.Path) -> ModelConfig:
    """Reads `config.json`, and the stop tokens of `generation_config.json` where there is one.

    Raises:
      FileNotFoundError: as `check_directory`.
      ModelConfigError: if it is not JSON or describes a model that is not supported.
    """
    check_directory(directory)
    path = directory / "config.json"
    fields = read_json(path)
    try:
        config = config_from_hf(fields)
    except ModelConfigError as e:
        raise ModelConfigError(f"{path}: {e}") from e
    generation_path = directory / generation_config.FILE
    if not is_there(generation_path):
        return config
    # Chat models list more stop tokens there than in config.json, and that file wins. Where it has
    # none, or null, config.json's count: transformers would go on to the longest length then.
    eos = read_json(generation_path).get("eos_token_id")
    ids = token_ids(f"{generation_config.FILE}: eos_token_id", eos, config.vocab_size)
    return dataclasses.replace(config, eos_token_ids=ids) if ids else config


def check_directory(directory: pathlib.Path) -> None:
    """Raises FileNotFoundError, with what to name instead, if it is no model directory."""
    if not directory.is_dir():
        what = "is no directory" if directory.exists() else "does not exist"
        raise FileNotFoundError(f"model directory {str(directory)!r} {what}")
    if (directory / "config.json").exists():
        return
    remedy = "not a model directory"
    if (directory.parent / "config.json").exists():
        remedy = f"the model directory is the folder above it: {str(directory.parent)!r}"
    for other in sorted(directory.glob("*.gguf"))[:1]:
        remedy = f"to load a GGUF file, name it itself: {str(other)!r}"
    raise FileNotFoundError(f"{str(directory)!r} has no config.json: {remedy}")


# Names of ours that errors use, and that readers of config.json look for in vain.
_THEIR_NAMES = (
    ("num_layers", "num_hidden_layers"),
    ("num_q_heads", "num_attention_heads"),
    ("num_kv_heads", "num_key_value_heads"),
    ("original_max_position", "original_max_position_embeddings"),
)
# Fields that are read by hand, here and in `models.checkpoint`.
_DERIVED_FIELDS = frozenset({"architectures", "model_type", "transformers_weights"})


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
    fields = _of_text(fields)
    if quantizes_kv_alone(fields.get("quantization_config")):
        fields = fields | {"quantization_config": None}
    try:
        config = _config(fields)
    except ValueError as e:
        calls = [
            f"{ours} is {theirs}"
            for ours, theirs in _THEIR_NAMES
            if f"{ours}=" in str(e) and theirs not in str(e)
        ]
        if calls:
            raise ModelConfigError(f"{e} (in config.json, {' and '.join(calls)})") from e
        if isinstance(e, ModelConfigError):
            raise
        raise ModelConfigError(str(e)) from e  # of an attention that no kernel computes
    # Written with parameters, which are unpacked.
    kept = {name: value for name, value in fields.items() if name != "quantization_config"}
    return dataclasses.replace(config, source=json.dumps(kept))


# Of a model that sees images, what its text part may leave to the whole.
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config")


def _of_text(fields: dict[str, Any]) -> dict[str, Any]:
    """Of a config.json of more than text, that of its text part; any other as it is."""
    part = text_part(fields)
    if part is None:
        return fields
    own = typed("text_config", fields.get("text_config"), dict)
    missing = {name: fields[name] for name in _OF_THE_WHOLE if name in fields and name not in own}
    model_type = FAMILIES[part.family].model_type
    return {**own, **missing, "architectures": [part.family], "model_type": model_type}


def _config(fields: dict[str, Any]) -> ModelConfig:
    name = _family_name(fields)
    family = FAMILIES[name]
    if fields.get("model_type") not in (None, family.model_type):
        raise ModelConfigError(
            f"model_type={shown(fields['model_type'])} does not go with architecture {name}, "
            f"whose model_type is {family.model_type!r}"
        )
    _check_values(family, fields)
    reader = Fields(name, fields, family.defaults)
    config = family.read(reader)
    _check_mlp_types(reader, config)
    policy = _policy(family, reader.read | _DERIVED_FIELDS)
    if unknown := policy.unknown(fields):
        raise ModelConfigError(
            f"config.json has fields that are not supported for {name}: {listed(unknown)}. They "
            "could change what the model computes, so they are not ignored"
        )
    return config


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `config_from_hf`, in the form transformers 5 writes and reads.

    Raises:
      ModelConfigError: for a config that would not be read back as it is, as one that was changed
        after it was read, or was not read and has other layers than `dense_config`'s.
    """
    fields = _dense_fields(config) if config.source is None else json.loads(config.source)
    fields["tie_word_embeddings"] = config.tie_word_embeddings
    fields["bos_token_id"] = config.bos_token_id
    fields["eos_token_id"] = list(config.eos_token_ids) or None
    back = config_from_hf(fields)
    # What is packed is written unpacked, and so read back.
    apart = ("source", "packing")
    names = (field.name for field in dataclasses.fields(config) if field.name not in apart)
    if other := [name for name in names if getattr(config, name) != getattr(back, name)]:
        raise ModelConfigError(
            f"this {config.family} cannot be written as config.json: {', '.join(other)} would be "
            "read back as something else"
        )
    return fields


def _dense_fields(config: ModelConfig) -> dict[str, Any]:
    (layer, *more), norm = config.pattern, config.norm
    attention, mlp = layer.attention, layer.mlp
    if more or not isinstance(mlp, MlpSpec) or attention.rope is None:
        raise ModelConfigError(
            f"a {config.family} cannot be written as config.json, for it was not read from one"
        )
    fields: dict[str, Any] = {
        "architectures": [config.family],
        "model_type": FAMILIES[config.family].model_type,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": mlp.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_q_heads,
        "rms_norm_eps": norm.eps,
        "max_position_embeddings": config.max_position_embeddings,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": attention.rope.theta}
    scaling = attention.rope.scaling
    if isinstance(scaling, LinearScaling):
        rope |= {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Llama3Scaling):
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return fields | {"rope_parameters": rope}


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
            f"supported: {[*sorted(FAMILIES), *(part.architecture for part in TEXT_PARTS)]}"
        )
    return supported[0]


def _policy(family: Family, read: set[str] | frozenset[str]) -> FieldPolicy:
    return FieldPolicy(
        read=read,
        neutral=family.neutral,
        inert=family.inert | generation_config.FIELDS,
        inert_prefixes=("unsloth_",),
    )


def _check_values(family: Family, fields: dict[str, Any]) -> None:
    if refused := _policy(family, frozenset()).refused(fields):
        field = min(refused)
        raise ModelConfigError(
            f"{field}={shown(fields[field])} is not supported for {family.architecture}; "
            f"supported: {refused[field]}"
        )


def _check_mlp_types(reader: Fields, config: ModelConfig) -> None:
    kinds = reader.optional("mlp_layer_types", list)
    if not kinds:
        return
    dense = all(isinstance(layer.mlp, MlpSpec) for layer in config.pattern)
    if not dense or any(kind != "dense" for kind in kinds):
        raise reader.unsupported("mlp_layer_types", "'dense' in every layer")
    if len(kinds) != config.num_layers:
        raise ModelConfigError(
            f"mlp_layer_types has {len(kinds)} entries for num_hidden_layers={config.num_layers}: "
            "they contradict each other"
        )
