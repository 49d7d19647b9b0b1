# SPDX-License-Identifier: Apache-2.0
"""Reads a model from disk, and puts one that is in memory on the device, ready to run steps."""

import logging
import pathlib
import time
import typing
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers

from jpaged.chat import ChatTemplate
from jpaged.device.ahead import AheadCompiler
from jpaged.device.compiler_options import scans_layers
from jpaged.device.memory import PoolPlan, default_dtype, plan_pool
from jpaged.device.programs import Programs
from jpaged.device.runner import ModelRunner
from jpaged.gguf_text import chat_template_of, tokenizer_of
from jpaged.host.checks import directory
from jpaged.host.config import EngineConfig
from jpaged.models import checkpoint, find
from jpaged.models.config import ModelConfig
from jpaged.models.config_json import load_config
from jpaged.models.decoder import Decoder, stack_layers
from jpaged.models.generation_config import GenerationConfig, load_generation_config
from jpaged.models.gguf_file import GgufFile, is_gguf
from jpaged.models.gguf_model import config_of, generation_config_of
from jpaged.pallas_kernels.dispatch import resolve_backend
from jpaged.text import load_tokenizer

logger = logging.getLogger(__name__)


class ModelFiles(typing.NamedTuple):
    """What a model directory or a GGUF file holds beside weights.

    Attributes:
      source: for `checkpoint.load`: the directory, or the open file.
      tokenizer: None where there is none.
      generation_config: sampling settings; None where there are none, or the engine ignores them.
      chat_template: its chat templates.
    """

    source: pathlib.Path | GgufFile
    tokenizer: tokenizers.Tokenizer | None
    generation_config: GenerationConfig | None
    chat_template: ChatTemplate

    @classmethod
    def of(cls, path: pathlib.Path, config: EngineConfig) -> "ModelFiles":
        """Reads them; see `Engine.load` for the errors."""
        reads = config.generation_config == "model"
        if not is_gguf(path):
            tokenizer, chat_template = load_tokenizer(path), ChatTemplate.load(path)
            defaults = load_generation_config(path) if reads else None
            return cls(path, tokenizer, defaults, chat_template)
        file = GgufFile(path)
        tokenizer, chat_template = tokenizer_of(file), chat_template_of(file)
        defaults = generation_config_of(file) if reads else None
        return cls(file, tokenizer, defaults, chat_template)

    @property
    def config(self) -> ModelConfig:
        """The model's shape, whose weights are not looked at."""
        source = self.source
        return config_of(source) if isinstance(source, GgufFile) else load_config(source)


def read_model(
    model_path: str | pathlib.Path, config: EngineConfig
) -> tuple[ModelConfig, Any, tokenizers.Tokenizer | None, GenerationConfig | None, ChatTemplate]:
    """Reads what a model directory or a GGUF file holds; see `Engine.load`.

    Returns:
      Config, parameters, tokenizer, sampling settings, unless the engine ignores them, and chat
      templates.
    """
    path = directory("model_path", find(model_path))
    backend, dtype = resolve_backend(config.backend), default_dtype(config)
    start = time.perf_counter()
    files = ModelFiles.of(path, config)  # what can be refused is, before the weights are read
    model_config, params = checkpoint.load(
        files.source,
        dtype,
        lambda model_config: plan_pool(config, model_config, backend),
        scan_layers=scans_layers(config.scan_layers, jax.default_backend()),
    )
    logger.info(
        "loaded %s: %.1f M parameters as %s in %.2f s",
        model_path,
        sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6,
        dtype.name,
        time.perf_counter() - start,
    )
    return (model_config, params, *files[1:])


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
    scan_layers = stacked or scans_layers(config.scan_layers, jax.default_backend())
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, default_dtype(config)), params)
    return ModelRunner(
        Decoder(model_config, scan_layers, backend, max_length=plan.max_model_len).apply,
        stack_layers(params, model_config) if scan_layers and not stacked else params,
        plan,
        max_num_samples=config.max_num_seqs,
        vocab_size=model_config.vocab_size,
        backend=backend,
        num_host_pages=num_host_pages,
        strict=config.strict_shapes,
    )


def compiler_of(config: EngineConfig, model_config: ModelConfig) -> tuple[AheadCompiler, PoolPlan]:
    """Makes what compiles for an engine before its weights are read, as `Engine.load` would.

    Returns:
      The compiler, and the pool as it will be if memory stays as free as it is.

    Raises:
      ValueError: if settings or memory do not allow the engine.
    """
    backend, dtype = resolve_backend(config.backend), default_dtype(config)
    unread = Decoder(model_config).num_params * dtype.itemsize
    plan = plan_pool(config, model_config, backend, unread_bytes=unread)
    scan_layers = scans_layers(config.scan_layers, jax.default_backend())
    decoder = Decoder(model_config, scan_layers, backend, max_length=plan.max_model_len)
    sizes = {"max_num_samples": config.max_num_seqs, "vocab_size": model_config.vocab_size}
    programs = Programs(decoder.apply, backend=backend, **sizes)
    params = Decoder(model_config, scan_layers, "xla").abstract_params(dtype)
    return AheadCompiler(programs, params, plan, max_num_samples=config.max_num_seqs), plan
