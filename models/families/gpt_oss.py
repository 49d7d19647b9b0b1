# SPDX-License-Identifier: Apache-2.0
"""gpt-oss: experts in every layer, sinks, windows in every other layer, and MXFP4 weights."""

from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.models.config import AttentionSpec, ExpertsSpec, LayerSpec, ModelConfig, NormSpec
from jpaged.models.families.base import (
    INERT_FIELDS,
    LAYER_WEIGHTS,
    NEUTRAL_FIELDS,
    Family,
    Source,
    layer_of,
    stored_as,
)
from jpaged.models.families.fields import Fields
from jpaged.models.families.rope_fields import read_rope
from jpaged.models.json_fields import ModelConfigError, typed
from jpaged.models.mxfp4 import BLOCK_VALUES, dequantised
from jpaged.pallas_kernels.variant import AttentionVariant


def read(fields: Fields) -> ModelConfig:
    """Reads a config.json."""
    heads, bias = fields.heads(), fields("attention_bias", bool)
    window = fields.optional("sliding_window", int)
    rope = read_rope(fields, heads["head_dim"])
    experts = ExpertsSpec(
        num_experts=fields("num_local_experts", int),
        num_experts_per_token=fields("num_experts_per_tok", int),
        intermediate_size=fields("intermediate_size", int),
        weights="softmax_of_chosen",
        activation="swiglu_oai",
        limit=fields("swiglu_limit", float),
        bias=True,
    )
    kinds = fields.kinds(window, lambda i: "full_attention" if i % 2 else "sliding_attention", 2)
    layers = [
        LayerSpec(
            attention=AttentionSpec(
                **heads,
                rope=rope,
                variant=AttentionVariant(
                    sliding_window=window if kind == "sliding_attention" else None
                ),
                qkv_bias=bias,
                out_bias=bias,
                sinks=True,
            ),
            mlp=experts,
        )
        for kind in kinds
    ]
    return ModelConfig(
        pattern=tuple(layers),
        norm=NormSpec(eps=fields("rms_norm_eps", float), scales_float32=True),
        packing=_packing(fields),
        **fields.shared(),
    )


def _packing(fields: Fields) -> str | None:
    """How the experts' weights are stored: "mxfp4", or None as they are."""
    if not fields.raw("quantization_config"):
        return None
    quantization = typed("quantization_config", fields.raw("quantization_config"), dict)
    if quantization.get("quant_method") != "mxfp4":
        raise fields.unsupported("quantization_config", "quant_method 'mxfp4', or none")
    for name in ("hidden_size", "intermediate_size"):
        if (size := fields(name, int)) % BLOCK_VALUES:
            raise ModelConfigError(
                f"{name}={size} must be a multiple of {BLOCK_VALUES}, the numbers of a block of "
                "MXFP4, where quantization_config says that weights are stored so"
            )
    return "mxfp4"


_NAMES = {
    **LAYER_WEIGHTS,
    "attention/sinks": "self_attn.sinks",
    "mlp/router/weight": "mlp.router.weight",
    "mlp/router/bias": "mlp.router.bias",
}
# Gate and up lie in one tensor, row by row in turn.
_PARTS = MappingProxyType(
    {
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", 1),
        "down_proj": ("down_proj", 0),
    }
)


def _source(path: str, shape: tuple[int, ...], config: ModelConfig) -> Source:
    layer = layer_of(path)
    name = layer[1].split("/")[1] if layer is not None else ""
    if layer is None or not layer[1].startswith("mlp/") or name not in _PARTS:
        return stored_as(path, shape, _NAMES)
    index, own = layer
    stored, first = _PARTS[name]
    both = 2 if stored == "gate_up_proj" else 1
    tensor = f"model.layers.{index}.mlp.experts.{stored}"
    if own.endswith("bias"):
        experts, features = shape
        return Source(
            (f"{tensor}_bias",), (experts, both * features), view=lambda bias: bias[:, first::both]
        )
    experts, features, size = shape
    if config.packing is None:
        return Source(
            (tensor,),
            (experts, size, both * features),
            view=lambda weight: weight[:, :, first::both].swapaxes(1, 2),
        )
    blocks = (experts, both * features, size // BLOCK_VALUES)

    def unpack(values: np.ndarray, scales: np.ndarray, dtype: jnp.dtype) -> jax.Array:
        return dequantised(values[:, first::both], scales[:, first::both], dtype)

    return Source(
        (f"{tensor}_blocks",),
        (*blocks, BLOCK_VALUES // 2),
        scales=(f"{tensor}_scales", blocks),
        unpack=unpack,
    )


FAMILY = Family(
    architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    defaults=MappingProxyType(
        {
            "attention_bias": True,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "max_position_embeddings": 131072,
            "num_attention_heads": 64,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "num_local_experts": 128,
            "rms_norm_eps": 1e-5,
            "rope_parameters": MappingProxyType(
                {
                    "rope_type": "yarn",
                    "factor": 32.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "truncate": False,
                    "original_max_position_embeddings": 4096,
                }
            ),
            "rope_theta": 150_000.0,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
            "vocab_size": 201088,
        }
    ),
    read=read,
    source=_source,
    neutral=MappingProxyType(
        {
            **{name: v for name, v in NEUTRAL_FIELDS.items() if name != "quantization_config"},
            "hidden_act": ("silu",),
            "swiglu_alpha": (1.702,),
        }
    ),
    # Of the published files: names of OpenAI's own code, beside those that transformers reads.
    inert=INERT_FIELDS | {"experts_per_token", "initial_context_length"},
)
