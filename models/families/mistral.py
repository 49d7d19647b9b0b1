# SPDX-License-Identifier: Apache-2.0
"""Mistral and Ministral, and Mixtral, which has experts."""

from types import MappingProxyType

from jpaged.models.config import (
    AttentionSpec,
    ExpertsSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
)
from jpaged.models.families.base import Family, Source, layer_of, stored_as
from jpaged.models.families.fields import Fields
from jpaged.models.families.llama import DEFAULTS
from jpaged.models.families.rope_fields import read_rope
from jpaged.pallas_kernels.variant import AttentionVariant


def _model(fields: Fields, kinds: list[str], mlp: MlpSpec | ExpertsSpec) -> ModelConfig:
    heads = fields.heads()
    rope, window = read_rope(fields, heads["head_dim"]), fields.optional("sliding_window", int)
    variants = [
        AttentionVariant(sliding_window=window if kind == "sliding_attention" else None)
        for kind in kinds
    ]
    return ModelConfig(
        pattern=tuple(
            LayerSpec(attention=AttentionSpec(**heads, rope=rope, variant=variant), mlp=mlp)
            for variant in variants
        ),
        norm=NormSpec(eps=fields("rms_norm_eps", float)),
        **fields.shared(),
    )


def _dense(fields: Fields) -> MlpSpec:
    return MlpSpec(
        intermediate_size=fields("intermediate_size", int), activation=fields.activation()
    )


def read_mistral(fields: Fields) -> ModelConfig:
    """Reads a config.json of Mistral: all layers have the window, or none."""
    return _model(fields, ["sliding_attention"], _dense(fields))


def read_ministral(fields: Fields) -> ModelConfig:
    """Reads a config.json of Ministral."""
    window = fields.optional("sliding_window", int)
    kinds = fields.kinds(window, lambda i: "sliding_attention", 1)
    return _model(fields, kinds, _dense(fields))


def read_mixtral(fields: Fields) -> ModelConfig:
    """Reads a config.json of Mixtral."""
    experts = ExpertsSpec(
        num_experts=fields("num_local_experts", int),
        num_experts_per_token=fields("num_experts_per_tok", int),
        intermediate_size=fields("intermediate_size", int),
        weights="renormalized",
        activation=fields.activation(),
    )
    return _model(fields, ["sliding_attention"], experts)


_EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _experts_source(path: str, shape: tuple[int, ...], config: ModelConfig) -> Source:
    layer = layer_of(path)
    if layer is None or not layer[1].startswith("mlp/"):
        return stored_as(path, shape)
    at = f"model.layers.{layer[0]}.block_sparse_moe"
    _, name, _ = layer[1].split("/")
    if name == "router":
        return Source((f"{at}.gate.weight",), shape)
    own = _EXPERT_NAMES[name]
    names = tuple(f"{at}.experts.{e}.{own}.weight" for e in range(shape[0]))
    return Source(names, shape[1:], stacked=True)


_MISTRAL = {
    **DEFAULTS,
    "intermediate_size": 14336,
    "max_position_embeddings": 4096 * 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    defaults=MappingProxyType(_MISTRAL),
    read=read_mistral,
)
MINISTRAL = Family(
    architecture="MinistralForCausalLM",
    model_type="ministral",
    defaults=MappingProxyType(_MISTRAL),
    read=read_ministral,
)
MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    defaults=MappingProxyType(
        {
            **_MISTRAL,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
        }
    ),
    read=read_mixtral,
    source=_experts_source,
)
