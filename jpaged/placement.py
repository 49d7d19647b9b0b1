# SPDX-License-Identifier: Apache-2.0
"""Reads a model from disk, and puts one that is in memory on the device, ready to run steps."""

import dataclasses
import logging
import pathlib
import time
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from jpaged.chat import ChatTemplate
from jpaged.device.ahead import AheadCompiler
from jpaged.device.burst import default_decode_steps
from jpaged.device.compiler_options import scans_layers
from jpaged.device.kv_scales import calibrate, calibration_prompt, read_kv_scales
from jpaged.device.memory import PoolPlan, check_pages, default_dtype, plan_pool, pool_dtype
from jpaged.device.programs import Programs
from jpaged.device.runner import ModelRunner
from jpaged.gguf_text import chat_template_of, tokenizer_of
from jpaged.host.checks import directory
from jpaged.host.config import EIGHT_BITS, EngineConfig
from jpaged.models import checkpoint, find
from jpaged.models.config import ModelConfig
from jpaged.models.config_json import load_config
from jpaged.models.decoder import Decoder, Params, stack_layers
from jpaged.models.generation_config import GenerationConfig, load_generation_config
from jpaged.models.gguf_file import GgufFile, is_gguf
from jpaged.models.gguf_model import config_of, generation_config_of
from jpaged.pallas_kernels.dispatch import resolve_backend
from jpaged.text import load_tokenizer

logger = logging.getLogger(__name__)

ModelPath = str | pathlib.Path | GgufFile
"""What names a model on disk, or is a GGUF file whose header was read."""

# Dtypes of pages, and what to take instead.
_SLOW_ON_CPU = {"bfloat16": "float32", "float8_e4m3fn": "int8"}


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
    def of(cls, path: pathlib.Path | GgufFile, config: EngineConfig) -> "ModelFiles":
        """Reads them; see `Engine.load` for the errors."""
        reads = config.generation_config == "model"
        if not isinstance(path, GgufFile) and not is_gguf(path):
            tokenizer, chat_template = load_tokenizer(path), ChatTemplate.load(path)
            defaults = load_generation_config(path) if reads else None
            return cls(path, tokenizer, defaults, chat_template)
        file = path if isinstance(path, GgufFile) else GgufFile(path)
        tokenizer, chat_template = tokenizer_of(file), chat_template_of(file)
        defaults = generation_config_of(file) if reads else None
        return cls(file, tokenizer, defaults, chat_template)

    @property
    def config(self) -> ModelConfig:
        """The model's shape, whose weights are not looked at."""
        source = self.source
        return config_of(source) if isinstance(source, GgufFile) else load_config(source)


def read_model(
    model_path: ModelPath, config: EngineConfig
) -> tuple[ModelConfig, Any, tokenizers.Tokenizer | None, GenerationConfig | None, ChatTemplate]:
    """Reads what a model directory or a GGUF file holds; see `Engine.load`.

    Returns:
      Config, parameters, tokenizer, sampling settings, unless the engine ignores them, and chat
      templates.
    """
    if isinstance(model_path, GgufFile):
        source, path = model_path, model_path.path
    else:
        source = path = directory("model_path", find(model_path))
    backend, dtype = resolve_backend(config.backend), default_dtype(config)
    start = time.perf_counter()
    files = ModelFiles.of(source, config)  # what can be refused is, before the weights are read
    model_config, params = checkpoint.load(
        files.source,
        dtype,
        lambda model_config: pool_of(config, model_config, backend),
        scan_layers=scans_layers(config.scan_layers, jax.default_backend()),
    )
    logger.info(
        "loaded %s: %.1f M parameters as %s in %.2f s",
        path if isinstance(model_path, GgufFile) else model_path,
        sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6,
        dtype.name,
        time.perf_counter() - start,
    )
    return (model_config, params, *files[1:])


def pool_of(
    config: EngineConfig, model_config: ModelConfig, backend: str, unread_bytes: int = 0
) -> PoolPlan:
    """Plans the pool of an engine on this machine; see `plan_pool`.

    Raises:
      ValueError: as there, if the kernels do not take pages of the dtype that is asked for, or if
        a file of scales is not this model's.
    """
    plan = plan_pool(config, model_config, backend, unread_bytes=unread_bytes)
    if config.kv_dtype is not None:
        check_pages(model_config, plan, default_dtype(config), backend)
    if config.kv_scales is not None:
        read_kv_scales(config.kv_scales, model_config.num_layers, plan.dtype.name)
    return plan


def runner_of(
    config: EngineConfig,
    model_config: ModelConfig,
    params: Any,
    plan: PoolPlan,
    tokenizer: tokenizers.Tokenizer | None = None,
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
      tokenizer: the model's, for the text that scales of pages are found on.
      backend: whose kernels run.
      num_host_pages: pages that host memory has room for.
    """
    if plan.dtype.name in _SLOW_ON_CPU and jax.default_backend() == "cpu":
        logger.warning(
            "pages of %s are slow on a CPU, whose compiler converts all of them at every "
            "step: those of %s are not",
            *(plan.dtype.name, _SLOW_ON_CPU[plan.dtype.name]),
        )
    decoder, params = decoder_of(
        config, model_config, params, tokenizer, backend=backend, max_length=plan.max_model_len
    )
    return ModelRunner(
        decoder.apply,
        params,
        plan,
        max_num_samples=config.max_num_seqs,
        vocab_size=model_config.vocab_size,
        backend=backend,
        num_host_pages=num_host_pages,
        decode_steps=default_decode_steps(config),
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
    plan = pool_of(config, model_config, backend, unread)
    scan_layers = scans_layers(config.scan_layers, jax.default_backend())
    decoder = Decoder(model_config, scan_layers, backend, max_length=plan.max_model_len)
    programs = Programs(
        decoder.apply,
        max_num_samples=config.max_num_seqs,
        vocab_size=model_config.vocab_size,
        backend=backend,
        decode_steps=default_decode_steps(config),
    )
    params = Decoder(model_config, scan_layers, "xla").abstract_params(dtype)
    if config.kv_dtype in EIGHT_BITS:
        shape = (model_config.num_layers, 2)
        params["kv_scales"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return AheadCompiler(programs, params, plan, max_num_samples=config.max_num_seqs), plan


def decoder_of(
    config: EngineConfig,
    model_config: ModelConfig,
    params: Any,
    tokenizer: tokenizers.Tokenizer | None = None,
    *,
    backend: str,
    max_length: int,
) -> tuple[Decoder, Params]:
    """What an engine of this config computes with.

    Args:
      config: the engine's settings.
      model_config: the model's shape.
      params: its parameters, stacked or not, of any floating dtype.
      tokenizer: as in `runner_of`.
      backend: whose kernels run.
      max_length: as in `Decoder`.

    Returns:
      The model, and its parameters in the dtype that is asked for, stacked as it takes them, with
      the scales of pages of eight bits.
    """
    stacked = "layers" in params
    if stacked and config.scan_layers is False:
        raise ValueError("scan_layers=False must be True, or None: params has stacked layers")
    scan_layers = stacked or scans_layers(config.scan_layers, jax.default_backend())
    scales = params.get("kv_scales")
    params = {name: tree for name, tree in params.items() if name != "kv_scales"}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, default_dtype(config)), params)
    if scan_layers and not stacked:
        params = stack_layers(params, model_config)
    decoder = Decoder(model_config, scan_layers, backend, max_length=max_length)
    if config.kv_dtype in EIGHT_BITS:
        if config.kv_scales is not None:
            scales = read_kv_scales(config.kv_scales, model_config.num_layers, config.kv_dtype)
        elif scales is None:
            prompt = calibration_prompt(tokenizer, model_config.vocab_size)
            scales = calibrated(config, decoder, params, [prompt])
        params["kv_scales"] = jnp.asarray(scales, jnp.float32)
    return decoder, params


def calibrated(
    config: EngineConfig, decoder: Decoder, params: Params, prompts: Sequence[Sequence[int]]
) -> np.ndarray:
    """Scales for the pages of an engine of this config; see `calibrate`."""
    assert config.kv_dtype is not None
    start = time.perf_counter()
    scales = calibrate(
        decoder,
        params,
        prompts,
        config.kv_dtype,
        page_size=config.page_size,
        pool_dtype=pool_dtype(dataclasses.replace(config, kv_dtype=None, kv_scales=None)),
    )
    tokens, took_s = sum(map(len, prompts)), time.perf_counter() - start
    logger.info("scales of %s pages found on %d tokens in %.2f s", config.kv_dtype, tokens, took_s)
    return scales
