# SPDX-License-Identifier: Apache-2.0
"""Llama 2 to 3.x, and what has its shape: SmolLM2, TinyLlama."""

from types import MappingProxyType

from jpaged.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, NormSpec
from jpaged.models.families.base import NEUTRAL_FIELDS, Family, GgufForm
from jpaged.models.families.fields import Fields
from jpaged.models.families.rope_fields import read_rope


def read(fields: Fields) -> ModelConfig:
    """Reads a config.json."""
    heads, bias = fields.heads(), fields("attention_bias", bool)
    layer = LayerSpec(
        attention=AttentionSpec(
            **heads, rope=read_rope(fields, heads["head_dim"]), qkv_bias=bias, out_bias=bias
        ),
        mlp=MlpSpec(
            intermediate_size=fields("intermediate_size", int),
            activation=fields.activation(),
            bias=fields("mlp_bias", bool),
        ),
    )
    fields.kinds(None, lambda i: "full_attention", 1)
    return ModelConfig(
        pattern=(layer,), norm=NormSpec(eps=fields("rms_norm_eps", float)), **fields.shared()
    )


DEFAULTS = {
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    defaults=MappingProxyType(DEFAULTS),
    read=read,
    # transformers has no window in this family, but keeps only so many tokens of the cache.
    neutral=MappingProxyType(
        {**NEUTRAL_FIELDS, "sliding_window": (), "use_sliding_window": (False,)}
    ),
    gguf=GgufForm(architecture="llama", pairs_are_neighbours=True),
)
