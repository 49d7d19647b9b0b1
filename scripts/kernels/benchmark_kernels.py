# SPDX-License-Identifier: Apache-2.0
"""Measures attention kernels on the default device, ours beside others on the same numbers.

    python -m scripts.kernels.benchmark_kernels
    python -m scripts.kernels.benchmark_kernels --backends=gpu,gpu-triton --rows=1 --contexts=4096
    python -m scripts.kernels.benchmark_kernels --backends=xla --peers= --contexts=32 --steps=

Ours are --backends; "gpu-mosaic" and "gpu-triton" force a lowering. --peers are `xla`, our kernels
without Pallas; `jax_triton`, the paged attention that jax ships; `cudnn`, jax's attention by cuDNN
on keys and values without pages; `torch_sdpa` and `torch_flex`, PyTorch's on the same, whose memory
comes beside jax's. Each is held to float32 on a sample of tokens before it is timed: `error` is the
largest relative error, in the Euclidean norm, of a token's results. What is wrong, missing or
refused has its reason in the report. The exit code is 1 if one of ours is not "ok" in a case.

Times are of calls in a row on the device. Each takes its queries from the results of the one before
and its keys from the next of `layers` layers, as in a model: what depends on lengths alone, such as
a list of tiles, is computed once for these, and where they fit in a cache (`cached`), bytes a
second can exceed the memory's. `copy_ratio` is keys' and values' bytes a second, each read once,
beside those, read and written, of the run's fastest large copy. `cold_s` is compiling and the first
call, without a compilation cache.

The last line of standard output is one JSON object: `benchmark` ("kernels"), `hardware`,
`versions`, `config`, `tolerance`, `copies`, `copy_bytes_per_s`, `results` (one a case, with its
`contenders`, and `speedups`, their times divided by ours), `left_out` (case and reason), `summary`
(geometric means of the speedups) and `passed`. --output_dir keeps it in kernels.json, case by case.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import re
import statistics
import sys
import time
import timeit
from typing import Any

# Before jax looks at it; else it claims most memory, and PyTorch has the rest.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
from absl import app, flags

from jpaged.measure.rates import copy_rates
from jpaged.pallas_kernels import dispatch
from jpaged.scripts.flags import check_names, require_device, run
from jpaged.scripts.kernels.contenders import (
    OWN,
    PEERS,
    UNCACHED_BYTES,
    Case,
    Inputs,
    Refused,
    runner,
)

# Weights and results are rounded to the dtype, by 2**-9 of their size or by 2**-12, and some
# kernels round partial sums too; float32 may be multiplied with the 11 bits of tensor cores.
TOLERANCE = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 2e-3}


def define_flags() -> None:
    """Defines the flags; a function, so that a test can import the rest."""
    flags.DEFINE_list("backends", None, f"Ours: {', '.join(OWN)}. None: the device's.")
    flags.DEFINE_list("peers", ",".join(PEERS), "What else to measure.")
    flags.DEFINE_list("rows", "1,8,64,512", "Sequences of the decode cases.")
    flags.DEFINE_list("contexts", "128,1024,4096,32768", "Tokens of each of them.")
    steps = "1*2048@2048,1*2048@8192,64*1@1024+1*512@2048"
    flags.DEFINE_list("steps", steps, "Other cases: sequences*queries@context, joined by +.")
    for field in dataclasses.fields(Case)[2:6]:
        flags.DEFINE_integer(field.name, getattr(Case, field.name), "Of a layer.", lower_bound=1)
    flags.DEFINE_enum("dtype", "bfloat16", list(TOLERANCE), "Of the queries.")
    kv_dtypes = [*TOLERANCE, "int8", "float8_e4m3fn"]
    flags.DEFINE_enum("kv_dtype", None, kv_dtypes, "Of the pages; None: the queries'.")
    flags.DEFINE_integer("runs", 5, "Runs to take the median of.", lower_bound=1)
    flags.DEFINE_float("run_s", 0.05, "Seconds that a run is to take.", 0)
    flags.DEFINE_float("budget_s", 300, "After so many seconds no case is begun.", 0)
    flags.DEFINE_float("memory_gib", None, "Most for a case. None: 9/10 of the device's.", 0)
    flags.DEFINE_string("output_dir", None, "Directory to keep kernels.json in.")


def parse_step(spec: str, **layer: Any) -> Case:
    """The case of `sequences*queries@context`, several joined by +; ValueError if it is none."""
    lens: list[tuple[int, int]] = []
    for part in spec.split("+"):
        match = re.fullmatch(r"(\d+)\*(\d+)@(\d+)", part)
        rows, queries, context = map(int, match.groups()) if match else (0, 0, 0)
        if not (rows >= 1 and 1 <= queries <= context):
            raise ValueError(f"{spec!r} is no sequences*queries@context, like 2*1@64+1*9@32")
        lens += rows * [(queries, context)]
    q_lens, kv_lens = zip(*lens, strict=True)
    return Case(q_lens=q_lens, kv_lens=kv_lens, **layer)


def relative_error(results: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of a token, f32[num_q_heads, head_dim]; NaN if there is one."""
    error = np.linalg.norm(results - expected, axis=(1, 2))
    return float((error / np.linalg.norm(expected, axis=(1, 2))).max())


def rates(case: Case, call_s: list[float], copy_bytes_per_s: float) -> dict[str, float]:
    """What follows from the seconds of a call, one a run."""
    median = statistics.median(call_s)
    return {
        "call_us": 1e6 * median,
        "least_call_us": 1e6 * min(call_s),
        "bytes_per_s": case.kv_bytes / median,
        "copy_ratio": case.kv_bytes / median / copy_bytes_per_s,
        "flops_per_s": case.flops / median,
    }


def speedups(entries: dict[str, dict[str, Any]], own: list[str]) -> dict[str, float]:
    """What others take, divided by what each of ours takes: above 1, ours is faster."""
    us = {name: entry["call_us"] for name, entry in entries.items() if entry["status"] == "ok"}
    pairs = [(a, b) for a in own for b in us if a in us and a != b]
    return {f"{ours} vs {other}": us[other] / us[ours] for ours, other in pairs}


def summarise(results: list[dict[str, Any]]) -> dict[str, float]:
    """The geometric mean of each pair's speedups, over the cases that have it."""
    pairs = dict.fromkeys(pair for result in results for pair in result["speedups"])
    found = {p: [r["speedups"][p] for r in results if p in r["speedups"]] for p in pairs}
    return {pair: statistics.geometric_mean(values) for pair, values in found.items()}


def _measure(name: str, inputs: Inputs, expected, copied: float) -> dict[str, Any]:
    """An entry: `status` ok, refused, wrong or failed, `reason` if it is not ok, else the times."""
    case, (tokens, right), entry = inputs.case, expected, {}
    try:
        once, chain = runner(name, inputs)
        start = time.perf_counter()
        out = once()
        entry["cold_s"] = time.perf_counter() - start
        error = relative_error(np.asarray(out)[tokens].astype(np.float32), right)
        if not error <= TOLERANCE[case.dtype]:
            return {"status": "wrong", "reason": f"relative error {error:.2g}", **entry}
        entry["error"] = error
        call_s = min(timeit.repeat(once, number=1, repeat=3))
        trips = max(1, min(500, round(flags.FLAGS.run_s / call_s / case.layers)))
        entry["calls_per_run"] = calls = trips * case.layers
        # The first run compiles.
        runs = timeit.repeat(chain(trips), number=1, repeat=1 + flags.FLAGS.runs)[1:]
        return {"status": "ok", **entry, **rates(case, [s / calls for s in runs], copied)}
    except Exception as e:  # what a contender raises is its result, whatever it is
        refused = isinstance(e, Refused | NotImplementedError | ImportError)
        return {"status": "refused" if refused else "failed", "reason": _one_line(e), **entry}
    finally:
        with contextlib.suppress(Exception):  # what PyTorch holds is for those that follow
            sys.modules["torch"].cuda.empty_cache()


def _one_line(error: Exception) -> str:
    kind = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:400]


def _line(name: str, entry: dict[str, Any]) -> str:
    if entry["status"] != "ok":
        return f"  {name:<11} {entry['status']}: {entry['reason']}"
    return (
        f"  {name:<11} {entry['call_us']:11.1f} {entry['least_call_us']:11.1f} "
        f"{entry['bytes_per_s'] / 1e9:8.1f} {entry['copy_ratio']:7.3f} "
        f"{entry['flops_per_s'] / 1e12:9.2f} {entry['error']:8.1e} {entry['cold_s']:7.2f}"
    )


def _parse_flags() -> tuple[list[str], dict[str, Any], dict[str, Case]]:
    """Returns our backends, what a layer looks like, and the cases; raises `app.UsageError`."""
    values = flags.FLAGS
    layer = {field.name: values[field.name].value for field in dataclasses.fields(Case)[2:]}
    layer["kv_dtype"] = values.kv_dtype or values.dtype
    if values.num_q_heads % values.num_kv_heads:
        raise app.UsageError("--num_q_heads must be a multiple of --num_kv_heads")
    check_names("backends", values.backends or [], OWN)
    check_names("peers", values.peers, PEERS)
    decode = [f"{rows}*1@{context}" for rows in values.rows for context in values.contexts]
    try:
        cases = {spec: parse_step(spec, **layer) for spec in [*values.steps, *decode]}
        own = values.backends or [dispatch.resolve_backend(None)]
        for name in own:
            dispatch.resolve_backend(name.partition("-")[0])
    except ValueError as e:
        raise app.UsageError(str(e)) from e
    return own, layer, cases


def main(argv: list[str]) -> None:
    """Measures and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    values, start = flags.FLAGS, time.monotonic()
    own, layer, cases = _parse_flags()
    require_device()
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit", 2**32)  # CPUs do not say
    limit = 2**30 * (values.memory_gib or 0.9 * memory / 2**30)
    copies = copy_rates(limit)
    report: dict[str, Any] = {
        "benchmark": "kernels",
        "hardware": {"platform": device.platform, "device": device.device_kind},
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "config": {**layer, "backends": own, "peers": values.peers, "memory_gib": limit / 2**30},
        "tolerance": TOLERANCE[values.dtype],
        "copies": copies,
        "copy_bytes_per_s": max(copies.values()),
        "results": [],
        "left_out": [],
    }
    for name in ("hardware", "versions", "config", "copies"):
        print(f"{name:<10} " + ", ".join(f"{k}={v}" for k, v in report[name].items()))
    print("case            us, median       least     GB/s  / copy  TFLOP/s    error  cold s")
    for spec, case in cases.items():
        print(spec, flush=True)
        inputs = None  # the last case's go before new ones come
        try:
            if time.monotonic() - start > values.budget_s:
                raise Refused(f"--budget_s={values.budget_s:g} is spent")
            if case.bytes_needed > limit:
                raise Refused(f"{case.bytes_needed} bytes exceed memory_gib={limit / 2**30:.1f}")
            inputs = Inputs(case)
            expected = inputs.expected()
        except (Refused, jax.errors.JaxRuntimeError) as e:  # as it does not fit: the others do
            report["left_out"].append({"case": spec, "reason": (reason := _one_line(e))})
            print(f"  left out: {reason}", flush=True)
            continue
        entries: dict[str, Any] = {}
        for name in dict.fromkeys([*own, *values.peers]):
            print(f"{time.monotonic() - start:.0f} s: {spec}, {name}", file=sys.stderr)
            entries[name] = _measure(name, inputs, expected, max(copies.values()))
            print(_line(name, entries[name]), flush=True)
        result = {"case": spec, "kv_bytes": case.kv_bytes, "flops": case.flops}
        result |= {"layers": case.layers, "cached": case.layers * case.kv_bytes < UNCACHED_BYTES}
        result |= {"contenders": entries, "speedups": speedups(entries, own)}
        report["results"].append(result)
        _keep(report)
    _keep(report)
    print(json.dumps(report))
    sys.exit(0 if report["passed"] else 1)


def _keep(report: dict[str, Any]) -> None:
    """Sums the results up, and writes the report where it is asked for."""
    report["summary"] = summarise(report["results"])
    own = report["config"]["backends"]
    entries = [result["contenders"][name] for result in report["results"] for name in own]
    report["passed"] = {entry["status"] for entry in entries} == {"ok"}
    if flags.FLAGS.output_dir is not None:
        path = pathlib.Path(flags.FLAGS.output_dir) / "kernels.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    define_flags()
    run(main)
