# SPDX-License-Identifier: Apache-2.0
"""Puts a model that is in memory on the device, ready to run steps."""

from typing import Any

import jax
import jax.numpy as jnp

from jpaged.config import EngineConfig
from jpaged.memory import PoolPlan, default_dtype
from jpaged.runner import ModelRunner
from models.config import ModelConfig
from models.decoder import Decoder, stack_layers


def runner_of(
    config: EngineConfig,
    model_config: ModelConfig,
    params: Any,
    plan: PoolPlan,
    *,
    backend: str,
    num_host_pages: int,
) -> ModelRunner:
    """Makes the runner of an engine, and its pool.

    Args:
      config: the engine's settings.
      model_config: the model's shape.
      params: its parameters, unstacked, of any dtype.
      plan: the pool's dimensions.
      backend: whose kernels run.
      num_host_pages: pages that host memory has room for.
    """
    scan_layers = config.scan_layers
    if scan_layers is None:
        scan_layers = jax.default_backend() != "cpu"
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, default_dtype(config)), params)
    return ModelRunner(
        Decoder(model_config, scan_layers, backend).apply,
        stack_layers(params) if scan_layers else params,
        plan,
        max_num_samples=config.max_num_seqs,
        vocab_size=model_config.vocab_size,
        backend=backend,
        num_host_pages=num_host_pages,
    )
