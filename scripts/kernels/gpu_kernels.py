# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels for an NVIDIA GPU that need not be there, and says what they take of it.

    python -m scripts.kernels.gpu_kernels --target=h100
    python -m scripts.kernels.gpu_kernels --target=a100 --cases='8 rows' --steps=llama-3.2-1b
    python -m scripts.kernels.gpu_kernels --target=h100 --cases=none --steps=llama-3.2-1b
    python -m scripts.kernels.gpu_kernels --cases=none --steps=llama-3.2-1b --kv_dtype=int8

Needs `make cuda-compiler`. Compiles, for each of the cases, attention of a decode and of a mixed
step, the token write and the page copy; and decode steps of the models that --steps names, as the
engine runs them, of --rows, on one GPU and on two, bursts on one. --cases=none leaves the cases
out. Nothing runs, so nothing here is a time but those of compiling. The last line of standard
output is one JSON object: `target`; `facts`, by case and kernel (the fields of
`pallas_kernels.aot.gpu_kernels.KernelFacts`); `steps`, by model and number of GPUs
(`jpaged.device.compiled_step.StepFacts`). Exits with 1 if anything fails that is not refused by a
rule of ours, and if a step copies its pool or a weight, or has a loop that a CUDA graph gets wrong.
"""

import dataclasses
import json
import sys
from typing import Any

from absl import app, flags

from jpaged.device.compiled_step import StepFacts
from jpaged.host.config import CHOICES
from jpaged.models.shapes import SHAPES
from jpaged.pallas_kernels.aot import GPU_TARGETS, GpuCompiler, find_cuda_compiler
from jpaged.pallas_kernels.aot.cases import coverage_cases
from jpaged.pallas_kernels.aot.gpu_kernels import (
    KERNELS,
    KernelFacts,
    compile_kernel,
    ptxas_output,
)
from jpaged.scripts.flags import check_names, run
from jpaged.scripts.kernels.compiled_steps import compile_decode

_TARGET = flags.DEFINE_enum("target", "h100", list(GPU_TARGETS), "What to compile for.")
_CASES = flags.DEFINE_list(
    "cases", [], "Names of the cases to compile; all by default, none of them for 'none'."
)
_STEPS = flags.DEFINE_list("steps", [], f"Models to compile steps of: {', '.join(SHAPES)}.")
_LAYERS = flags.DEFINE_integer(
    "layers", None, "Layers of the models of --steps; all by default.", lower_bound=1
)
_KV_DTYPE = flags.DEFINE_enum(
    "kv_dtype", None, CHOICES["kv_dtype"], "Of the pages of --steps; bfloat16 by default."
)
_TOKENS = flags.DEFINE_integer(
    "tokens", None, "Tokens of a step of --steps: more than its --rows make it a mixed one."
)
_ROWS = flags.DEFINE_integer("rows", 64, "Sequences of a step of --steps.", lower_bound=1)
_DECODE_STEPS = flags.DEFINE_integer(
    "decode_steps", 1, "More than 1: bursts of --steps of so many decode steps.", lower_bound=1
)
_NO_CASES = ["none"]
# What may be done to a pool: the scatter of the token write, in place; of one token it is another.
_POOL_OPS = {"scatter", "dynamic-update-slice", "fusion"}


def main(argv: list[str]) -> None:
    """Compiles and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    cases = coverage_cases()
    if _CASES.value == _NO_CASES:
        cases = {}
    else:
        check_names("cases", _CASES.value, cases)
    check_names("steps", _STEPS.value, SHAPES)
    if find_cuda_compiler() is None:
        raise app.UsageError("there is no compiler for NVIDIA GPUs here: make cuda-compiler")
    report: dict[str, dict[str, Any]] = {}
    with ptxas_output() as dump:
        compiler = GpuCompiler(_TARGET.value)
        for name in (_CASES.value or cases) if cases else ():
            facts = {
                kernel: compile_kernel(compiler, kernel, dump, **cases[name]) for kernel in KERNELS
            }
            report[name] = {kernel: dataclasses.asdict(fact) for kernel, fact in facts.items()}
            for kernel, fact in facts.items():
                print(f"{name:<34} {kernel:<7} {_describe(fact)}", flush=True)
        steps = {name: _report_steps(compiler, name) for name in _STEPS.value}
    kernels = [fact for facts in report.values() for fact in facts.values()]
    refused, failed = (sum(f[key] is not None for f in kernels) for key in ("refused", "error"))
    print(f"{len(kernels)} programs for {_TARGET.value}: {refused} refused, {failed} failed")
    failed += sum(
        step["error"] is not None for by_size in steps.values() for step in by_size.values()
    )
    print(json.dumps({"target": _TARGET.value, "facts": report, "steps": steps}))
    sys.exit(1 if failed else 0)


def _describe(fact: KernelFacts) -> str:
    if fact.refused or fact.error:
        return f"refused: {fact.refused}" if fact.refused else f"FAILED: {fact.error}"
    text = f"{fact.temp_bytes:,} temporary bytes"
    if fact.registers is not None:
        text += f", {fact.registers} registers, {fact.spill_bytes} bytes spilled"
    return text


def _describe_step(facts: StepFacts) -> str:
    return (
        f"{facts.temp_bytes:,} temporary bytes, {facts.weight_copies} copies of weights, "
        f"{facts.attention_kernels} attention kernels, {facts.kernels_per_layer:.1f} kernels a "
        f"layer, {facts.collectives}, compiled in {facts.compile_s:.1f} s"
    )


def _report_steps(compiler: GpuCompiler, name: str) -> dict[int, dict[str, Any]]:
    config = SHAPES[name]
    if _LAYERS.value is not None:
        config = dataclasses.replace(config, num_layers=_LAYERS.value)
    report = {}
    for num_devices in (1, 2):
        if config.num_kv_heads % num_devices or (num_devices > 1 and _DECODE_STEPS.value > 1):
            continue
        facts = compile_decode(
            compiler,
            compiler.mesh(num_devices),
            config,
            num_rows=_ROWS.value,
            num_tokens=_TOKENS.value,
            kv_dtype=_KV_DTYPE.value,
            decode_steps=_DECODE_STEPS.value,
        )
        if facts.error is None and (
            facts.alias_bytes != facts.pool_bytes or not set(facts.pool_ops or ()) <= _POOL_OPS
        ):
            facts = dataclasses.replace(facts, error=f"copies the pool: {facts.pool_ops}")
        if facts.error is None and facts.weight_copies:
            facts = dataclasses.replace(facts, error=f"copies {facts.weight_copies} weights")
        if facts.error is None and facts.blind_loops:
            facts = dataclasses.replace(facts, error="a loop does not wait for its condition")
        report[num_devices] = dataclasses.asdict(facts)
        what = facts.error or _describe_step(facts)
        print(f"{name:<34} step on {num_devices}: {what}", flush=True)
    return report


if __name__ == "__main__":
    run(main)
