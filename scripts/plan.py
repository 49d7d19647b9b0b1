# SPDX-License-Identifier: Apache-2.0
"""Says what a model and its pages take of a chip's memory, without weights or device.

    jpaged plan --model=DIR --chip=h100
    jpaged plan --model=Qwen/Qwen3-8B --chip=v5e --num_devices=4 --prompt_len=1000 --output_len=300
    jpaged plan --model=llama-3.1-8b --chip=l4 --max_model_len=4096 --output=json
    jpaged plan --model=llama-3.2-1b --chip=v6e --compile

Of a model only config.json is read, and of one on the Hugging Face hub only that is downloaded. The
numbers are those by which an engine of the same settings sizes its pool, on a device of which jax
can allocate what is known of the chip, or --memory_gib. Where something does not fit, it says what,
and what would make it fit, computed likewise: every change that is enough alone, and some pairs.

--compile has the chip's compiler, which needs no chip (`make libtpu`, `make cuda-compiler`),
compile the largest decode and prefill steps with all layers and the whole pool, and shows what it
says that they take; that counts what is padded in memory, and what is held while a step runs.

With --output=json, standard output is one JSON object: `model`, `chip`, the fields of
`jpaged.planning.Plan`, `token_bytes`, `pool_bytes`, `seqs_at_end` and `seqs_half_way`; and `steps`,
by name the fields of `jpaged.device.compiled_step.StepFacts`, or null. Exits with 0 if everything
fits, with 1 if something does not, and with 2 for bad usage.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping

import jax
from absl import app, flags

from jpaged.device.compiled_step import StepFacts
from jpaged.models import hub
from jpaged.models.config import ModelConfig
from jpaged.models.paths import is_address, path_of
from jpaged.models.shapes import SHAPES
from jpaged.models.sources import opened, read_config
from jpaged.planning import (
    CHIPS,
    KindPlan,
    Plan,
    compile_steps,
    make_plan,
    memory_of,
    step_problems,
)
from jpaged.scripts.flags import (
    define_engine_flags,
    engine_config_from_flags,
    model_path,
    run,
    usage_errors,
)

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Directory with a config.json, or that file; or a model's name on the Hugging Face hub, "
    f"org/name; or demo; or one of {', '.join(sorted(SHAPES))}.",
)
_CHIP = flags.DEFINE_enum(
    "chip", None, [*CHIPS, "cpu"], "Where it would run; cpu is this machine, with what is free now."
)
_MEMORY = flags.DEFINE_float(
    "memory_gib",
    None,
    "What jax can allocate on each device, in GiB, instead of what is known of the chip.",
)
_DEVICES = flags.DEFINE_integer(
    "num_devices",
    1,
    "Devices over which heads are split. The engine uses one; for more, the numbers are those of "
    "Decoder(mesh=...) in code of your own.",
    lower_bound=1,
)
_PROMPT_LEN = flags.DEFINE_integer(
    "prompt_len", None, "Tokens of a prompt, on average; by default what --max_model_len leaves."
)
_OUTPUT_LEN = flags.DEFINE_integer("output_len", None, "Tokens of an answer; likewise.")
_COMPILE = flags.DEFINE_bool("compile", False, "Have the chip's compiler say what steps take.")
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "How to print the plan.")
define_engine_flags()


def main(argv: list[str]) -> None:
    """Plans and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    name, chip = _MODEL.value, _CHIP.value
    if not name:
        raise app.UsageError("--model is missing; name a directory with a config.json, or a model")
    if chip is None:
        raise app.UsageError(f"--chip is missing; choose among {', '.join(CHIPS)}, cpu")
    # Nothing runs; where there is a device, it stays to whoever uses it.
    jax.config.update("jax_platforms", "cpu")
    config, steps = engine_config_from_flags(), None
    with usage_errors():
        device = memory_of(chip, _MEMORY.value)
        model = _read_config(name)
        sizes = {"device": device, "num_devices": _DEVICES.value}
        plan = make_plan(
            model, config, **sizes, prompt_len=_PROMPT_LEN.value, output_len=_OUTPUT_LEN.value
        )
        if _COMPILE.value:
            try:
                steps = compile_steps(model, config, **sizes) if plan.num_pages else {}
            except RuntimeError as e:
                raise app.UsageError(str(e)) from e
            found = step_problems(plan, steps)
            plan = dataclasses.replace(plan, problems=(*plan.problems, *found))
    if _OUTPUT.value == "json":
        print(json.dumps(_as_dict(plan, steps)))
    else:
        print("\n".join(_lines(plan, model.family, steps)))
    sys.exit(1 if plan.problems else 0)


def _read_config(name: str) -> ModelConfig:
    path = path_of(name)
    if is_address(name) or not os.path.lexists(path):
        if name in SHAPES:
            return SHAPES[name]
        path = hub.download_config(name) if hub.is_name(name) else model_path(name)
    return read_config(opened(path.parent if path.name == "config.json" else path))


def _as_dict(plan: Plan, steps: Mapping[str, StepFacts] | None) -> dict[str, object]:
    computed = ("token_bytes", "pool_bytes", "seqs_at_end", "seqs_half_way")
    return {
        "model": _MODEL.value,
        "chip": _CHIP.value,
        **dataclasses.asdict(plan),
        **{name: getattr(plan, name) for name in computed},
        "steps": steps and {name: dataclasses.asdict(facts) for name, facts in steps.items()},
    }


def _lines(plan: Plan, family: str, steps: Mapping[str, StepFacts] | None) -> Iterator[str]:
    each = "" if plan.num_devices == 1 else " on each device"
    yield (
        f"model     {_MODEL.value} ({family}), {plan.num_params / 1e6:,.1f} M parameters, "
        f"{plan.dtype}"
    )
    yield (
        f"memory    {plan.num_devices} x {_CHIP.value}, {_size(plan.memory_bytes)}{each} for jax "
        f"({plan.memory_source})"
    )
    yield f"weights   {_size(plan.weight_bytes)}{each}"
    yield f"KV cache  {_size(plan.token_bytes)} a token{each}, {plan.kv_dtype}"
    for kind in plan.kinds:
        yield f"          {_kind(kind)}"
    pages = f"{plan.num_pages:,} of {plan.page_size} tokens, {_size(plan.page_bytes)} each"
    yield f"pages     {pages}: {_size(plan.pool_bytes)}{each} ({plan.pool_reason})"
    if plan.host_swap_bytes:
        yield f"          and {_size(plan.host_swap_bytes)} of host memory for preempted sequences"
    yield f"longest   {plan.longest:,} tokens in a sequence; max_model_len {plan.max_model_len:,}"
    held = plan.seqs_at_end, plan.seqs_half_way
    at_once = dict.fromkeys(min(count, plan.max_num_seqs) for count in held)
    yield (
        f"at once   of {plan.prompt_len:,} + {plan.output_len:,} tokens: "
        f"{' to '.join(f'{count:,}' for count in at_once)} (max_num_seqs {plan.max_num_seqs:,}; "
        f"pages for {held[0]:,} whole, {plan.pages_at_end:,} each, {held[1]:,} half-way)"
    )
    for name, facts in (steps or {}).items():
        yield f"compiled  {name}: {_step(facts)}"
    yield f"fits      {'no' if plan.problems else 'yes'}"
    for problem in plan.problems:
        yield f"          {problem}"
    if plan.changes:
        yield "          It would with any of:"
        yield from (f"            {change}" for change in plan.changes)


def _kind(kind: KindPlan) -> str:
    sees = "all tokens" if kind.window is None else f"{kind.window:,} tokens, and keep no others"
    groups = "" if kind.num_groups == 1 else f", in {kind.num_groups} groups"
    return f"{_size(kind.token_bytes)} in {kind.num_layers} layers that see {sees}{groups}"


def _step(facts: StepFacts) -> str:
    if facts.error is not None:
        return facts.error
    in_place = "in place" if facts.alias_bytes == facts.pool_bytes else "COPIED"
    return (
        f"{_size(facts.total_bytes)} in all: {_size(facts.argument_bytes)} of arguments, the pool "
        f"of {_size(facts.pool_bytes)} {in_place}, {_size(facts.temp_bytes)} of temporaries"
    )


def _size(num_bytes: int | None) -> str:
    number, unit = (num_bytes or 0) / 2**10, "KiB"
    for larger in ("MiB", "GiB"):
        if number >= 1000:
            number, unit = number / 2**10, larger
    return f"{number:,.4g} {unit}"


if __name__ == "__main__":
    run(main)
