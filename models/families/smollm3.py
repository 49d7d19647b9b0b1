# SPDX-License-Identifier: Apache-2.0
"""SmolLM3: Llama with layers that do not turn queries and keys."""

from types import MappingProxyType

from jpaged.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, NormSpec
from jpaged.models.families.base import Family
from jpaged.models.families.fields import Fields, shortest_period
from jpaged.models.families.llama import DEFAULTS
from jpaged.models.families.rope_fields import read_rope
from jpaged.models.json_fields import ModelConfigError
from jpaged.pallas_kernels.variant import AttentionVariant


def read(fields: Fields) -> ModelConfig:
    """Reads a config.json."""
    heads, bias = fields.heads(), fields("attention_bias", bool)
    num_layers, every = fields("num_hidden_layers", int), fields("no_rope_layer_interval", int)
    given = fields.optional("no_rope_layers", list)
    if given is None and every < 1:
        raise ModelConfigError(f"no_rope_layer_interval={every} must be at least 1")
    if given is not None and len(given) != num_layers:
        raise ModelConfigError(
            f"no_rope_layers has {len(given)} entries for num_hidden_layers={num_layers}: they "
            "contradict each other"
        )
    # 1 turns, as transformers has it, whatever the field's name says.
    turns = [(i + 1) % every != 0 for i in range(every)] if given is None else map(bool, given)
    turns = shortest_period(list(turns))
    window = fields.optional("sliding_window", int)
    if not fields("use_sliding_window", bool):
        window = None
    kinds = fields.kinds(
        window,
        lambda i: (
            "full_attention" if window is None or turns[i % len(turns)] else "sliding_attention"
        ),
        len(turns),
    )
    rope = read_rope(fields, heads["head_dim"])
    mlp = MlpSpec(
        intermediate_size=fields("intermediate_size", int),
        activation=fields.activation(),
        bias=fields("mlp_bias", bool),
    )
    count = max(len(turns), len(kinds))
    count = count if count % len(turns) == 0 and count % len(kinds) == 0 else num_layers
    layers = [
        LayerSpec(
            attention=AttentionSpec(
                **heads,
                rope=rope if turns[i % len(turns)] else None,
                variant=AttentionVariant(
                    sliding_window=(
                        window if kinds[i % len(kinds)] == "sliding_attention" else None
                    )
                ),
                qkv_bias=bias,
                out_bias=bias,
            ),
            mlp=mlp,
        )
        for i in range(count)
    ]
    return ModelConfig(
        pattern=tuple(shortest_period(layers)),
        norm=NormSpec(eps=fields("rms_norm_eps", float)),
        **fields.shared(),
    )


FAMILY = Family(
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    defaults=MappingProxyType(
        {
            **DEFAULTS,
            "hidden_size": 2048,
            "max_position_embeddings": 32768,
            "no_rope_layer_interval": 4,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 4,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 128256,
        }
    ),
    read=read,
)
