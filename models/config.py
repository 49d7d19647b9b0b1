# SPDX-License-Identifier: Apache-2.0
"""The shape of a decoder, independent of where its description came from."""

import dataclasses
import json
import math
import pathlib
import typing
from typing import Any

from models.families import FAMILIES, Family


class ModelConfigError(ValueError):
    """A model description that this code cannot honour; the message names field and value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was first trained on.

    Attributes:
      kind: "linear" divides every frequency by `factor`; "llama3" divides the long wavelengths only
        and blends in between.
      factor: the stretch, >= 1.
      low_freq_factor: llama3 only; wavelengths above `original_max_position / low_freq_factor`
        tokens are stretched fully.
      high_freq_factor: llama3 only; wavelengths below `original_max_position / high_freq_factor`
        tokens are left alone.
      original_max_position: llama3 only; the context, in tokens, before stretching.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ModelConfigError(f"rope kind={self.kind!r} must be 'linear' or 'llama3'")
        if not 1 <= self.factor < math.inf:
            raise ModelConfigError(f"rope factor={self.factor} must be finite and at least 1")
        if self.original_max_position < 1:
            raise ModelConfigError(
                f"rope original_max_position={self.original_max_position} must be at least 1"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ModelConfigError(
                f"rope low_freq_factor={self.low_freq_factor} must be above 0 and below "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything `models.decoder` needs to know about a dense decoder.

    Attributes:
      family: architecture name as Hugging Face writes it, a key of `models.families.FAMILIES`.
      vocab_size: rows of the embedding table.
      hidden_size: width of the residual stream.
      intermediate_size: width of the gated MLP.
      num_layers: decoder layers.
      num_q_heads: query heads.
      num_kv_heads: key-value heads; divides `num_q_heads`.
      head_dim: width of one head; need not be hidden_size / num_q_heads.
      rms_norm_eps: added to the mean square in every norm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None for plain rotary embeddings.
      qk_norm: whether queries and keys are normed per head before rotation (Qwen3).
      tie_word_embeddings: whether the output head is the embedding table.
      max_position_embeddings: longest context, in tokens, that the model was made for.
      bos_token_id: first token of a document, or None.
      eos_token_ids: tokens that end a generation; may be empty.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_q_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ModelConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_q_heads % self.num_kv_heads:
            raise ModelConfigError(
                f"num_q_heads={self.num_q_heads} must be a multiple of num_kv_heads="
                f"{self.num_kv_heads}: every KV head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ModelConfigError(
                f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs of lanes"
            )
        if not 0 < self.rope_theta < math.inf:
            raise ModelConfigError(f"rope_theta={self.rope_theta} must be finite and above 0")
        if not 0 <= self.rms_norm_eps < math.inf:
            raise ModelConfigError(
                f"rms_norm_eps={self.rms_norm_eps} must be finite and at least 0"
            )

    @property
    def num_params(self) -> int:
        """Parameters, the tied head counted once."""
        d, hd = self.hidden_size, self.head_dim
        attention = d * hd * (2 * self.num_q_heads + 2 * self.num_kv_heads)
        norms = 2 * d + (2 * hd if self.qk_norm else 0)
        per_layer = attention + 3 * d * self.intermediate_size + norms
        heads = 1 if self.tie_word_embeddings else 2
        return self.num_layers * per_layer + heads * self.vocab_size * d + d

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of one token's keys and values over all layers, `itemsize` bytes a number."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


def load_config(directory: pathlib.Path) -> ModelConfig:
    """Reads `config.json`, and the stop tokens of `generation_config.json` where there is one.

    Raises:
      FileNotFoundError: if `config.json` is missing.
      ModelConfigError: if it is not JSON or describes a model that is not supported.
    """
    config = config_from_hf(_read_json(directory / "config.json"))
    generation_path = directory / "generation_config.json"
    if not generation_path.exists():
        return config
    # Chat models list more stop tokens there than in config.json; transformers lets that file win.
    eos = _read_json(generation_path).get("eos_token_id")
    if eos is None:
        return config
    return dataclasses.replace(config, eos_token_ids=_eos_token_ids(eos))


def _read_json(path: pathlib.Path) -> dict:
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as e:  # bad JSON, or bytes that are no text
        raise ModelConfigError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(fields, dict):
        raise ModelConfigError(f"{path} must hold a JSON object, not a {type(fields).__name__}")
    return fields


# config.json's name of a field, ours, and its value where it is absent (None: it must be there).
_FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("vocab_size", "vocab_size", None),
    ("hidden_size", "hidden_size", None),
    ("intermediate_size", "intermediate_size", None),
    ("num_hidden_layers", "num_layers", None),
    ("num_attention_heads", "num_q_heads", None),
    ("rms_norm_eps", "rms_norm_eps", 1e-6),
    ("tie_word_embeddings", "tie_word_embeddings", False),
    ("max_position_embeddings", "max_position_embeddings", 2048),
)
_TYPES = typing.get_type_hints(ModelConfig)
_ROPE_FIELDS = ("rope_parameters", "rope_scaling")
# Fields that `config_from_hf` reads by hand below.
_DERIVED_FIELDS = frozenset(
    {
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "bos_token_id",
        "eos_token_id",
        "layer_types",
    }
)


def config_from_hf(fields: dict[str, Any]) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`, as transformers 4 or 5 writes it.

    Every field must be understood: one that is unknown, or whose value this decoder does not
    compute, is an error, because ignoring it would give wrong text without a word.

    Args:
      fields: the parsed JSON object.

    Returns:
      The config.

    Raises:
      ModelConfigError: naming the field, its value and what is supported.
    """
    architectures = fields.get("architectures") or []
    name = architectures[0] if len(architectures) == 1 else ""
    if name not in FAMILIES:
        raise ModelConfigError(
            f"architectures={architectures!r} is not supported; supported: {sorted(FAMILIES)}"
        )
    family = FAMILIES[name]
    _check_fields(name, family, fields)
    values: dict[str, Any] = {"family": name, "qk_norm": family.qk_norm}
    for hf_name, our_name, default in _FIELDS:
        value = fields.get(hf_name, default)
        if value is None:
            raise ModelConfigError(f"config.json has no {hf_name!r}, which {name} needs")
        values[our_name] = _typed(hf_name, value, _TYPES[our_name])
    num_heads = values["num_q_heads"]
    # Of no heads at all, ModelConfig complains.
    head_dim = family.default_head_dim or values["hidden_size"] // max(num_heads, 1)
    for hf_name, our_name, default in (
        ("num_key_value_heads", "num_kv_heads", num_heads),
        ("head_dim", "head_dim", head_dim),
    ):
        value = default if fields.get(hf_name) is None else fields[hf_name]
        values[our_name] = _typed(hf_name, value, int)
    values |= _rope(fields)
    if fields.get("bos_token_id") is not None:
        values["bos_token_id"] = _typed("bos_token_id", fields["bos_token_id"], int)
    values["eos_token_ids"] = _eos_token_ids(fields.get("eos_token_id"))
    return ModelConfig(**values)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `config_from_hf`, in the form transformers 5 writes and reads."""
    fields: dict[str, Any] = {
        "architectures": [config.family],
        "model_type": FAMILIES[config.family].model_type,
        "hidden_act": "silu",
    }
    fields |= {hf_name: getattr(config, our_name) for hf_name, our_name, _ in _FIELDS}
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


def _typed(field: str, value: Any, kind: type) -> Any:
    """The value as a `kind`, or an error: JSON's "32" is not 32, nor its true 1."""
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
        raise ModelConfigError(f"{field}={value!r} must be of type {kind.__name__}")
    return kind(value)


def _eos_token_ids(eos: Any) -> tuple[int, ...]:
    if eos is None:
        return ()
    return tuple(_typed("eos_token_id", t, int) for t in (eos if isinstance(eos, list) else [eos]))


def _check_fields(name: str, family: Family, fields: dict[str, Any]) -> None:
    if fields.get("model_type", family.model_type) != family.model_type:
        raise ModelConfigError(
            f"model_type={fields['model_type']!r} does not go with architecture {name}, "
            f"whose model_type is {family.model_type!r}"
        )
    for field, allowed in family.required_values.items():
        if fields.get(field, allowed[0]) not in allowed:
            raise ModelConfigError(
                f"{field}={fields[field]!r} is not supported for {name}; supported: "
                + " or ".join(repr(value) for value in allowed)
            )
    if set(fields.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        raise ModelConfigError(
            f"layer_types={fields['layer_types']!r} is not supported for {name}; supported: "
            "'full_attention' in every layer"
        )
    known = {hf_name for hf_name, _, _ in _FIELDS} | _DERIVED_FIELDS
    unknown = sorted(set(fields) - known - set(family.required_values) - family.inert_fields)
    if unknown:
        listed = ", ".join(f"{field}={fields[field]!r}" for field in unknown)
        raise ModelConfigError(
            f"config.json has fields that are not supported for {name}: {listed}. They could "
            "change what the model computes, so they are not ignored"
        )


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling: transformers 5 keeps all in rope_parameters, 4 beside it."""
    places = [_typed(field, fields[field], dict) for field in _ROPE_FIELDS if fields.get(field)]
    scalings = [_rope_scaling(place) for place in places]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise ModelConfigError(
            f"rope_parameters={places[0]!r} and rope_scaling={places[1]!r} contradict each other; "
            "keep one of them"
        )
    given = [place.get("rope_theta") for place in (*places, fields)]
    thetas = {_typed("rope_theta", theta, float) for theta in given if theta is not None}
    if len(thetas) > 1:
        raise ModelConfigError(f"rope_theta is given as {sorted(thetas)}; keep one of them")
    return {
        "rope_theta": thetas.pop() if thetas else 10000.0,
        "rope_scaling": scalings[0] if scalings else None,
    }


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    read = {"rope_type", "type", "rope_theta"}

    def number(field: str) -> float:
        return _typed(f"rope_type={kind!r}: {field}", rope[field], float)

    try:
        if kind == "default":
            scaling = None
        elif kind == "linear":
            scaling = RopeScaling(kind=kind, factor=number("factor"))
            read |= {"factor"}
        elif kind == "llama3":
            scaling = RopeScaling(
                kind=kind,
                factor=number("factor"),
                low_freq_factor=number("low_freq_factor"),
                high_freq_factor=number("high_freq_factor"),
                original_max_position=_typed(
                    f"rope_type={kind!r}: original_max_position_embeddings",
                    rope["original_max_position_embeddings"],
                    int,
                ),
            )
            read |= {
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            }
        else:
            raise ModelConfigError(
                f"rope_type={kind!r} is not supported; supported: 'default', 'linear', 'llama3'"
            )
    except KeyError as e:
        raise ModelConfigError(f"rope_type={kind!r} needs the field {e}, which is missing") from e
    if unknown := sorted(set(rope) - read):
        raise ModelConfigError(
            f"rope parameters {unknown} are not supported with rope_type={kind!r}; supported: "
            f"{sorted(read)}"
        )
    return scaling
