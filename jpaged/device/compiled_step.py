# SPDX-License-Identifier: Apache-2.0
"""Whole steps compiled for devices that are not there, and the facts read off them."""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.device.burst import burst_function
from jpaged.device.compiler_options import (
    compiler_options,
    merges_projections,
    scans_layers,
)
from jpaged.device.memory import PoolPlan
from jpaged.device.programs import step_function
from jpaged.device.runner import inputs_of
from jpaged.host.batch import StepShape, empty_batch
from jpaged.host.burst import idle_burst
from jpaged.models import sharding
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder
from jpaged.models.merged import merge_projections
from jpaged.pallas_kernels.aot import GpuCompiler, TpuCompiler, hlo
from jpaged.pallas_kernels.aot.program import collectives, operations_giving, try_compile

Struct = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class StepFacts:
    """What the compiler says of a whole step, in bytes of each device.

    Attributes:
      argument_bytes: weights, pool and inputs, as they lie in memory.
      output_bytes: the pool, and logits.
      alias_bytes: arguments whose memory results take.
      pool_bytes: of the page pool.
      temp_bytes: device memory beside arguments and results.
      pool_ops: operations of the compiled step that give an array of the pool's shape, but for
        passing it on: a copy or transpose of it would be here.
      collectives: how often each collective operation stands in the program.
      weight_copies: operations that give a copy of a weight; see `hlo.weight_copies`.
      attention_kernels: different ones; those that are called more than once are compiled once.
      kernels_per_layer: what a device is given to do a layer; see `hlo.kernels_per_layer`.
      blind_loops: see `hlo.blind_loops`.
      compile_s: seconds that lowering and compiling took.
      error: why it does not compile; then the rest is None.
    """

    argument_bytes: int | None = None
    output_bytes: int | None = None
    alias_bytes: int | None = None
    pool_bytes: int | None = None
    temp_bytes: int | None = None
    pool_ops: tuple[str, ...] | None = None
    collectives: dict[str, int] | None = None
    weight_copies: int | None = None
    attention_kernels: int | None = None
    kernels_per_layer: float | None = None
    blind_loops: int | None = None
    compile_s: float | None = None
    error: str | None = None

    @property
    def total_bytes(self) -> int:
        """Device memory while the step runs; 0 where it does not compile."""
        added = (self.argument_bytes or 0) + (self.output_bytes or 0) + (self.temp_bytes or 0)
        return added - (self.alias_bytes or 0)


def compile_step(
    compiler: TpuCompiler | GpuCompiler,
    mesh: jax.sharding.Mesh,
    config: ModelConfig,
    pool: PoolPlan,
    shape: StepShape,
    *,
    dtype: Any = jnp.bfloat16,
    scan_layers: bool | None = None,
    decode_steps: int = 1,
) -> StepFacts:
    """Compiles a runner's step of a model as an engine does, the pool donated.

    Args:
      compiler: with or without schedules.
      mesh: devices to compile for, of the compiler; heads are split over them.
      config: the model.
      pool: the page pool, in the layout of the compiler's backend.
      shape: what the step is padded to.
      dtype: of weights.
      scan_layers: as in `EngineConfig`.
      decode_steps: most steps of a burst, sampler and all; 1 is a step by itself, up to logits.
    """
    backend = "tpu" if isinstance(compiler, TpuCompiler) else "gpu"
    scan_layers = scans_layers(scan_layers, backend)
    split = mesh if mesh.devices.size > 1 else None
    decoder = Decoder(config, scan_layers, backend, split, pool.max_model_len)
    params = Decoder(config, scan_layers, "xla").abstract_params(dtype)
    if split is None and merges_projections(scan_layers, backend):
        params = jax.eval_shape(merge_projections, params)
    if pool.dtype.itemsize == 1:
        params["kv_scales"] = Struct((config.num_layers, 2), jnp.float32)
    where = sharding.placements(params, sharding.param_shardings(params, mesh))
    params = jax.tree.map(_placed, params, where)
    pool_sharding = sharding.pool_sharding(mesh)
    kv_pages = Struct(pool.shape, pool.dtype, sharding=pool_sharding)
    batch = empty_batch(shape, pool.pages_per_seq, 0, pool.num_groups)
    inputs = jax.tree.map(_struct, inputs_of(batch))
    slots, tokens = _struct(batch.previous_slots), Struct((shape.num_rows,), jnp.int32)
    arguments: tuple[Any, ...] = params, kv_pages, inputs, slots, tokens
    step = step_function(decoder.apply)
    if decode_steps > 1:
        step = burst_function(decoder.apply, decode_steps, shape.num_rows)
        rows = batch.sampling, idle_burst(shape.num_rows).rows
        arguments += jax.tree.map(_struct, rows)
    start, options = time.perf_counter(), compiler_options(backend)
    compiled = try_compile(
        compiler, mesh, step, *arguments, donate_argnums=(1,), compiler_options=options
    )
    compile_s = round(time.perf_counter() - start, 2)
    if isinstance(compiled, str):
        return StepFacts(error=compiled)
    memory, program = compiled.memory_analysis(), hlo.read_program(compiled)
    assert memory is not None
    own = pool_sharding.shard_shape(pool.shape)
    return StepFacts(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        pool_bytes=math.prod(own) * pool.dtype.itemsize,
        temp_bytes=memory.temp_size_in_bytes,
        pool_ops=operations_giving(compiled, own),
        collectives=collectives(compiled),
        weight_copies=hlo.weight_copies(program, _num_stacked(params)),
        attention_kernels=hlo.attention_kernels(program),
        kernels_per_layer=hlo.kernels_per_layer(program),
        blind_loops=hlo.blind_loops(program),
        compile_s=compile_s,
    )


def _num_stacked(params: Any) -> list[int]:
    """Of each parameter, how many layers' matrices it is; 0 if it is none."""
    leaves = [
        (getattr(path[0], "key", None), leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    num_axes: dict[Any, float] = {"layers": 3, "kv_scales": math.inf}
    return [
        (shape[0] if name == "layers" else 1) if len(shape) >= num_axes.get(name, 2) else 0
        for name, shape in leaves
    ]


def _placed(struct: Struct, where: Any) -> Struct:
    return Struct(struct.shape, struct.dtype, sharding=where)


def _struct(array: Any) -> Struct:
    return Struct(array.shape, array.dtype)
