# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 and 3: windows in most layers, norms around, an embedding that is scaled, soft caps."""

import re
from types import MappingProxyType

from jpaged.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, NormSpec
from jpaged.models.families.base import LAYER_WEIGHTS, Family, TextPart, stored_as
from jpaged.models.families.fields import Fields
from jpaged.models.families.rope_fields import read_rope
from jpaged.models.json_fields import ModelConfigError
from jpaged.models.rope import Rope
from jpaged.pallas_kernels.variant import AttentionVariant


def _model(fields: Fields, kinds: list[str], ropes: dict[str, Rope], **own) -> ModelConfig:
    heads, bias = fields.heads(), fields("attention_bias", bool)
    scalar = fields("query_pre_attn_scalar", float)
    if not scalar > 0:
        raise ModelConfigError(f"query_pre_attn_scalar={scalar} must be above 0")
    window = fields.optional("sliding_window", int)
    mlp = MlpSpec(
        intermediate_size=fields("intermediate_size", int),
        activation=fields.activation("hidden_activation"),
    )
    layers = [
        LayerSpec(
            attention=AttentionSpec(
                **heads,
                rope=ropes[kind],
                variant=AttentionVariant(
                    sm_scale=scalar**-0.5,
                    sliding_window=window if kind == "sliding_attention" else None,
                    soft_cap=fields.optional("attn_logit_softcapping", float),
                ),
                qkv_bias=bias,
                out_bias=bias,
                **own,
            ),
            mlp=mlp,
            norms="around",
        )
        for kind in kinds
    ]
    return ModelConfig(
        pattern=tuple(layers),
        norm=NormSpec(eps=fields("rms_norm_eps", float), offset=1.0, scales_float32=True),
        embedding_scale=fields("hidden_size", int) ** 0.5,
        logit_soft_cap=fields.optional("final_logit_softcapping", float),
        **fields.shared(),
    )


def read_gemma2(fields: Fields) -> ModelConfig:
    """Reads a config.json of Gemma 2."""
    window = fields.optional("sliding_window", int)
    kinds = fields.kinds(window, lambda i: "full_attention" if i % 2 else "sliding_attention", 2)
    rope = read_rope(fields, fields.heads()["head_dim"])
    return _model(fields, kinds, dict.fromkeys(kinds, rope))


def read_gemma3(fields: Fields) -> ModelConfig:
    """Reads a config.json of Gemma 3, of text alone."""
    every = fields("sliding_window_pattern", int)
    fields.read.add("_sliding_window_pattern")  # transformers' own note of it, beside layer_types
    if every < 1:
        raise ModelConfigError(f"sliding_window_pattern={every} must be at least 1")
    kinds = fields.kinds(
        fields.optional("sliding_window", int),
        lambda i: "sliding_attention" if (i + 1) % every else "full_attention",
        every,
    )
    head_dim = fields.heads()["head_dim"]
    ropes = {
        "full_attention": read_rope(fields, head_dim, "full_attention"),
        "sliding_attention": read_rope(
            fields, head_dim, "sliding_attention", "rope_local_base_freq"
        ),
    }
    return _model(fields, kinds, ropes, qk_norm="head")


_NAMES = {
    **LAYER_WEIGHTS,
    "attention_out_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "mlp_out_norm/scale": "post_feedforward_layernorm.weight",
}
_GEMMA = {
    "attention_bias": False,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256.0,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    defaults=MappingProxyType(
        {
            **_GEMMA,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "max_position_embeddings": 8192,
            "rope_theta": 10_000.0,
            "vocab_size": 256000,
        }
    ),
    read=read_gemma2,
    source=lambda path, shape, config: stored_as(path, shape, _NAMES),
)
GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    defaults=MappingProxyType(
        {
            **_GEMMA,
            "max_position_embeddings": 131072,
            "rope_local_base_freq": 10_000.0,
            "rope_theta": 1_000_000.0,
            "sliding_window_pattern": 6,
            "vocab_size": 262208,
        }
    ),
    read=read_gemma3,
    source=lambda path, shape, config: stored_as(path, shape, _NAMES),
)
# The larger models of Gemma 3 see images; transformers 4 and 5 name their tensors differently.
GEMMA3_TEXT = TextPart(
    architecture="Gemma3ForConditionalGeneration",
    model_type="gemma3",
    family=GEMMA3.architecture,
    renamed=MappingProxyType({"model.language_model.": "model.", "language_model.": ""}),
    left_out=re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\."),
)
