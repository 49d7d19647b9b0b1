# SPDX-License-Identifier: Apache-2.0
"""Measures attention kernels on the default device, ours beside others on the same numbers.

    python -m scripts.benchmark_kernels
    python -m scripts.benchmark_kernels --backends=gpu,gpu-triton --rows=1,64 --contexts=4096
    python -m scripts.benchmark_kernels --backends=xla --peers= --rows=1 --contexts=32 --steps=

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
import importlib
import json
import math
import os
import pathlib
import platform
import re
import statistics
import sys
import time
import timeit
from typing import Any
from unittest import mock

# Before jax looks at it; else it claims most memory, and PyTorch has the rest.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import pallas_kernels
from pallas_kernels import dispatch, reference
from scripts.flags import check_names, run

OWN = ("gpu", "gpu-mosaic", "gpu-triton", "tpu", "xla")
PEERS = ("xla", "jax_triton", "cudnn", "torch_sdpa", "torch_flex")
# Weights and results are rounded to the dtype, by 2**-9 of their size or by 2**-12, and some
# kernels round partial sums too; float32 may be multiplied with the 11 bits of tensor cores.
TOLERANCE = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 2e-3}
_UNCACHED_BYTES = 2**27  # more than any GPU's cache holds
_COPY_BYTES = (2**26, 2**28, 2**30)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One step: queries and tokens of each sequence, and what a layer looks like."""

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that a call reads, each once."""
        cell = 2 * self.num_kv_heads * self.head_dim * jnp.dtype(self.kv_dtype).itemsize
        return sum(self.kv_lens) * cell

    @property
    def flops(self) -> int:
        """Multiplications and additions of a call, of queries and the keys that they see."""
        lens = zip(self.q_lens, self.kv_lens, strict=True)
        pairs = sum(q * (kv - q) + q * (q + 1) // 2 for q, kv in lens)
        return 4 * pairs * self.num_q_heads * self.head_dim

    @property
    def layers(self) -> int:
        """Layers that calls take turns with; of a single one, a gather could be hoisted."""
        return max(2, min(4, -(-_UNCACHED_BYTES // self.kv_bytes)))

    @property
    def bytes_needed(self) -> int:
        """Memory: the pool, a contender's copy of it, and what making one layer of each takes."""
        whole_pages = tuple(-(-n // self.page_size) * self.page_size for n in self.kv_lens)
        layer_bytes = dataclasses.replace(self, kv_lens=whole_pages).kv_bytes
        queries = 16 * sum(self.q_lens) * self.num_q_heads * self.head_dim
        return 2 * (self.layers + 1) * layer_bytes + queries


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


class Refused(Exception):
    """A contender does not do this, or not here."""


class Inputs:
    """The numbers of a case: q, pool (of all layers), and the other arguments of a call in rest."""

    def __init__(self, case: Case):
        self.case = case
        pages = [-(-length // case.page_size) for length in case.kv_lens]
        ids = 1 + np.random.default_rng(0).permutation(sum(pages))  # 0 is reserved
        table = np.zeros((len(pages), max(pages)), np.int32)
        for row, (end, count) in enumerate(zip(np.cumsum(pages), pages, strict=True)):
            table[row, :count] = ids[end - count : end]
        q_key, key = jax.random.split(jax.random.key(0, impl="rbg"))
        shape = (sum(case.q_lens), case.num_q_heads, case.head_dim)
        self.q = jax.random.normal(q_key, shape, case.dtype)
        cells = (1 + sum(pages), case.num_kv_heads, case.page_size, 2 * case.head_dim)
        self.pool = _draw(jax.random.split(key, case.layers), cells, case.kv_dtype)
        self.table, self.kv_lens = jnp.asarray(table), jnp.array(case.kv_lens, jnp.int32)
        cu_q_lens = jnp.asarray(np.cumsum([0, *case.q_lens]), jnp.int32)
        self.rest = (self.table, self.kv_lens, cu_q_lens, jnp.array([len(pages)], jnp.int32))
        self.kv_scale = jnp.full(2, 2.0**-5) if case.kv_dtype == "int8" else None

    def dense(self) -> list[list[jax.Array]]:
        """Keys and values of each layer, [rows, context, num_kv_heads, head_dim] each."""
        if len({*zip(self.case.q_lens, self.case.kv_lens, strict=True)}) > 1:
            raise Refused("sequences differ, and it takes one dense array")
        shape = (len(self.case.q_lens), self.case.kv_lens[0])
        return [_densify(self.pool, i, self.table, shape) for i in range(self.case.layers)]

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Some tokens, and their results in layer 0, f32[tokens, num_q_heads, head_dim]."""
        ends = np.cumsum(self.case.q_lens)
        tokens = np.unique(np.linspace(0, ends[-1] - 1, 16).astype(int))
        attend, results = jax.jit(reference.paged_attention), []
        with jax.default_matmul_precision("highest"):
            # One by one, for less memory: a token ends the sequence that it sees.
            for token in tokens:
                row = np.searchsorted(ends, token, side="right")
                length = self.case.kv_lens[row] - ends[row] + token + 1
                q, lens = self.q[token][None].astype("float32"), jnp.array([length], jnp.int32)
                rest = (self.table[row][None], lens, jnp.arange(2), jnp.ones(1, jnp.int32))
                results.append(np.asarray(attend(q, self.pool, *rest, kv_scale=self.kv_scale)[0]))
        return tokens, np.stack(results)


@jax.jit(static_argnums=(1, 2))
def _draw(keys, shape, dtype):
    if dtype == "int8":
        return jax.lax.map(lambda key: jax.random.randint(key, shape, -100, 101, dtype), keys)
    return jax.lax.map(lambda key: jax.random.normal(key, shape, "bfloat16").astype(dtype), keys)


@jax.jit(static_argnums=3)
def _densify(pool, layer, table, shape):
    cells = pool[layer, table].swapaxes(2, 3)
    cells = cells.reshape(shape[0], -1, *cells.shape[-2:])[:, : shape[1]]
    return jnp.split(cells, 2, axis=-1)


# Of jax's contenders, each gives call(q, layer, operands) and the operands.


def _paged(name: str, inputs: Inputs):
    backend, _, lowering = name.partition("-")

    def call(q, layer, operands):
        *operands, kv_scale = operands
        spec = {"layer": layer, "kv_scale": kv_scale, "backend": backend}
        if not lowering:
            return pallas_kernels.paged_attention(q, *operands, **spec)
        forced = importlib.import_module(f"pallas_kernels.gpu.{lowering}")
        with mock.patch("pallas_kernels.gpu.attention.choose_lowering", lambda *_: forced):
            return pallas_kernels.paged_attention(q, *operands, **spec)

    return call, (inputs.pool, *inputs.rest, inputs.kv_scale)


def _jax_triton(inputs: Inputs):
    if max(inputs.case.q_lens) > 1:
        raise Refused("decode only")
    from jax.experimental.pallas.ops.gpu import paged_attention as module  # deprecated: only here

    # Its defaults, or the powers of two below that divide the pages.
    splits = math.gcd(inputs.table.shape[1], 16)
    block = math.gcd(inputs.table.shape[1] // splits, 8)
    spec = {"k_splits": splits, "pages_per_compute_block": block}

    def call(q, layer, operands):
        layers, table, kv_lens = operands
        q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)  # it does not scale scores
        return module.paged_attention(q, *layers[layer], table, kv_lens, **spec)

    split = jax.jit(lambda pool, layer: jnp.split(pool[layer].swapaxes(0, 1), 2, axis=-1))
    layers = [split(inputs.pool, layer) for layer in range(inputs.case.layers)]
    return call, (layers, inputs.table, inputs.kv_lens)


def _cudnn(inputs: Inputs):
    case = inputs.case
    layers, causal = inputs.dense(), case.q_lens[0] > 1
    if causal and case.q_lens != case.kv_lens:
        raise Refused("is_causal puts the first query beside the first key")

    def call(q, layer, layers):
        rows = q.reshape(len(case.q_lens), -1, *q.shape[1:])
        spec = {"is_causal": causal, "implementation": "cudnn"}
        return jax.nn.dot_product_attention(rows, *layers[layer], **spec).reshape(q.shape)

    return call, layers


def _jax_runner(name: str, inputs: Inputs):
    """Returns once(), which gives a call's result, and chain(trips), all layers' calls in a row."""
    peers = {"jax_triton": _jax_triton, "cudnn": _cudnn}
    call, operands = peers[name](inputs) if name in peers else _paged(name, inputs)
    layers = inputs.case.layers
    # So that the kernel is lowered once. Peers take each layer from arrays of its own.
    call = jax.jit(call, static_argnums=1 if name in peers else ())

    def chain(trips):
        @jax.jit
        def loop(q, operands):
            def trip(i, q):
                for layer in range(layers):
                    # XLA's own could be moved out of the loop in part, did it know the layer.
                    q = call(q, (i + layer) % layers if name == "xla" else layer, operands)
                return q

            # XLA is told how many trips there are; else the host would look after each of them.
            return jax.lax.fori_loop(0, trips, trip, q)

        return lambda: jax.block_until_ready(loop(inputs.q, operands))

    return lambda: jax.block_until_ready(call(inputs.q, 0, operands)), chain


def _torch_runner(name: str, inputs: Inputs):
    """Likewise for PyTorch, whose calls are put into a CUDA graph so that they follow at once."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import bias, flex_attention  # pyright: ignore[reportMissingImports]

    if not torch.cuda.is_available():
        raise Refused(f"PyTorch {torch.__version__} sees no CUDA device")
    queries, context = inputs.case.q_lens[0], inputs.case.kv_lens[0]

    def to_torch(array):
        return torch.from_dlpack(array).transpose(1, 2).contiguous()

    layers = [[to_torch(x) for x in layer] for layer in jax.block_until_ready(inputs.dense())]
    q = to_torch(inputs.q.reshape(layers[0][0].shape[0], -1, *inputs.q.shape[1:]))
    spec: dict[str, Any] = {"enable_gqa": True}
    if name == "torch_sdpa":
        attend = torch.nn.functional.scaled_dot_product_attention
        if queries > 1:
            spec["attn_mask"] = bias.causal_lower_right(queries, context)
    else:
        attend, seen = torch.compile(flex_attention.flex_attention), context - queries
        if queries > 1:
            rule = (lambda batch, head, query, key: query + seen >= key), None, None
            spec["block_mask"] = flex_attention.create_block_mask(*rule, queries, context)

    @torch.no_grad()
    def in_a_row(layers):
        out = q
        for k, v in layers:
            out = attend(out, k, v, **spec)
        return out

    def chain(trips):
        in_a_row(layers)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            in_a_row(layers)
        return lambda: ([graph.replay() for _ in range(trips)], torch.cuda.synchronize())

    def once():
        out = in_a_row(layers[:1]).transpose(1, 2).reshape(inputs.q.shape).contiguous()
        torch.cuda.synchronize()
        return jnp.from_dlpack(out)

    return once, chain


def _measure(name: str, inputs: Inputs, expected, copied: float) -> dict[str, Any]:
    """An entry: `status` ok, refused, wrong or failed, `reason` if it is not ok, else the times."""
    case, (tokens, right), entry = inputs.case, expected, {}
    try:
        if name not in OWN and jax.default_backend() != "gpu":
            raise Refused(f"runs on GPUs, not on {jax.default_backend()!r}")
        if name not in OWN and case.kv_dtype != case.dtype:
            raise Refused(f"takes no pages of {case.kv_dtype} for queries of {case.dtype}")
        runner = _torch_runner if name.startswith("torch") else _jax_runner
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


def _copies(limit: float) -> dict[str, float]:
    """Bytes a second, read and written, of copies of so many bytes."""
    copy, found = jax.jit(jnp.copy), {}
    large = [size for size in _COPY_BYTES if 16 * size <= limit and jax.default_backend() != "cpu"]
    for size in large or [2**24]:
        array = jnp.zeros(size // 4, jnp.int32)
        ten = lambda x=array: [copy(x) for _ in range(10)][-1].block_until_ready()  # noqa: E731
        found[str(size)] = 2 * 10 * size / min(timeit.repeat(ten, number=1, repeat=6))
    return found


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
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit", 2**32)  # CPUs do not say
    limit = 2**30 * (values.memory_gib or 0.9 * memory / 2**30)
    copies = _copies(limit)
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
        except Exception as e:
            report["left_out"].append({"case": spec, "reason": (reason := _one_line(e))})
            print(f"  left out: {reason}", flush=True)
            continue
        entries: dict[str, Any] = {}
        for name in dict.fromkeys([*own, *values.peers]):
            print(f"{time.monotonic() - start:.0f} s: {spec}, {name}", file=sys.stderr)
            entries[name] = _measure(name, inputs, expected, max(copies.values()))
            print(_line(name, entries[name]), flush=True)
        result = {"case": spec, "kv_bytes": case.kv_bytes, "flops": case.flops}
        result |= {"layers": case.layers, "cached": case.layers * case.kv_bytes < _UNCACHED_BYTES}
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
