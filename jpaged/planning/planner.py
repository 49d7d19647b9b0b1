# SPDX-License-Identifier: Apache-2.0
"""Plans engines, and has the compilers of devices that are not there say what steps take."""

import dataclasses
from collections.abc import Mapping

import tqdm

from jpaged.device.compiled_step import StepFacts, compile_step
from jpaged.device.memory import default_dtype, gib, plan_pool
from jpaged.host.batch import ShapeBuckets, StepShape
from jpaged.host.checks import at_least, checked
from jpaged.host.config import EngineConfig, engine_config
from jpaged.models.config import ModelConfig
from jpaged.pallas_kernels.aot import GpuCompiler, TpuCompiler
from jpaged.pallas_kernels.dispatch import BACKEND_OF_PLATFORM
from jpaged.planning.changes import changes_of
from jpaged.planning.chips import CHIPS, DeviceMemory
from jpaged.planning.kernels import check_kernels
from jpaged.planning.plan import Asked, Plan, free_memory, num_weights, plan_of

# A config.json may ask for any number, with no weights beside it that would refuse it.
_MOST_LAYERS = 4096


def make_plan(
    model_config: ModelConfig,
    config: EngineConfig | None = None,
    *,
    device: DeviceMemory,
    num_devices: int = 1,
    prompt_len: int | None = None,
    output_len: int | None = None,
) -> Plan:
    """Says what an engine would take and hold; nothing is allocated, and no device is asked.

    The numbers are those of `Engine.load`: `jpaged.device.memory.plan_pool` sizes its pool too.

    Args:
      model_config: the model's shape.
      config: the engine's settings.
      device: the memory of each device; see `chips.memory_of`.
      num_devices: over which heads are split. Today's engine uses one device; for more these are
        the numbers of `Decoder(mesh=...)` and one pool.
      prompt_len: tokens of the prompts to be served, on average.
      output_len: tokens of their answers; of these and the prompts', what is None is what is left
        of max_model_len, and half of it where both are.

    Returns:
      The plan; what does not fit is in its `problems`.

    Raises:
      ValueError: if settings contradict each other or the model, or the chip's kernels do not take
        pages of the dtype that is asked for, which no memory would change.
    """
    config = engine_config(config)
    if model_config.num_layers > _MOST_LAYERS:
        raise ValueError(f"num_layers={model_config.num_layers} must be at most {_MOST_LAYERS}")
    counts = {"num_devices": num_devices, "prompt_len": prompt_len, "output_len": output_len}
    for name, count in counts.items():
        checked(name, count, int | None, at_least(1))
    asked = Asked(model_config, config, device, num_devices, prompt_len, output_len)
    if sum(asked.lengths) > asked.max_model_len:
        raise ValueError(
            f"prompt_len={asked.lengths[0]} and output_len={asked.lengths[1]} are "
            f"{sum(asked.lengths)} tokens, more than max_model_len={asked.max_model_len}; lower "
            "one of them"
        )
    check_kernels(asked)
    plan = plan_of(asked)
    try:
        check_kernels(asked, plan.num_pages // num_devices)
    except ValueError as e:
        plan = dataclasses.replace(plan, problems=(*plan.problems, str(e)))
    if plan.problems:
        plan = dataclasses.replace(plan, changes=tuple(changes_of(asked)))
    return plan


def compile_steps(
    model_config: ModelConfig,
    config: EngineConfig | None = None,
    *,
    device: DeviceMemory,
    num_devices: int = 1,
) -> dict[str, StepFacts]:
    """Compiles an engine's largest steps for devices that need not be there.

    Args:
      model_config: as in `make_plan`; what that says does not fit is compiled all the same, if
        only its pool does.
      config: as there.
      device: as there.
      num_devices: as there.

    Returns:
      What the compiler says of "decode", a token a row, and of "prefill"; of a deterministic
      engine, which has one shape of steps, of "prefill" alone.

    Raises:
      ValueError: if nothing compiles for such a device, or there is no pool.
      RuntimeError: if there is no compiler for it; the message says how to get it.
    """
    config = engine_config(config)
    asked = Asked(model_config, config, device, num_devices, None, None)
    if device.target is None or asked.backend != BACKEND_OF_PLATFORM[device.platform]:
        targets = [name for name, chip in CHIPS.items() if chip.target]
        raise ValueError(
            f"steps are compiled for {', '.join(targets)} alone, each with its own kernels, and "
            f"not with backend={asked.backend!r} on platform {device.platform!r}"
        )
    if device.platform == "tpu":
        compiler = TpuCompiler()
        mesh = compiler.mesh(device.target, num_devices)
    else:
        compiler = GpuCompiler(device.target)
        mesh = compiler.mesh(num_devices)
    dtype = default_dtype(config, device.platform)
    weights = num_weights(model_config, num_devices) * dtype.itemsize
    pool = plan_pool(
        config, model_config, asked.backend, free_memory(asked, device.num_bytes - weights)
    )
    rows = config.max_num_seqs
    shapes = {"decode": StepShape(rows, rows), "prefill": ShapeBuckets.of(config).all_shapes()[-1]}
    if config.deterministic:
        del shapes["decode"]
    bar = tqdm.tqdm(shapes.items(), desc="compiling", unit="step", disable=None, leave=False)
    return {
        name: compile_step(
            compiler,
            mesh,
            model_config,
            pool,
            shape,
            dtype=dtype,
            scan_layers=config.scan_layers,
        )
        for name, shape in bar
    }


def step_problems(plan: Plan, steps: Mapping[str, StepFacts]) -> list[str]:
    """What does not fit by what the compiler says, a line each."""
    problems = [f"the {name} step: {facts.error}" for name, facts in steps.items() if facts.error]
    return problems + [
        f"the {name} step takes {gib(facts.total_bytes)}, of which {gib(facts.temp_bytes)} are "
        f"temporaries, more than the {gib(plan.memory_bytes)} that jax can allocate"
        for name, facts in steps.items()
        if facts.temp_bytes is not None and facts.total_bytes > plan.memory_bytes
    ]
