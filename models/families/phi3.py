# SPDX-License-Identifier: Apache-2.0
"""Phi-3 and Phi-4: Llama with fused projections, and rotary embeddings of a part of the lanes."""

from types import MappingProxyType

from jpaged.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, NormSpec
from jpaged.models.families.base import Family, Source, layer_of, stored_as
from jpaged.models.families.fields import Fields
from jpaged.models.families.llama import DEFAULTS
from jpaged.models.families.rope_fields import read_rope
from jpaged.pallas_kernels.variant import AttentionVariant


def read(fields: Fields) -> ModelConfig:
    """Reads a config.json."""
    heads = fields.heads()
    layer = LayerSpec(
        attention=AttentionSpec(
            **heads,
            rope=read_rope(fields, heads["head_dim"]),
            variant=AttentionVariant(sliding_window=fields.optional("sliding_window", int)),
        ),
        mlp=MlpSpec(
            intermediate_size=fields("intermediate_size", int), activation=fields.activation()
        ),
    )
    return ModelConfig(
        pattern=(layer,), norm=NormSpec(eps=fields("rms_norm_eps", float)), **fields.shared()
    )


def _source(path: str, shape: tuple[int, ...], config: ModelConfig) -> Source:
    layer = layer_of(path)
    if layer is None:
        return stored_as(path, shape)
    spec = config.layer(layer[0])
    attention, mlp = spec.attention, spec.mlp
    assert isinstance(mlp, MlpSpec)
    rows: dict[str, int] = {
        "q_proj": attention.num_q_heads * attention.head_dim,
        "k_proj": attention.num_kv_heads * attention.head_dim,
        "v_proj": attention.num_kv_heads * attention.head_dim,
    }
    fused = "self_attn.qkv_proj.weight"
    if layer[1].startswith("mlp/"):
        rows = {"gate_proj": mlp.intermediate_size, "up_proj": mlp.intermediate_size}
        fused = "mlp.gate_up_proj.weight"
    name = layer[1].split("/")[1]
    if name not in rows:
        return stored_as(path, shape)
    start = sum(rows[before] for before in list(rows)[: list(rows).index(name)])
    return Source(
        (f"model.layers.{layer[0]}.{fused}",),
        (sum(rows.values()), *shape[1:]),
        part=slice(start, start + rows[name]),
    )


FAMILY = Family(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    defaults=MappingProxyType(
        {
            **DEFAULTS,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32064,
        }
    ),
    read=read,
    source=_source,
)
