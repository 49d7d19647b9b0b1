# SPDX-License-Identifier: Apache-2.0
"""Holds an implementation of the paged-attention contract to dense float64.

    jpaged conformance --backend=cpu
    jpaged conformance --backend=tpu --interpret
    jpaged conformance --backend=gpu --interpret --gpu=a100 --dtype=bfloat16
    jpaged conformance --paged_attention=my_package.my_module:my_attention --only=decode

Without --paged_attention, --write_kv or --copy_pages, jpaged's own functions are held to it, on
--backend. The last line of standard output is one JSON object: `results`, one a function and case
(`pallas_kernels.conformance.Result`), and `passed`, `failed`, `refused`, how many there are of
each. Exits with 1 if a case failed. A case that the implementation refuses by raising ValueError or
NotImplementedError is no failure.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable

import jax.numpy as jnp
from absl import app, flags

from jpaged import pallas_kernels
from jpaged.pallas_kernels import conformance, dispatch
from jpaged.pallas_kernels.aot import GPU_TARGETS
from jpaged.scripts.flags import require_device, run

_FUNCTIONS = ("paged_attention", "write_kv", "copy_pages")
for _name in _FUNCTIONS:
    flags.DEFINE_string(_name, None, f"Implementation of {_name}, as module:function.")
_BACKEND = flags.DEFINE_enum("backend", None, dispatch.BACKENDS, "Of jpaged's own functions.")
_INTERPRET = flags.DEFINE_bool(
    "interpret",
    False,
    "Run TPU or GPU kernels on this machine in jax's interpret modes, slowly; a race fails a case.",
)
_GPU = flags.DEFINE_enum(
    "gpu", "h100", list(GPU_TARGETS), "The GPU whose kernels --backend=gpu --interpret runs."
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16", "float16"],
    "Of queries and pages in the cases that are not there for theirs.",
)
_ONLY = flags.DEFINE_string("only", "", "Run the cases whose name contains this.")


def main(argv: list[str]) -> None:
    """Runs the suite and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not any(_ONLY.value in name for name in conformance.suite()):
        names = ", ".join(repr(name) for name in conformance.suite())
        raise app.UsageError(f"--only={_ONLY.value!r} is in no case's name; cases: {names}")
    if _INTERPRET.value:
        # Threads for what an interpreted kernel runs at once, see `conformance.interpret_tpu`.
        os.environ.setdefault("PJRT_NPROC", "8")
    require_device()
    results = []
    for result in conformance.run(
        **_implementations(),
        only=_ONLY.value,
        dtype=jnp.dtype(_DTYPE.value),
        interpret=_interpreter() if _INTERPRET.value else contextlib.nullcontext,
    ):
        results.append(result)
        share = f"{result.error_share:.1%} of the bound" if result.error_share else ""
        line = f"{result.status:<8} {result.function:<16} {result.case:<36} {share}"
        print(f"{line.rstrip()}{': ' if result.detail else ''}{result.detail}", flush=True)
    counts = collections.Counter(result.status for result in results)
    report = {status: counts[status] for status in ("passed", "failed", "refused")}
    print(", ".join(f"{count} {status}" for status, count in report.items()))
    print(json.dumps({**report, "results": [dataclasses.asdict(result) for result in results]}))
    sys.exit(1 if counts["failed"] else 0)


def _implementations() -> dict[str, Callable]:
    given = {name: flags.FLAGS[name].value for name in _FUNCTIONS}
    if not any(given.values()):
        functions = {name: getattr(pallas_kernels, name) for name in _FUNCTIONS}
        return {
            name: functools.partial(function, backend=_BACKEND.value)
            for name, function in functions.items()
        }
    if _BACKEND.value is not None:
        raise app.UsageError("--backend chooses among jpaged's own functions; leave it out here")
    return {name: _import(name, path) for name, path in given.items() if path}


def _interpreter() -> Callable[[], contextlib.AbstractContextManager[None]]:
    if _BACKEND.value != "gpu":
        return conformance.interpret_tpu
    interpret = functools.partial(conformance.interpret_gpu, GPU_TARGETS[_GPU.value].capability)
    try:
        with interpret():
            return interpret
    except RuntimeError as e:
        raise app.UsageError(f"--gpu={_GPU.value}: {e}") from e


def _import(flag: str, path: str) -> Callable:
    module, _, function = path.partition(":")
    try:
        implementation = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise app.UsageError(f"--{flag}={path!r} must be an importable module:function: {e}") from e
    if not callable(implementation):
        raise app.UsageError(f"--{flag}={path!r} is a {type(implementation).__name__}, no function")
    return implementation


if __name__ == "__main__":
    run(main)
