# SPDX-License-Identifier: Apache-2.0
"""Reads a model from disk, and puts one that is in memory on the device, ready to run steps."""

import dataclasses
import functools
import logging
import pathlib
import time
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from jpaged.chat import ChatTemplate
from jpaged.defaults import model_defaults
from jpaged.device.ahead import AheadCompiler
from jpaged.device.burst import default_decode_steps
from jpaged.device.compilation_cache import keep_programs
from jpaged.device.compile_threads import CompileThreads
from jpaged.device.compiler_options import merges_projections, scans_layers
from jpaged.device.kv_scales import calibrate, calibration_prompt, read_kv_scales
from jpaged.device.memory import PoolPlan, check_pages, default_dtype, plan_pool, pool_dtype
from jpaged.device.programs import Programs
from jpaged.device.runner import ModelRunner
from jpaged.gguf_text import chat_template_of, tokenizer_of
from jpaged.host.batch import ShapeBuckets, StepShape
from jpaged.host.checks import directory
from jpaged.host.config import EIGHT_BITS, EngineConfig
from jpaged.host.params import SamplingParams
from jpaged.host.warm_up import WarmUpPlan, warm_up_plan
from jpaged.models import checkpoint, find
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder, Params, stack_layers
from jpaged.models.generation_config import GenerationConfig, load_generation_config
from jpaged.models.gguf_file import GgufFile
from jpaged.models.gguf_model import generation_config_of
from jpaged.models.merged import merge_projections
from jpaged.models.sources import Source, opened, read_config
from jpaged.pallas_kernels.dispatch import resolve_backend
from jpaged.text import load_tokenizer

logger = logging.getLogger(__name__)


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

    source: Source
    tokenizer: tokenizers.Tokenizer | None
    generation_config: GenerationConfig | None
    chat_template: ChatTemplate

    @classmethod
    def of(cls, path: Source, config: EngineConfig) -> "ModelFiles":
        """Reads them; see `Engine.load` for the errors."""
        reads, source = config.generation_config == "model", opened(path)
        if isinstance(source, GgufFile):
            tokenizer, chat_template = tokenizer_of(source), chat_template_of(source)
            defaults = generation_config_of(source) if reads else None
        else:
            tokenizer, chat_template = load_tokenizer(source), ChatTemplate.load(source)
            defaults = load_generation_config(source) if reads else None
        return cls(source, tokenizer, defaults, chat_template)

    @property
    def path(self) -> pathlib.Path:
        """Where they are."""
        return self.source.path if isinstance(self.source, GgufFile) else self.source

    @property
    def config(self) -> ModelConfig:
        """The model's shape, whose weights are not looked at."""
        return read_config(self.source)


ModelPath = str | pathlib.Path | GgufFile | ModelFiles
"""What names a model on disk, or is what was read of one."""


def read_model(
    model_path: ModelPath,
    config: EngineConfig,
    compile_first: Callable[[], CompileThreads] | None = None,
) -> tuple[
    ModelConfig,
    Any,
    tokenizers.Tokenizer | None,
    GenerationConfig | None,
    ChatTemplate,
    CompileThreads | None,
]:
    """Reads what a model directory or a GGUF file holds; see `Engine.load`.

    Returns:
      Config, parameters, tokenizer, sampling settings, unless the engine ignores them, chat
      templates, and what compiles its steps meanwhile: all of them, if no other may be.
    """
    keep_programs(config.compilation_cache_dir)  # reading compiles too
    files = files_of(model_path, config)  # what can be refused is, before the weights are read
    backend, dtype = resolve_backend(config.backend), default_dtype(config)
    scan_layers = scans_layers(config.scan_layers, jax.default_backend())
    ahead: CompileThreads | None = None
    start = time.perf_counter()
    # Made for float8, whose small numbers stay fine in a range that is far too wide for int8.
    own = config.kv_dtype == "float8_e4m3fn" and config.kv_scales is None
    scales = checkpoint.kv_scales_of(files.source) if own else None

    def before_reading(found: ModelConfig) -> None:
        nonlocal ahead
        if compile_first is not None:
            ahead = compile_first()
        elif config.strict_shapes or config.deterministic:
            ahead = compile_ahead(config, files)
        else:
            pool_of(config, found, backend)

    try:
        model_config, params = checkpoint.load(
            files.source,
            dtype,
            before_reading,
            scan_layers=scan_layers,
            merge=merges_projections(scan_layers, jax.default_backend()),
        )
    except BaseException:
        if ahead is not None:
            ahead.close()
        raise
    if scales is not None:
        logger.info("scales of %s pages are the checkpoint's", config.kv_dtype)
        params["kv_scales"] = jnp.asarray(scales)
    logger.info(
        "loaded %s: %.1f M parameters as %s in %.2f s",
        model_path if isinstance(model_path, str | pathlib.Path) else files.path,
        sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6,
        dtype.name,
        time.perf_counter() - start,
    )
    if ahead is not None and model_config != ahead.model_config:
        ahead.close()  # it has a head of its own, which only the weights' content could say
        ahead = None
    return (model_config, params, *files[1:], ahead)


def files_of(model_path: ModelPath, config: EngineConfig) -> ModelFiles:
    """Finds a model, and reads what is there beside weights; see `Engine.load` for the errors."""
    if isinstance(model_path, ModelFiles):
        return model_path
    if isinstance(model_path, GgufFile):
        return ModelFiles.of(model_path, config)
    return ModelFiles.of(directory("model_path", find(model_path)), config)


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
    ahead: CompileThreads | None = None,
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
      ahead: what compiles its first steps.
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
        saves_pages=config.prompt_cache is not None,
        ahead=ahead,
    )


def compiler_of(config: EngineConfig, model_config: ModelConfig) -> tuple[AheadCompiler, PoolPlan]:
    """Makes what compiles for an engine before its weights are read, as `Engine.load` would.

    Returns:
      The compiler, and the pool as it will be if memory stays as free as it is.

    Raises:
      ValueError: if settings or memory do not allow the engine.
    """
    plan = unread_pool_of(config, model_config)
    return _compiler_of(config, model_config, _programs_of(config, model_config, plan), plan), plan


def compile_ahead(
    config: EngineConfig,
    files: ModelFiles,
    shapes: Sequence[StepShape] | None = None,
    params: Sequence[SamplingParams] = (),
) -> CompileThreads:
    """Begins to compile steps of an engine in threads, while its weights are read.

    `Engine.load(files, config, compile_first=functools.partial(compile_ahead, config, files,
    shapes))` calls it when config.json and the weights have been found to fit each other.

    Args:
      config: the engine's settings.
      files: its model.
      shapes: the steps, the first is needed first; None takes all that there can be.
      params: as in `Engine.warm_up`.

    Raises:
      ValueError: if settings or memory do not allow the engine.
    """
    model_config = files.config
    shapes = ShapeBuckets.of(config).all_shapes() if shapes is None else shapes
    plan = unread_pool_of(config, model_config)
    programs = _programs_of(config, model_config, plan)
    wanted = wanted_programs(ShapeBuckets.of(config), files, plan, shapes, params)
    make = functools.partial(_compiler_of, config, model_config, programs, plan)
    return CompileThreads(programs, plan, model_config, wanted, make)


def wanted_programs(
    buckets: ShapeBuckets,
    files: ModelFiles,
    plan: PoolPlan,
    shapes: Sequence[StepShape],
    params: Sequence[SamplingParams],
) -> WarmUpPlan:
    """What steps of some of an engine's shapes call for requests of some parameters."""
    model = files.config
    defaults = model_defaults(files.generation_config, model.vocab_size).params
    return warm_up_plan(
        buckets,
        model.vocab_size,
        model.eos_token_ids,
        defaults,
        plan.max_model_len,
        shapes,
        params=params,
    )


def unread_pool_of(config: EngineConfig, model_config: ModelConfig) -> PoolPlan:
    """Plans the pool as it will be beside weights that are not read yet; see `pool_of`."""
    unread = Decoder(model_config).num_params * default_dtype(config).itemsize
    return pool_of(config, model_config, resolve_backend(config.backend), unread)


def _programs_of(config: EngineConfig, model_config: ModelConfig, plan: PoolPlan) -> Programs:
    backend = resolve_backend(config.backend)
    scan_layers = scans_layers(config.scan_layers, jax.default_backend())
    decoder = Decoder(model_config, scan_layers, backend, max_length=plan.max_model_len)
    return Programs(
        decoder.apply,
        max_num_samples=config.max_num_seqs,
        vocab_size=model_config.vocab_size,
        backend=backend,
        decode_steps=default_decode_steps(config),
    )


def _compiler_of(
    config: EngineConfig, model_config: ModelConfig, programs: Programs, plan: PoolPlan
) -> AheadCompiler:
    scan_layers = scans_layers(config.scan_layers, jax.default_backend())
    params = Decoder(model_config, scan_layers, "xla").abstract_params(default_dtype(config))
    if merges_projections(scan_layers, jax.default_backend()):
        params = jax.eval_shape(merge_projections, params)
    if config.kv_dtype in EIGHT_BITS:
        shape = (model_config.num_layers, 2)
        params["kv_scales"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return AheadCompiler(programs, params, plan, max_num_samples=config.max_num_seqs)


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
    if merges_projections(scan_layers, jax.default_backend()):
        params = merge_projections(params)
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
