# SPDX-License-Identifier: Apache-2.0
"""What differs between model families, as data: config fields and weight names."""

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType

# Fields of config.json that say nothing about what inference computes.
_INERT_FIELDS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "dtype",
        "initializer_range",
        "model_type",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        # Generation defaults that old transformers releases wrote into config.json.
        "_attn_implementation_autoset",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    Attributes:
      model_type: `model_type` of its config.json.
      qk_norm: whether queries and keys are normed per head.
      default_head_dim: head_dim where config.json has none; None means hidden_size / heads.
      required_values: fields that must hold one of the given values where they are present, because
        the decoder computes nothing else.
      inert_fields: fields that have no effect once `required_values` hold.
    """

    model_type: str
    qk_norm: bool
    default_head_dim: int | None
    required_values: Mapping[str, tuple]
    inert_fields: frozenset[str]


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(
            model_type="llama",
            qk_norm=False,
            default_head_dim=None,
            required_values=MappingProxyType(
                {
                    "hidden_act": ("silu",),
                    "attention_bias": (False,),
                    "mlp_bias": (False,),
                    "pretraining_tp": (1,),
                }
            ),
            inert_fields=_INERT_FIELDS,
        ),
        "Qwen3ForCausalLM": Family(
            model_type="qwen3",
            qk_norm=True,
            default_head_dim=128,
            required_values=MappingProxyType(
                {
                    "hidden_act": ("silu",),
                    "attention_bias": (False,),
                    "use_sliding_window": (False, None),
                }
            ),
            # Only read by transformers where use_sliding_window is true.
            inert_fields=_INERT_FIELDS | {"sliding_window", "max_window_layers"},
        ),
    }
)

# Our parameter paths beside the names that both families give their tensors.
_MODEL_WEIGHTS = {
    "embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
_LAYER_WEIGHTS = {
    "attention_norm/scale": "input_layernorm.weight",
    "attention/q_proj/weight": "self_attn.q_proj.weight",
    "attention/k_proj/weight": "self_attn.k_proj.weight",
    "attention/v_proj/weight": "self_attn.v_proj.weight",
    "attention/o_proj/weight": "self_attn.o_proj.weight",
    "attention/q_norm/scale": "self_attn.q_norm.weight",
    "attention/k_norm/scale": "self_attn.k_norm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate_proj/weight": "mlp.gate_proj.weight",
    "mlp/up_proj/weight": "mlp.up_proj.weight",
    "mlp/down_proj/weight": "mlp.down_proj.weight",
}
_LAYER = re.compile(r"layers_(\d+)/(.+)")

# Buffers that old checkpoints carry and that are computed here instead.
IGNORED_TENSORS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def tensor_name(param_path: str) -> str:
    """The checkpoint's name of a parameter, e.g. `layers_3/mlp/up_proj/weight`."""
    match = _LAYER.fullmatch(param_path)
    if match is None:
        return _MODEL_WEIGHTS[param_path]
    return f"model.layers.{match[1]}.{_LAYER_WEIGHTS[match[2]]}"
