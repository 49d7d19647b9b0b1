# SPDX-License-Identifier: Apache-2.0
"""Measures how fast a model is loaded, beside `safetensors.numpy.load_file`.

    python -m scripts.measure.benchmark_load
    python -m scripts.measure.benchmark_load --shape=llama-3.2-1b --dtypes=bfloat16,float32

A checkpoint of random bfloat16 is written to a temporary folder, and is in the page cache then.
`checkpoint.load` to each dtype and `load_file`, which converts nothing, take turns to load it, each
in a process of its own; the fastest of `--repeats` counts. A rate is bytes of what is in memory
afterwards over seconds, imports not counted; a peak is resident memory at most beyond what it was
after them, over those bytes.

The last line of standard output is one JSON object: `shape`, `stored_bytes`, `repeats`,
`scan_layers`, `versions`, `cpu_cores` and `runs`: by name (`load_file`, `jpaged to DTYPE`) `bytes`,
`seconds`, `cpu_seconds`, `bytes_per_s`, `ratio` (over the rate of `load_file`) and `peak`.
"""

import gc
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import tempfile
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tqdm
from absl import app, flags

from jpaged.measure import machine
from jpaged.models.config_json import config_to_hf
from jpaged.models.families import source_of
from jpaged.models.fitting import wanted_shapes
from jpaged.models.shapes import SHAPES
from jpaged.models.stored_tensor import WEIGHT_DTYPES
from jpaged.scripts.flags import check_names, require_device, run

_SHAPE = flags.DEFINE_enum("shape", "llama-3.2-1b", sorted(SHAPES), "The model's shape.")
_DTYPES = flags.DEFINE_list("dtypes", "bfloat16,float32", "What is loaded to.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Loads each; the fastest counts.", lower_bound=1)
_SCAN_LAYERS = flags.DEFINE_bool("scan_layers", False, "Whether layers are stacked.")

_THEIRS = "load_file"
_FILE_BYTES = 2**29
_RANDOM = 2**20  # numbers that are drawn; all that is written repeats them


def main(argv: list[str]) -> None:
    """Writes a checkpoint, measures, and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    check_names("dtypes", _DTYPES.value, WEIGHT_DTYPES)
    require_device()
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        stored_bytes = _write_model(directory)  # which leaves it in the page cache
        jobs = {_THEIRS: "", **{f"jpaged to {dtype}": dtype for dtype in _DTYPES.value}}
        runs: dict[str, dict[str, Any]] = {}
        order = [job for _ in range(_REPEATS.value) for job in jobs]
        for job in tqdm.tqdm(order, unit="load", disable=None):
            found = _in_new_process(directory, jobs[job], _SCAN_LAYERS.value)
            if job not in runs or found["seconds"] < runs[job]["seconds"]:
                runs[job] = found
    print("                        MB      s  CPU s    MB/s  ratio  peak")
    for job, found in runs.items():
        found["bytes_per_s"] = found["bytes"] / found["seconds"]
        found["ratio"] = found["bytes_per_s"] / runs[_THEIRS]["bytes_per_s"]
        print(
            f"{job:19} {found['bytes'] / 1e6:6.0f} {found['seconds']:6.2f} "
            f"{found['cpu_seconds']:6.2f} {found['bytes_per_s'] / 1e6:7.0f} "
            f"{found['ratio']:6.2f} {found['peak']:5.2f}"
        )
    report = {
        "shape": _SHAPE.value,
        "stored_bytes": stored_bytes,
        "repeats": _REPEATS.value,
        "scan_layers": _SCAN_LAYERS.value,
        "versions": machine.versions(),
        "cpu_cores": os.cpu_count(),
        "runs": runs,
    }
    print(json.dumps(report))


def _write_model(directory: pathlib.Path) -> int:
    """Writes config.json and safetensors of random numbers, and returns the bytes of these."""
    config = SHAPES[_SHAPE.value]
    shapes = wanted_shapes(config, {})
    num_bytes = 2 * sum(map(math.prod, shapes.values()))
    free = shutil.disk_usage(directory).free
    if free < num_bytes * 1.05:
        raise app.UsageError(
            f"{_SHAPE.value} takes {num_bytes:,} bytes and {directory} has {free:,} free; name a "
            "smaller --shape, or another folder in TMPDIR"
        )
    drawn = np.random.default_rng(0).normal(0, 0.02, _RANDOM).astype(jnp.bfloat16)
    tensors: dict[str, np.ndarray] = {}

    def write() -> None:
        number = len(list(directory.glob("*.safetensors")))
        safetensors.numpy.save_file(tensors, directory / f"model-{number:05}.safetensors")
        tensors.clear()

    for path, shape in tqdm.tqdm(shapes.items(), desc="writing", disable=None, leave=False):
        name = source_of(path, shape, config).names[0]
        tensors[name] = np.resize(drawn, math.prod(shape)).reshape(shape)
        if sum(tensor.nbytes for tensor in tensors.values()) >= _FILE_BYTES:
            write()
    write()
    (directory / "config.json").write_text(json.dumps(config_to_hf(config)))
    return num_bytes


def _in_new_process(directory: pathlib.Path, dtype: str, scan_layers: bool) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")  # fork would keep this process's jax
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_load, args=(directory, dtype, scan_layers, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        raise app.UsageError(
            f"a load ended with code {process.exitcode}, and what it wrote above; out of memory "
            "is code -9: name a smaller --shape"
        ) from None
    finally:
        process.join()


def _load(directory: pathlib.Path, dtype: str, scan_layers: bool, results: Any) -> None:
    """Loads with jpaged to a dtype, or without one with safetensors, and sends what it took."""
    import jax

    from jpaged.models import checkpoint

    jax.block_until_ready(jnp.zeros(8) + 1)
    gc.collect()
    before = _resident("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    if dtype:
        _, params = checkpoint.load(directory, np.dtype(dtype), scan_layers=scan_layers)
        leaves = jax.tree.leaves(jax.block_until_ready(params))
    else:
        files = sorted(directory.glob("*.safetensors"))
        kept = [safetensors.numpy.load_file(file) for file in files]
        leaves = [tensor for tensors in kept for tensor in tensors.values()]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    size = sum(leaf.nbytes for leaf in leaves)
    peak = (_resident("VmHWM") - before) / size
    results.send({"bytes": size, "seconds": wall, "cpu_seconds": cpu, "peak": peak})


def _resident(field: str) -> float:
    """Resident memory in bytes as Linux counts it, VmRSS now or VmHWM at most; NaN elsewhere."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    run(main)
