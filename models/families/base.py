# SPDX-License-Identifier: Apache-2.0
"""What a family is: how its config.json is read, and where each of its parameters is stored."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.models.config import ModelConfig
from jpaged.models.families.fields import Fields

# Fields of config.json that change nothing at these values, and would (here, in transformers or in
# the runtimes that write them) at others.
NEUTRAL_FIELDS = MappingProxyType(
    {
        "add_cross_attention": (False,),
        "attention_chunk_size": (),
        "is_causal": (True,),
        "is_encoder_decoder": (False,),
        "quantization_config": (),
        "rope_interleaved": (False,),
    }
)

# Fields of config.json that say nothing about what inference computes.
INERT_FIELDS = frozenset(
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
        "output_router_logits",
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
        "router_aux_loss_coef",
        "router_jitter_noise",
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


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a checkpoint has a parameter.

    Attributes:
      names: the tensors that it is made of.
      shape: of each of them, as it is stored.
      stacked: whether they are stacked along a new first axis; otherwise there is one.
      part: which of their rows; None takes all.
      view: of what was read, the parameter, as a view in NumPy's sense with the same first axis:
        what is written to it is written to the tensor. None is all of it.
      scales: of packed weights, the tensor of their scales and its shape; both are of bytes.
      unpack: makes the parameter of packed weights and their scales, in a dtype; of some along the
        first axis, as much of the parameter.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool = False
    part: slice | None = None
    view: Callable[[np.ndarray], np.ndarray] | None = None
    scales: tuple[str, tuple[int, ...]] | None = None
    unpack: Callable[[np.ndarray, np.ndarray, jnp.dtype], jax.Array] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that is read, and its shape."""
        scales = () if self.scales is None else (self.scales,)
        return dict.fromkeys(self.names, self.shape) | dict(scales)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufForm:
    """How a GGUF file has a model of a family.

    Attributes:
      architecture: what `general.architecture` says.
      pairs_are_neighbours: whether the two dimensions that rotary embeddings turn together follow
        each other in query and key weights, rather than half of a head apart.
      bias_fields: of config.json, that say what the file says by having biases, or not.
    """

    architecture: str
    pairs_are_neighbours: bool = False
    bias_fields: tuple[str, ...] = ("attention_bias", "mlp_bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    Attributes:
      architecture: what `architectures` of its config.json says.
      model_type: likewise.
      defaults: what transformers takes for a field that config.json leaves out, by its name there.
      read: makes a config of the fields.
      neutral: fields that change nothing at the values given, and that must hold one of them where
        they are present, because the decoder computes nothing else.
      inert: fields that change nothing once `neutral` hold.
      source: where a parameter is stored, by its path, its shape and the config.
      gguf: its form in GGUF files, where these are read.
    """

    architecture: str
    model_type: str
    defaults: Mapping[str, Any]
    read: Callable[[Fields], ModelConfig]
    neutral: Mapping[str, tuple] = dataclasses.field(default_factory=lambda: NEUTRAL_FIELDS)
    inert: frozenset[str] = INERT_FIELDS
    source: Callable[[str, tuple[int, ...], ModelConfig], Source] = lambda path, shape, config: (
        stored_as(path, shape)
    )
    gguf: GgufForm | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPart:
    """What of an architecture that takes images too reads and writes text, a family by itself.

    Attributes:
      architecture, model_type: of the whole.
      family: the architecture of the part, whose config.json is `text_config` in that of the whole.
      renamed: what the names of its tensors begin with in the whole's files, and in its own.
      left_out: tensors of the other parts.
    """

    architecture: str
    model_type: str
    family: str
    renamed: Mapping[str, str]
    left_out: re.Pattern[str]

    def is_of(self, fields: Mapping[str, Any]) -> bool:
        """Whether a config.json is of the whole."""
        names = fields.get("architectures") or []
        return fields.get("model_type") == self.model_type and names in ([], [self.architecture])

    def name_of(self, stored: str) -> str | None:
        """A tensor's name in files of the part alone; None of one that it does not have."""
        if self.left_out.match(stored):
            return None
        for begins, own in self.renamed.items():
            if stored.startswith(begins):
                return own + stored.removeprefix(begins)
        return stored


# Parameter paths beside the names that most families give their tensors.
_MODEL_WEIGHTS = {
    "embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
LAYER_WEIGHTS: Mapping[str, str] = MappingProxyType(
    {
        "attention_norm/scale": "input_layernorm.weight",
        "attention/q_proj/weight": "self_attn.q_proj.weight",
        "attention/q_proj/bias": "self_attn.q_proj.bias",
        "attention/k_proj/weight": "self_attn.k_proj.weight",
        "attention/k_proj/bias": "self_attn.k_proj.bias",
        "attention/v_proj/weight": "self_attn.v_proj.weight",
        "attention/v_proj/bias": "self_attn.v_proj.bias",
        "attention/o_proj/weight": "self_attn.o_proj.weight",
        "attention/o_proj/bias": "self_attn.o_proj.bias",
        "attention/q_norm/scale": "self_attn.q_norm.weight",
        "attention/k_norm/scale": "self_attn.k_norm.weight",
        "mlp_norm/scale": "post_attention_layernorm.weight",
        "mlp/gate_proj/weight": "mlp.gate_proj.weight",
        "mlp/gate_proj/bias": "mlp.gate_proj.bias",
        "mlp/up_proj/weight": "mlp.up_proj.weight",
        "mlp/up_proj/bias": "mlp.up_proj.bias",
        "mlp/down_proj/weight": "mlp.down_proj.weight",
        "mlp/down_proj/bias": "mlp.down_proj.bias",
    }
)
_LAYER = re.compile(r"layers_(\d+)/(.+)")


def layer_of(path: str) -> tuple[int, str] | None:
    """The layer of a parameter and its path there; None of what is in no layer."""
    match = _LAYER.fullmatch(path)
    return None if match is None else (int(match[1]), match[2])


def stored_as(
    path: str, shape: tuple[int, ...], names: Mapping[str, str] = LAYER_WEIGHTS
) -> Source:
    """A tensor that is a parameter as it is, e.g. of path `layers_3/mlp/up_proj/weight`."""
    layer = layer_of(path)
    if layer is None:
        return Source((_MODEL_WEIGHTS[path],), shape)
    return Source((f"model.layers.{layer[0]}.{names[layer[1]]}",), shape)


# Buffers that old checkpoints carry: rotary tables, causal masks and position numbers, which are
# computed here instead. No parameter of these families is called so.
IGNORED_TENSORS = re.compile(
    r"(.+\.)?(rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)|position_ids|masked_bias"
    r"|(self_)?attn\.bias)"
)
