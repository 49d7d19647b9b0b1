# SPDX-License-Identifier: Apache-2.0
"""Whole steps compiled for devices that are not there, and the facts read off them."""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.models import sharding
from jpaged.models.cache_groups import cache_groups
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder
from jpaged.models.inputs import PagedInputs
from jpaged.models.shapes import SHAPES
from jpaged.pallas_kernels.aot import GpuCompiler, TpuCompiler
from jpaged.pallas_kernels.aot.cases import AttentionShape, pool_struct, rows_struct
from jpaged.pallas_kernels.aot.program import collectives, operations_giving, try_compile
from jpaged.scripts.kernels.shapes import ATTENTION_SHAPES

Struct = jax.ShapeDtypeStruct


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


@dataclasses.dataclass(frozen=True)
class StepFacts:
    """What the compiler says of a whole decode step.

    Attributes:
      alias_bytes: arguments whose memory results take.
      pool_bytes: of the page pool on one device.
      temp_bytes: device memory beside arguments and results.
      pool_ops: operations of the compiled step that give an array of the pool's shape, but for
        passing it on: a copy or transpose of it would be here.
      collectives: how often each collective operation stands in the program.
      error: why it does not compile; then the rest is None.
    """

    alias_bytes: int | None = None
    pool_bytes: int | None = None
    temp_bytes: int | None = None
    pool_ops: tuple[str, ...] | None = None
    collectives: dict[str, int] | None = None
    error: str | None = None


def compile_step(
    compiler: TpuCompiler | GpuCompiler,
    mesh: jax.sharding.Mesh,
    config: ModelConfig,
    *,
    num_rows: int = 64,
    num_tokens: int | None = None,
    kv_len: int = 2048,
    page_size: int = 16,
) -> StepFacts:
    """Compiles a whole step of a model in bfloat16, layers scanned and the pool donated.

    Args:
      compiler: with or without schedules.
      mesh: devices to compile for, of the compiler; heads are split over them.
      config: the model.
      num_rows: sequences.
      num_tokens: of the step; as many as rows by default.
      kv_len: tokens of each that the pool has room for.
      page_size: tokens a page holds.
    """
    num_tokens = num_tokens or num_rows
    backend = "tpu" if isinstance(compiler, TpuCompiler) else "gpu"
    num_devices = mesh.devices.size
    decoder = Decoder(config, True, backend, mesh if num_devices > 1 else None)
    params = Decoder(config, True, "xla").abstract_params(jnp.bfloat16)
    shape = AttentionShape(config.num_q_heads, config.num_kv_heads, config.head_dim)
    groups = cache_groups(config)
    num_pages = groups.num_groups * num_rows * kv_len // page_size + 1
    pool = pool_struct(shape, num_pages, page_size, jnp.bfloat16, groups.size, backend=backend)
    where = sharding.placements(params, sharding.param_shardings(params, mesh))
    params = jax.tree.map(_placed, params, where)
    pool_sharding = sharding.pool_sharding(mesh)
    pool = _placed(pool, pool_sharding)
    tokens: Any = Struct((num_tokens,), jnp.int32)
    samples: Any = Struct((num_rows,), jnp.int32)
    rows = rows_struct(num_rows, -(-kv_len // page_size))
    if groups.num_groups > 1:
        tables: Any = Struct((groups.num_groups, *rows.page_table.shape), jnp.int32)
        rows = dataclasses.replace(rows, page_table=tables)
    inputs = PagedInputs(
        token_ids=tokens,
        positions=tokens,
        rows=rows,
        logits_indices=samples,
    )
    compiled = try_compile(compiler, mesh, decoder.apply, params, inputs, pool, donate_argnums=(2,))
    if isinstance(compiled, str):
        return StepFacts(error=compiled)
    memory = compiled.memory_analysis()
    assert memory is not None
    own = pool_sharding.shard_shape(pool.shape)
    return StepFacts(
        alias_bytes=memory.alias_size_in_bytes,
        pool_bytes=math.prod(own) * jnp.dtype(jnp.bfloat16).itemsize,
        temp_bytes=memory.temp_size_in_bytes,
        pool_ops=operations_giving(compiled, own),
        collectives=collectives(compiled),
    )


def _placed(struct: Struct, where: Any) -> Struct:
    return Struct(struct.shape, struct.dtype, sharding=where)
