# SPDX-License-Identifier: Apache-2.0
"""Shapes of well-known public models, for measuring with random weights."""

from collections.abc import Mapping
from types import MappingProxyType

from models.config import ModelConfig, RopeScaling

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
        "llama-3.2-1b": ModelConfig(
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
        ),
        "qwen3-0.6b": ModelConfig(
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
        ),
    }
)
