# SPDX-License-Identifier: Apache-2.0
"""Shapes of well-known public models, for measuring with random weights."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from jpaged.models.config import ModelConfig, RopeScaling

_LLAMA_3_2_1B = ModelConfig(
    family="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        kind="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    ),
    tie_word_embeddings=True,
    max_position_embeddings=131072,
    bos_token_id=128000,
    eos_token_ids=(128001,),
)
_QWEN3_0_6B = ModelConfig(
    family="Qwen3ForCausalLM",
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_q_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    qk_norm=True,
    tie_word_embeddings=True,
    max_position_embeddings=40960,
    bos_token_id=151643,
    eos_token_ids=(151645,),
)


def _llama(
    hidden: int, intermediate: int, layers: int, q_heads: int, *, small: bool = False
) -> ModelConfig:
    """A Llama 3.1, or a 3.2 where it is `small`; all have 8 KV heads of 128 but the 1B."""
    scaling = _LLAMA_3_2_1B.rope_scaling
    assert scaling is not None
    return dataclasses.replace(
        _LLAMA_3_2_1B,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_q_heads=q_heads,
        head_dim=128,
        rope_scaling=scaling if small else dataclasses.replace(scaling, factor=8.0),
        tie_word_embeddings=small,
    )


def _qwen3(hidden: int, intermediate: int, layers: int, q_heads: int, *, tied: bool) -> ModelConfig:
    """A Qwen3; all have 8 KV heads of 128."""
    return dataclasses.replace(
        _QWEN3_0_6B,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_q_heads=q_heads,
        tie_word_embeddings=tied,
    )


# Each as in the config.json that its authors publish (base models, not chat variants).
SHAPES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "smollm2-135m": ModelConfig(
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
        "llama-3.2-1b": _LLAMA_3_2_1B,
        "llama-3.2-3b": _llama(3072, 8192, 28, 24, small=True),
        "llama-3.1-8b": _llama(4096, 14336, 32, 32),
        "llama-3.1-70b": _llama(8192, 28672, 80, 64),
        "qwen3-0.6b": _QWEN3_0_6B,
        "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
        "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
        "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
        "qwen3-14b": _qwen3(5120, 17408, 40, 40, tied=False),
        "qwen3-32b": _qwen3(5120, 25600, 64, 64, tied=False),
    }
)
