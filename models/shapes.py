# SPDX-License-Identifier: Apache-2.0
"""Shapes of well-known public models, for measuring with random weights."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from jpaged.models.config import ModelConfig, dense_config
from jpaged.models.rope import Llama3Scaling

_LLAMA_SCALING = Llama3Scaling(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
)


def _llama(
    hidden: int,
    intermediate: int,
    layers: int,
    q_heads: int,
    *,
    head_dim: int = 128,
    small: bool = False,
) -> ModelConfig:
    """A Llama 3.1, or a 3.2 where it is `small`; all have 8 KV heads, of 128 but the 1B."""
    return dense_config(
        family="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_q_heads=q_heads,
        num_kv_heads=8,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=(_LLAMA_SCALING if small else dataclasses.replace(_LLAMA_SCALING, factor=8.0)),
        tie_word_embeddings=small,
        max_position_embeddings=131072,
        bos_token_id=128000,
        eos_token_ids=(128001,),
    )


def _qwen3(hidden: int, intermediate: int, layers: int, q_heads: int, *, tied: bool) -> ModelConfig:
    """A Qwen3; all have 8 KV heads of 128."""
    return dense_config(
        family="Qwen3ForCausalLM",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_q_heads=q_heads,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        qk_norm=True,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
        bos_token_id=151643,
        eos_token_ids=(151645,),
    )


# Each as in the config.json that its authors publish (base models, not chat variants).
SHAPES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "smollm2-135m": dense_config(
            family="LlamaForCausalLM",
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_layers=30,
            num_q_heads=9,
            num_kv_heads=3,
            head_dim=64,
            rms_norm_eps=1e-5,
            rope_theta=100000.0,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
            bos_token_id=0,
            eos_token_ids=(0,),
        ),
        "llama-3.2-1b": _llama(2048, 8192, 16, 32, head_dim=64, small=True),
        "llama-3.2-3b": _llama(3072, 8192, 28, 24, small=True),
        "llama-3.1-8b": _llama(4096, 14336, 32, 32),
        "llama-3.1-70b": _llama(8192, 28672, 80, 64),
        "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
        "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
        "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
        "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
        "qwen3-14b": _qwen3(5120, 17408, 40, 40, tied=False),
        "qwen3-32b": _qwen3(5120, 25600, 64, 64, tied=False),
    }
)
