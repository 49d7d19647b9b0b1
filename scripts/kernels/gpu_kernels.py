# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels for an NVIDIA GPU that need not be there, and says what they take of it.

    python -m scripts.kernels.gpu_kernels --target=h100
    python -m scripts.kernels.gpu_kernels --target=a100 --cases='8 rows' --steps=llama-3.2-1b

Needs `make cuda-compiler`. Compiles, for each of the cases, attention of a decode and of a mixed
step, the token write and the page copy; and whole decode steps of the models that --steps names,
with three layers, on one GPU and on two. Nothing runs, so nothing here is a time. The last line of
standard output is one JSON object: `target`; `facts`, by case and kernel (`KernelFacts`); `steps`,
by model and number of GPUs (`compiled_steps.StepFacts`).
Exits with 1 if anything fails that is not refused by a rule of ours.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from absl import app, flags

from jpaged.models.shapes import SHAPES
from jpaged.pallas_kernels import dispatch, layout
from jpaged.pallas_kernels.aot import GPU_TARGETS, GpuCompiler, find_cuda_compiler
from jpaged.scripts.flags import check_names, run
from jpaged.scripts.kernels.compiled_steps import compile_step
from jpaged.scripts.kernels.kernel_cases import (
    AttentionShape,
    Struct,
    coverage_cases,
    in_place_error,
    num_bytes,
    pool_struct,
    rows_struct,
    try_compile,
)

_TARGET = flags.DEFINE_enum("target", "h100", list(GPU_TARGETS), "What to compile for.")
_CASES = flags.DEFINE_list("cases", [], "Names of the cases to compile; all by default.")
_STEPS = flags.DEFINE_list("steps", [], f"Models to compile steps of: {', '.join(SHAPES)}.")
_STEP_LAYERS = 3
_NUM_COPIES = 8
# What may be done to a pool: the scatter of the token write, in place.
_POOL_OPS = {"scatter", "fusion"}
_KERNELS = ("decode", "mixed", "write", "copy")


@dataclasses.dataclass(frozen=True)
class KernelFacts:
    """What the compiler says of a program; None where it does not say.

    Attributes:
      registers: of a thread, as ptxas has it; for kernels of Mosaic GPU alone.
      spill_bytes: stored to local memory because the registers did not suffice; likewise.
      temp_bytes: device memory that the call takes beside arguments and results.
      refused: the rule of ours that the case breaks; then the rest is None.
      error: what else is wrong.
    """

    registers: int | None = None
    spill_bytes: int | None = None
    temp_bytes: int | None = None
    refused: str | None = None
    error: str | None = None


def main(argv: list[str]) -> None:
    """Compiles and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    cases = coverage_cases()
    check_names("cases", _CASES.value, cases)
    check_names("steps", _STEPS.value, SHAPES)
    if find_cuda_compiler() is None:
        raise app.UsageError("there is no compiler for NVIDIA GPUs here: make cuda-compiler")
    report: dict[str, dict[str, Any]] = {}
    with _ptxas_output() as dump:
        compiler = GpuCompiler(_TARGET.value)
        for name in _CASES.value or cases:
            facts = {
                kernel: compile_kernel(compiler, kernel, dump, **cases[name]) for kernel in _KERNELS
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


def _report_steps(compiler: GpuCompiler, name: str) -> dict[int, dict[str, Any]]:
    config = dataclasses.replace(SHAPES[name], num_layers=_STEP_LAYERS, vocab_size=2048)
    report = {}
    for num_devices in (1, 2):
        if config.num_kv_heads % num_devices:
            continue
        facts = compile_step(compiler, compiler.mesh(num_devices), config)
        if facts.error is None and (
            facts.alias_bytes != facts.pool_bytes or not set(facts.pool_ops or ()) <= _POOL_OPS
        ):
            facts = dataclasses.replace(facts, error=f"copies the pool: {facts.pool_ops}")
        report[num_devices] = dataclasses.asdict(facts)
        what = facts.error or f"{facts.temp_bytes:,} temporary bytes, {facts.collectives}"
        print(f"{name:<34} step on {num_devices}: {what}", flush=True)
    return report


@contextlib.contextmanager
def _ptxas_output() -> Iterator[pathlib.Path]:
    """A folder that what ptxas says of Mosaic GPU's kernels is written to."""
    with tempfile.TemporaryDirectory(prefix="ptxas-") as folder:
        names = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": folder}
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(names)
        try:
            yield pathlib.Path(folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def compile_kernel(
    compiler: GpuCompiler,
    kernel: str,
    dump: pathlib.Path,
    *,
    shape: AttentionShape,
    num_rows: int = 64,
    kv_len: int = 2048,
    page_size: int = 16,
    dtype: Any = jnp.bfloat16,
    kv_dtype: Any = None,
    num_pages: int | None = None,
) -> KernelFacts:
    """Compiles one program, with pages for every row's `kv_len` tokens.

    Args:
      compiler: what with.
      kernel: "decode" or "mixed" attention, "write" or "copy".
      dump: where what ptxas says appears.
      shape: heads of the layer.
      num_rows: rows.
      kv_len: tokens a row can have.
      page_size: tokens a page holds.
      dtype: of queries, and of new keys and values.
      kv_dtype: of the pool; by default that of the queries.
      num_pages: of the pool, instead.
    """
    for path in dump.iterdir():
        path.unlink()
    kv_dtype = jnp.dtype(kv_dtype or dtype)
    pages = num_pages or num_rows * -(-kv_len // page_size) + 1
    pool = pool_struct(shape, pages, page_size, kv_dtype, backend="gpu")
    rows = rows_struct(num_rows, -(-kv_len // page_size))
    layer, scale = Struct((), jnp.int32), Struct((2,), jnp.float32)
    scaled = kv_dtype.itemsize == 1
    num_tokens = num_rows + 203 if kernel == "mixed" else num_rows

    def attend(pool, q, layer, scale, rows):
        kv_scale = scale if scaled else None
        return dispatch.attend(
            q, pool, rows, shape.variant, layer=layer, kv_scale=kv_scale, backend="gpu"
        )

    def write(pool, new, layer, scale, rows):
        kv_scale = scale if scaled else None
        return dispatch.write(pool, new, new, rows, layer=layer, kv_scale=kv_scale, backend="gpu")

    def copy(pool, source_ids, target_ids):
        return dispatch.copy_pages(pool, source_ids, target_ids, backend="gpu")

    held_bytes = None  # beside a pool that is donated
    if kernel == "copy":
        ids = Struct((_NUM_COPIES,), jnp.int32)
        function, args = copy, (ids, ids)
        held_bytes = _NUM_COPIES * layout.page_bytes(pool.shape, pool.dtype)
    elif kernel == "write":
        tokens = Struct((num_tokens, shape.num_kv_heads, shape.head_dim), dtype)
        function, args = write, (tokens, layer, scale, rows)
        held_bytes = 0
    else:
        tokens = Struct((num_tokens, shape.num_q_heads, shape.head_dim), dtype)
        function, args = attend, (tokens, layer, scale, rows)
    donated = () if held_bytes is None else (0,)
    compiled = try_compile(compiler, compiler.mesh(), function, pool, *args, donate_argnums=donated)
    if isinstance(compiled, str):
        ours = compiled.startswith("ValueError: ") and "backend 'gpu'" in compiled
        rule = compiled.removeprefix("ValueError: ")
        return KernelFacts(refused=rule) if ours else KernelFacts(error=compiled)
    memory = compiled.memory_analysis()
    assert memory is not None
    temp_bytes, error = memory.temp_size_in_bytes, None
    if held_bytes is not None:
        error = in_place_error(compiled, pool, held_bytes)
    else:
        # Attention holds what its splits give, in float32, but not the pages of one layer.
        results = 4 * num_tokens * shape.num_q_heads * shape.head_dim
        if temp_bytes > max(num_bytes(pool) // pool.shape[0] - 1, 8 * results):
            error = f"takes {temp_bytes} bytes beside a pool of {num_bytes(pool)}"
    said = "".join(path.read_text() for path in sorted(dump.glob("*.ptxas")))
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill stores", said)]
    return KernelFacts(
        registers=max(registers, default=None),
        spill_bytes=max(spills, default=None),
        temp_bytes=temp_bytes,
        error=error,
    )


if __name__ == "__main__":
    run(main)
