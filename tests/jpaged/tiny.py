# SPDX-License-Identifier: Apache-2.0
"""A model small enough to run in every test, and engines around it."""

import dataclasses
import functools

import jax
import numpy as np

from jpaged import Engine, EngineConfig
from jpaged.models.config import dense_config
from jpaged.models.decoder import Decoder
from jpaged.pallas_kernels.variant import AttentionVariant

TINY = dense_config(
    family="Qwen3ForCausalLM",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    qk_norm=True,
    tie_word_embeddings=True,
    max_position_embeddings=256,
)


def windowed(window=12):
    """Of the same parameters, but the first layer sees a window: two groups of pages."""
    (full,) = TINY.pattern
    variant = AttentionVariant(sliding_window=window)
    seen = dataclasses.replace(full, attention=dataclasses.replace(full.attention, variant=variant))
    return dataclasses.replace(TINY, pattern=(seen, full))


@functools.cache
def tiny_params(seed=0):
    # Larger weights than at initialisation: the next token must depend on what came before.
    return jax.tree.map(lambda x: x * 12, Decoder(TINY).init(jax.random.key(seed)))


def tiny_engine(tokenizer=None, model_config=TINY, **config):
    config = dict(max_model_len=128, max_num_seqs=8) | config
    return Engine(model_config, tiny_params(), EngineConfig(**config), tokenizer)


def prompts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, TINY.vocab_size, length).tolist() for length in lengths]


def token_ids(outputs):
    return [[sample.token_ids for sample in output.outputs] for output in outputs]
