# SPDX-License-Identifier: Apache-2.0
"""What differs between model families, as data: config fields and weight names."""

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# Fields of config.json that change nothing at these values, and would (here, in transformers or in
# the runtimes that write them) at others.
_NEUTRAL_FIELDS = MappingProxyType(
    {
        "add_cross_attention": (False,),
        "attention_bias": (False,),
        "attention_chunk_size": (),
        "hidden_act": ("silu", "swish"),
        "is_causal": (True,),
        "is_encoder_decoder": (False,),
        "mlp_bias": (False,),
        "partial_rotary_factor": (1.0,),
        "quantization_config": (),
        "rope_interleaved": (False,),
        "use_sliding_window": (False,),
    }
)

# Fields of config.json that say nothing about what inference computes.
_INERT_FIELDS = frozenset(
    {
        # Names, versions, and where the model comes from.
        "_commit_hash",
        "_name_or_path",
        "auto_map",
        "base_model_name_or_path",
        "is_llama_config",
        "library_name",
        "license",
        "model_name",
        "name_or_path",
        "tags",
        "transformers_version",
        "transformers.js_config",
        # How transformers computes, in which type, and what it returns.
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_experts_implementation_internal",
        "_flash_attn_2_enabled",
        "attn_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "experts_implementation",
        "is_decoder",
        "keys_to_ignore_at_inference",
        "pretraining_tp",
        "return_dict",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tie_last_hidden_states",
        "torch_dtype",
        "torchscript",
        "use_bfloat16",
        "use_flash_attention",
        "use_flash_attention_2",
        "use_flash_attn",
        "use_return_dict",
        # Training.
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_pdrop",
        "embd_pdrop",
        "gradient_checkpointing",
        "hidden_dropout",
        "hidden_dropout_prob",
        "initializer_factor",
        "initializer_range",
        "resid_pdrop",
        # Lengths that were claimed beside max_position_embeddings, which is the one that counts.
        "max_seq_len",
        "max_sequence_length",
        "model_max_length",
        "seq_length",
        "sequence_length",
        # Of tokenizers, classifiers and pipelines.
        "cls_token_id",
        "finetuning_task",
        "id2label",
        "label2id",
        "mask_token_id",
        "num_labels",
        "prefix",
        "problem_type",
        "sep_token_id",
        "task_specific_params",
        "tokenizer_class",
        "unk_token_id",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    Attributes:
      model_type: `model_type` of its config.json.
      qk_norm: whether queries and keys are normed per head.
      defaults: what transformers takes for a field that config.json leaves out, by its name there.
        Without one, num_key_value_heads is the number of query heads, and head_dim hidden_size /
        heads.
      neutral_fields: fields that change nothing at the values given, and that must hold one of them
        where they are present, because the decoder computes nothing else.
      inert_fields: fields that change nothing once `neutral_fields` hold.
    """

    model_type: str
    qk_norm: bool
    defaults: Mapping[str, Any]
    neutral_fields: Mapping[str, tuple]
    inert_fields: frozenset[str]


_DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(
            model_type="llama",
            qk_norm=False,
            defaults=MappingProxyType(
                _DEFAULTS
                | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048}
            ),
            # transformers has no window in this family, but keeps only so many tokens of the cache.
            neutral_fields=MappingProxyType({**_NEUTRAL_FIELDS, "sliding_window": ()}),
            inert_fields=_INERT_FIELDS,
        ),
        "Qwen3ForCausalLM": Family(
            model_type="qwen3",
            qk_norm=True,
            defaults=MappingProxyType(
                _DEFAULTS
                | {
                    "vocab_size": 151936,
                    "intermediate_size": 22016,
                    "num_key_value_heads": 32,
                    "head_dim": 128,
                    "max_position_embeddings": 32768,
                }
            ),
            neutral_fields=_NEUTRAL_FIELDS,
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

# Buffers that old checkpoints carry: rotary tables, causal masks and position numbers, which are
# computed here instead. No parameter of these families is called so.
IGNORED_TENSORS = re.compile(
    r"(.+\.)?(rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)|position_ids|masked_bias"
    r"|(self_)?attn\.bias)"
)


def tensor_name(param_path: str) -> str:
    """The checkpoint's name of a parameter, e.g. `layers_3/mlp/up_proj/weight`."""
    match = _LAYER.fullmatch(param_path)
    if match is None:
        return _MODEL_WEIGHTS[param_path]
    return f"model.layers.{match[1]}.{_LAYER_WEIGHTS[match[2]]}"
