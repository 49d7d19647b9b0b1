# SPDX-License-Identifier: Apache-2.0
"""OLMo 2: norms after attention and MLP, and over all of a token's queries and keys."""

from types import MappingProxyType

from jpaged.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, NormSpec
from jpaged.models.families.base import LAYER_WEIGHTS, Family, stored_as
from jpaged.models.families.fields import Fields
from jpaged.models.families.llama import DEFAULTS
from jpaged.models.families.rope_fields import read_rope


def read(fields: Fields) -> ModelConfig:
    """Reads a config.json."""
    heads, bias = fields.heads(), fields("attention_bias", bool)
    layer = LayerSpec(
        attention=AttentionSpec(
            **heads,
            rope=read_rope(fields, heads["head_dim"]),
            qk_norm="all",
            qkv_bias=bias,
            out_bias=bias,
        ),
        mlp=MlpSpec(
            intermediate_size=fields("intermediate_size", int), activation=fields.activation()
        ),
        norms="after",
    )
    return ModelConfig(
        pattern=(layer,),
        norm=NormSpec(eps=fields("rms_norm_eps", float), scales_float32=True),
        **fields.shared(),
    )


_NAMES = {
    **LAYER_WEIGHTS,
    "attention_out_norm/scale": "post_attention_layernorm.weight",
    "mlp_out_norm/scale": "post_feedforward_layernorm.weight",
}
FAMILY = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    defaults=MappingProxyType({**DEFAULTS, "rms_norm_eps": 1e-5, "vocab_size": 50304}),
    read=read,
    source=lambda path, shape, config: stored_as(path, shape, _NAMES),
)
