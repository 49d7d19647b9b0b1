# SPDX-License-Identifier: Apache-2.0
"""Qwen2, Qwen2.5 and Qwen3, dense and with experts."""

from types import MappingProxyType

from jpaged.models.config import (
    AttentionSpec,
    ExpertsSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
)
from jpaged.models.families.base import Family, GgufForm, Source, layer_of, stored_as
from jpaged.models.families.fields import Fields, shortest_period
from jpaged.models.families.llama import DEFAULTS
from jpaged.models.families.rope_fields import read_rope
from jpaged.models.json_fields import ModelConfigError
from jpaged.pallas_kernels.variant import AttentionVariant


def _attentions(fields: Fields, *, has_qwen2_bias: bool) -> list[AttentionSpec]:
    """Of one period of layers."""
    heads = fields.heads()
    rope = read_rope(fields, heads["head_dim"])
    bias = has_qwen2_bias or fields("attention_bias", bool)
    window = fields.optional("sliding_window", int)
    if not fields("use_sliding_window", bool):
        window = None
    first = fields("max_window_layers", int)
    kinds = fields.kinds(
        window,
        lambda i: "sliding_attention" if window is not None and i >= first else "full_attention",
        1 if window is None else None,
    )
    return [
        AttentionSpec(
            **heads,
            rope=rope,
            variant=AttentionVariant(
                sliding_window=window if kind == "sliding_attention" else None
            ),
            qk_norm=None if has_qwen2_bias else "head",
            qkv_bias=bias,
            out_bias=bias and not has_qwen2_bias,
        )
        for kind in kinds
    ]


def _dense(fields: Fields, *, has_qwen2_bias: bool) -> ModelConfig:
    mlp = MlpSpec(
        intermediate_size=fields("intermediate_size", int), activation=fields.activation()
    )
    attentions = _attentions(fields, has_qwen2_bias=has_qwen2_bias)
    return ModelConfig(
        pattern=tuple(LayerSpec(attention=attention, mlp=mlp) for attention in attentions),
        norm=NormSpec(eps=fields("rms_norm_eps", float)),
        **fields.shared(),
    )


def read_qwen2(fields: Fields) -> ModelConfig:
    """Reads a config.json of Qwen2 or Qwen2.5."""
    return _dense(fields, has_qwen2_bias=True)


def read_qwen3(fields: Fields) -> ModelConfig:
    """Reads a config.json of Qwen3."""
    return _dense(fields, has_qwen2_bias=False)


def read_qwen3_moe(fields: Fields) -> ModelConfig:
    """Reads a config.json of Qwen3 with experts."""
    (attention,) = _attentions(fields, has_qwen2_bias=False)
    activation = fields.activation()
    dense = MlpSpec(intermediate_size=fields("intermediate_size", int), activation=activation)
    # transformers 5 writes the second name, and reads both.
    other, count = fields.optional("num_local_experts", int), fields("num_experts", int)
    if other is not None and fields.has("num_experts") and other != count:
        raise ModelConfigError(
            f"num_experts={count} and num_local_experts={other} contradict each other; keep one"
        )
    experts = ExpertsSpec(
        num_experts=count if other is None else other,
        num_experts_per_token=fields("num_experts_per_tok", int),
        intermediate_size=fields("moe_intermediate_size", int),
        weights="renormalized" if fields("norm_topk_prob", bool) else "softmax",
        activation=activation,
    )
    num_layers, every = fields("num_hidden_layers", int), fields("decoder_sparse_step", int)
    if every < 1:
        raise ModelConfigError(f"decoder_sparse_step={every} must be at least 1")
    only = set(fields.optional("mlp_only_layers", list) or ())
    last = max((i for i in only if isinstance(i, int)), default=-1)
    # Beyond the last exception the layers repeat every so many.
    listed = min(num_layers, last + 1 + every) if only else min(num_layers, every)
    sparse = [i not in only and (i + 1) % every == 0 for i in range(max(listed, 1))]
    if only:
        sparse += [(i + 1) % every == 0 for i in range(listed, min(num_layers, 10_000))]
    pattern = [LayerSpec(attention=attention, mlp=experts if own else dense) for own in sparse]
    return ModelConfig(
        pattern=tuple(shortest_period(pattern)),
        norm=NormSpec(eps=fields("rms_norm_eps", float)),
        **fields.shared(),
    )


def _experts_source(path: str, shape: tuple[int, ...], config: ModelConfig) -> Source:
    layer = layer_of(path)
    if layer is None or not isinstance(config.layer(layer[0]).mlp, ExpertsSpec):
        return stored_as(path, shape)
    index, own = layer
    if own == "mlp/router/weight":
        return Source((f"model.layers.{index}.mlp.gate.weight",), shape)
    if not own.startswith("mlp/"):
        return stored_as(path, shape)
    _, name, _ = own.split("/")
    names = tuple(f"model.layers.{index}.mlp.experts.{e}.{name}.weight" for e in range(shape[0]))
    return Source(names, shape[1:], stacked=True)


_QWEN = {
    **DEFAULTS,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    defaults=MappingProxyType(_QWEN),
    read=read_qwen2,
    gguf=GgufForm(architecture="qwen2", bias_fields=("mlp_bias",)),  # it always has the other
)
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    defaults=MappingProxyType({**_QWEN, "head_dim": 128}),
    read=read_qwen3,
    gguf=GgufForm(architecture="qwen3"),
)
QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    defaults=MappingProxyType(
        {
            **_QWEN,
            "decoder_sparse_step": 1,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_window_layers": 0,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
        }
    ),
    read=read_qwen3_moe,
    source=_experts_source,
)
