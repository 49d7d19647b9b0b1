# SPDX-License-Identifier: Apache-2.0
"""Reads a model from disk, and puts one that is in memory on the device, ready to run steps."""

import logging
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers

from jpaged.chat import ChatTemplate
from jpaged.device.memory import PoolPlan, default_dtype, plan_pool
from jpaged.device.runner import ModelRunner
from jpaged.gguf_text import chat_template_of, tokenizer_of
from jpaged.host.checks import directory
from jpaged.host.config import EngineConfig
from jpaged.models import checkpoint, find
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder, stack_layers
from jpaged.models.generation_config import GenerationConfig, load_generation_config
from jpaged.models.gguf_file import GgufFile, is_gguf
from jpaged.models.gguf_model import generation_config_of
from jpaged.pallas_kernels.dispatch import resolve_backend
from jpaged.text import load_tokenizer

logger = logging.getLogger(__name__)

ModelPath = str | pathlib.Path | GgufFile
"""What names a model on disk, or is a GGUF file whose header was read."""


def read_model(
    model_path: ModelPath, config: EngineConfig
) -> tuple[ModelConfig, Any, tokenizers.Tokenizer | None, GenerationConfig | None, ChatTemplate]:
    """Reads what a model directory or a GGUF file holds; see `Engine.load`.

    Returns:
      Config, parameters, tokenizer, sampling settings, unless the engine ignores them, and chat
      templates.
    """
    if isinstance(model_path, GgufFile):
        file, path = model_path, model_path.path
    else:
        file, path = None, directory("model_path", find(model_path))
    backend, dtype = resolve_backend(config.backend), default_dtype(config)
    start = time.perf_counter()
    if file is None and is_gguf(path):
        file = GgufFile(path)
    # What can be refused is, before the weights are read.
    if file is None:
        tokenizer, chat_template = load_tokenizer(path), ChatTemplate.load(path)
    else:
        tokenizer, chat_template = tokenizer_of(file), chat_template_of(file)
    defaults = None
    if config.generation_config == "model":
        defaults = load_generation_config(path) if file is None else generation_config_of(file)
    model_config, params = checkpoint.load(
        path if file is None else file,
        dtype,
        lambda model_config: plan_pool(config, model_config, backend),
        scan_layers=_scans(config),
    )
    logger.info(
        "loaded %s: %.1f M parameters as %s in %.2f s",
        path if isinstance(model_path, GgufFile) else model_path,
        sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6,
        dtype.name,
        time.perf_counter() - start,
    )
    return model_config, params, tokenizer, defaults, chat_template


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
      params: its parameters, stacked or not, of any floating dtype.
      plan: the pool's dimensions.
      backend: whose kernels run.
      num_host_pages: pages that host memory has room for.
    """
    stacked = "layers" in params
    if stacked and config.scan_layers is False:
        raise ValueError("scan_layers=False must be True, or None: params has stacked layers")
    scan_layers = stacked or _scans(config)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, default_dtype(config)), params)
    return ModelRunner(
        Decoder(model_config, scan_layers, backend, max_length=plan.max_model_len).apply,
        stack_layers(params, model_config) if scan_layers and not stacked else params,
        plan,
        max_num_samples=config.max_num_seqs,
        vocab_size=model_config.vocab_size,
        backend=backend,
        num_host_pages=num_host_pages,
    )


def _scans(config: EngineConfig) -> bool:
    """Whether layers are stacked, and scanned over."""
    if config.scan_layers is None:
        return jax.default_backend() != "cpu"
    return config.scan_layers
