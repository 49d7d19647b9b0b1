# SPDX-License-Identifier: Apache-2.0
"""Whole steps of public models, compiled for devices that are not there."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import jax

from jpaged.device.compiled_step import StepFacts, compile_step
from jpaged.device.memory import FreeMemory, plan_pool
from jpaged.host.batch import StepShape
from jpaged.host.config import EngineConfig
from jpaged.models.cache_groups import cache_groups
from jpaged.models.config import ModelConfig
from jpaged.models.shapes import SHAPES
from jpaged.pallas_kernels.aot import GpuCompiler, TpuCompiler
from jpaged.pallas_kernels.aot.cases import AttentionShape
from jpaged.scripts.kernels.shapes import ATTENTION_SHAPES


def _with_attention(shape: AttentionShape) -> ModelConfig:
    """A small model with the heads of one whose layers `models` does not have."""
    config = SHAPES["qwen3-0.6b"]
    (layer,) = config.pattern
    rope = layer.attention.rope
    assert rope is not None
    attention = dataclasses.replace(
        layer.attention,
        num_q_heads=shape.num_q_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rope=dataclasses.replace(rope, dim=shape.head_dim),
    )
    return dataclasses.replace(config, pattern=(dataclasses.replace(layer, attention=attention),))


# What has no decoder here stands for the sizes of its pool: windows and caps are left out.
STEP_CONFIGS: Mapping[str, ModelConfig] = MappingProxyType(
    {name: _with_attention(shape) for name, shape in ATTENTION_SHAPES.items()} | dict(SHAPES)
)


def compile_decode(
    compiler: TpuCompiler | GpuCompiler,
    mesh: jax.sharding.Mesh,
    config: ModelConfig,
    *,
    num_rows: int = 64,
    num_tokens: int | None = None,
    kv_len: int = 2048,
    page_size: int = 16,
    kv_dtype: str | None = None,
    decode_steps: int = 1,
) -> StepFacts:
    """Compiles a step of a model in bfloat16 whose pool has room for all of its rows.

    Args:
      compiler: with or without schedules.
      mesh: devices to compile for, of the compiler; heads are split over them.
      config: the model.
      num_rows: sequences.
      num_tokens: of the step; as many as rows by default.
      kv_len: tokens of each that the pool has room for.
      page_size: tokens a page holds.
      kv_dtype: of pages, as in `EngineConfig`.
      decode_steps: most steps of a burst; 1 is a step by itself.
    """
    num_groups = cache_groups(config, kv_len).num_groups
    settings = EngineConfig(
        page_size=page_size,
        num_pages=num_groups * num_rows * kv_len // page_size + 1,
        max_model_len=kv_len,
        dtype="bfloat16",
        kv_dtype=kv_dtype,
    )
    backend = "tpu" if isinstance(compiler, TpuCompiler) else "gpu"
    large = FreeMemory(num_bytes=2**62, name="any device", platform=backend)
    pool = plan_pool(settings, config, backend, large)
    shape = StepShape(num_tokens or num_rows, num_rows)
    return compile_step(compiler, mesh, config, pool, shape, decode_steps=decode_steps)
