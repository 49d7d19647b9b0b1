# SPDX-License-Identifier: Apache-2.0
"""What the TPU compiler says of our kernels and steps, beside jax's own ragged kernel.

    make libtpu
    python -m scripts.kernels.tpu_report
    python -m scripts.kernels.tpu_report --targets=v5e --shapes=llama-3.1-8b,qwen3-0.6b
    python -m scripts.kernels.tpu_report --coverage

Compiles the decode attention and the whole decode step of each model shape for each generation,
and prints what they take. Bundles per KV token rank variants; they are no time. `floor` is the time
in which a chip's memory gives the keys and values of one layer at its published bandwidth: no
decode can be faster, and none has been timed. `ragged` is jax's own kernel,
`jax.experimental.pallas.ops.tpu.ragged_paged_attention`, for the same rows, with the better of two
block sizes. `busiest` is the unit with most of its slots in use. `--coverage` compiles every
combination that the kernels are made for instead. Steps are compiled with --step_layers layers, as
not every model fits one chip: the compiled loop over layers is the same for any number of them, and
so are its temporaries, which are compared with the pool of all layers. The last line is JSON. No
TPU is used or needed.

Exits with 1 if something does not compile that should, a kernel copies more than it must, a step
copies its page pool or a weight, or the kernels are worse than they were made to be: at most 3
bundles per KV token and no spilled register for 8 KV heads of 64 or 128 with 4 queries each on v5e
and v6e.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import tqdm
from absl import app, flags

from jpaged.device.compiled_step import StepFacts
from jpaged.host.config import CHOICES
from jpaged.pallas_kernels.aot import TARGETS, TpuCompiler
from jpaged.pallas_kernels.aot.cases import AttentionShape, coverage_cases
from jpaged.pallas_kernels.aot.program import MAX_TEMP_SHARE
from jpaged.pallas_kernels.aot.tpu_kernels import (
    KernelFacts,
    compile_attention,
    compile_case,
    compile_ragged,
    floor_s,
    kv_bytes_per_token,
)
from jpaged.scripts.flags import check_names, run
from jpaged.scripts.kernels.compiled_steps import STEP_CONFIGS, compile_decode
from jpaged.scripts.kernels.shapes import ATTENTION_SHAPES

_TARGETS = flags.DEFINE_list("targets", list(TARGETS), "Generations to compile for.")
_SHAPES = flags.DEFINE_list("shapes", list(ATTENTION_SHAPES), "Shapes of models to compile.")
_ROWS = flags.DEFINE_integer("num_rows", 64, "Sequences of a step.", lower_bound=1)
_KV_LEN = flags.DEFINE_integer("kv_len", 2048, "Tokens of each sequence.", lower_bound=1)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 16, "Tokens a page holds.", lower_bound=8)
_STEP_LAYERS = flags.DEFINE_integer(
    "step_layers", 4, "Layers of a compiled step; 0 compiles kernels only.", lower_bound=0
)
_KV_DTYPE = flags.DEFINE_enum(
    "kv_dtype", None, CHOICES["kv_dtype"], "Of the pages of a step; bfloat16 by default."
)
_TOKENS = flags.DEFINE_integer(
    "tokens", None, "Tokens of a step: more than its rows make it a mixed one."
)
_COVERAGE = flags.DEFINE_bool(
    "coverage", False, "Compile all combinations, each for decode and prefill."
)

# Pages and queries: blocks as long as our groups, and the shortest that jax's tables have.
_RAGGED_BLOCKS = ((16, 8), (4, 8))


def main(argv: list[str]) -> None:
    """Prints the report."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    check_names("targets", _TARGETS.value, TARGETS)
    check_names("shapes", _SHAPES.value, ATTENTION_SHAPES)
    try:
        compiler = TpuCompiler(schedules=True)
    except RuntimeError as e:
        raise app.UsageError(str(e)) from e
    report = _coverage(compiler) if _COVERAGE.value else _shapes(compiler)
    compiler.close()
    print(json.dumps(report))
    sys.exit(1 if report["faults"] else 0)


def _shapes(compiler: TpuCompiler) -> dict[str, Any]:
    options: dict[str, Any] = {
        "num_rows": _ROWS.value,
        "kv_len": _KV_LEN.value,
        "page_size": _PAGE_SIZE.value,
    }
    rows, faults = [], []
    print(
        f"decode of {_ROWS.value} rows x {_KV_LEN.value} tokens, pages of {_PAGE_SIZE.value}, "
        "bfloat16; bundles and bytes per KV token and layer, all heads\n"
    )
    columns = ("target", "shape", "compiles", "bundles", "busiest", "DMA B", "least B")
    columns += ("spill KiB", "VMEM KiB", "SMEM KiB", "floor us", "step temp", "pool ops")
    columns += ("ragged: bundles", "busiest", "DMA B", "spill KiB", "VMEM KiB", "SMEM KiB")
    print(" | ".join(columns))
    work = [(target, name) for target in _TARGETS.value for name in _SHAPES.value]
    for target, name in tqdm.tqdm(work, unit="program", disable=None):
        shape = ATTENTION_SHAPES[name]
        facts = compile_attention(compiler, target, shape, **options)
        ragged = [
            compile_ragged(compiler, target, shape, blocks=blocks, **options)
            for blocks in _RAGGED_BLOCKS
        ]
        best = min(ragged, key=lambda r: r.bundles_per_kv_token or float("inf"))
        step, pool_bytes = None, 0
        if _STEP_LAYERS.value:
            config = dataclasses.replace(STEP_CONFIGS[name], num_layers=_STEP_LAYERS.value)
            step = compile_decode(
                compiler,
                compiler.mesh(target),
                config,
                num_tokens=_TOKENS.value,
                kv_dtype=_KV_DTYPE.value,
                **options,
            )
            layers = STEP_CONFIGS[name].num_layers
            pool_bytes = (step.pool_bytes or 0) // _STEP_LAYERS.value * layers
        least = kv_bytes_per_token(shape, jnp.bfloat16)
        floor = floor_s(target, least * _ROWS.value * _KV_LEN.value)
        print(
            " | ".join(_cells(target, name, facts, best, step, pool_bytes, least, floor)),
            flush=True,
        )
        bar = _has_bar(target, shape)
        faults += [
            f"{target} {name}: {fault}" for fault in _faults(facts, step, pool_bytes, least, bar)
        ]
        rows.append(
            {
                "target": target,
                "shape": name,
                "attention": dataclasses.asdict(facts),
                "ragged_paged_attention": dataclasses.asdict(best),
                "step": step and dataclasses.asdict(step),
                "pool_bytes_of_all_layers": pool_bytes,
                "least_dma_bytes_per_kv_token": least,
                "floor_s_per_layer": floor,
            }
        )
    print(f"\n{len(rows)} rows, {len(faults)} faults", *faults, sep="\n  ")
    print("\nbandwidths:")
    for name in _TARGETS.value:
        print(f"  {name}: {TARGETS[name].hbm_bytes_per_s / 1e9:.0f} GB/s, {TARGETS[name].source}")
    bandwidths = {name: TARGETS[name].hbm_bytes_per_s for name in _TARGETS.value}
    return {"rows": rows, "faults": faults, "hbm_bytes_per_s": bandwidths, **options}


def _has_bar(target: str, shape: AttentionShape) -> bool:
    """Whether the kernels were made to be good at just this."""
    usual = (_ROWS.value, _KV_LEN.value, _PAGE_SIZE.value) == (64, 2048, 16)
    plain = shape in (AttentionShape(32, 8, 64), AttentionShape(32, 8, 128))
    return usual and plain and target in ("v5e", "v6e")


def _faults(
    facts: KernelFacts, step: StepFacts | None, pool_bytes: int, least: int, has_bar: bool
) -> Iterator[str]:
    if facts.error:
        yield f"attention does not compile: {facts.error}"
    elif facts.dma_bytes_per_kv_token != least:
        yield f"attention copies {facts.dma_bytes_per_kv_token} bytes a token instead of {least}"
    bundles = facts.bundles_per_kv_token
    if has_bar and (bundles is None or bundles > 3 or facts.spill_bytes):
        yield f"attention takes {bundles} bundles and spills {facts.spill_bytes} bytes"
    if step is None:
        return
    if step.error:
        yield f"the step does not compile: {step.error}"
        return
    assert step.temp_bytes is not None and step.pool_bytes and step.alias_bytes is not None
    if step.pool_ops or step.alias_bytes < step.pool_bytes:
        yield f"the step does not keep its pool in place: {step}"
    if step.weight_copies:
        yield f"the step copies {step.weight_copies} weights"
    if step.temp_bytes > MAX_TEMP_SHARE * pool_bytes:
        yield f"the step takes {step.temp_bytes} bytes beside a pool of {pool_bytes}"


def _cells(
    target: str,
    name: str,
    facts: KernelFacts,
    ragged: KernelFacts,
    step: StepFacts | None,
    pool_bytes: int,
    least: int,
    floor: float,
) -> list[str]:
    def number(value: float | None, scale: float = 1, digits: int = 0) -> str:
        return "-" if value is None else f"{value / scale:.{digits}f}"

    temp = ops = "-"
    if step and not step.error:
        assert step.temp_bytes is not None
        temp = f"{step.temp_bytes / pool_bytes:.2%}"
        ops = ",".join(step.pool_ops or ()) or "none"

    def loop(kernel: KernelFacts) -> list[str]:
        busiest = (
            f"{kernel.busiest_unit} {kernel.busiest_share:.0%}" if kernel.busiest_unit else "-"
        )
        bundles, dma = kernel.bundles_per_kv_token, kernel.dma_bytes_per_kv_token
        return [number(bundles, digits=2), busiest, number(dma)]

    def memory(kernel: KernelFacts) -> list[str]:
        sizes = (kernel.spill_bytes, kernel.vmem_bytes, kernel.smem_bytes)
        return [number(size, 1024) for size in sizes]

    cells = [target, name, "no" if facts.error else "yes", *loop(facts), str(least)]
    cells += [*memory(facts), number(floor, 1e-6, 1), temp, ops]
    return cells + (["refused"] if ragged.error else loop(ragged) + memory(ragged))


def _coverage(compiler: TpuCompiler) -> dict[str, Any]:
    rows, faults = [], []
    work = [(t, name, case) for t in _TARGETS.value for name, case in coverage_cases().items()]
    for target, name, case in tqdm.tqdm(work, unit="case", disable=None):
        for kind, facts in compile_case(compiler, target, case).items():
            detail = (
                facts.error or f"{facts.spill_bytes or 0} bytes spilled, {facts.temp_bytes} temp"
            )
            print(f"{target:<4} {name:<36} {kind:<8} {detail}", flush=True)
            rows.append({"target": target, "case": name, "kind": kind, **dataclasses.asdict(facts)})
            faults += [f"{target} {name}, {kind}: {facts.error}"] if facts.error else []
    print(f"{len(rows)} programs, {len(faults)} do not compile", *faults, sep="\n  ")
    return {"rows": rows, "faults": faults}


if __name__ == "__main__":
    run(main)
