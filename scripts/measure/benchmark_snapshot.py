# SPDX-License-Identifier: Apache-2.0
"""What snapshots of a job cost, and what they save: tokens alone, and pages beside them.

    python -m scripts.measure.benchmark_snapshot
    python -m scripts.measure.benchmark_snapshot --random_weights=smollm2-135m --num_tokens=512

Rows of one length generate; then it is measured how long steps wait for a snapshot of their tokens,
with and without log-probabilities, how long its file takes, and how long it takes until the
rows go on from it in an engine without their pages. Beside it Orbax writes and reads as many bytes
as their pages are. What was just written is read from memory, not from the disk: pages look better
than after a restart.
"""

import json
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.jobs import Snapshot
from jpaged.models import DEMO
from jpaged.models.decoder import Decoder
from jpaged.models.shapes import SHAPES
from jpaged.scripts.flags import run as run_program

_SHAPE = flags.DEFINE_enum(
    "random_weights", None, sorted(SHAPES), "Random weights of this shape, not the demo model."
)
_NUM_ROWS = flags.DEFINE_integer("num_rows", 16, "Rows that run at once.", 1)
_NUM_TOKENS = flags.DEFINE_integer("num_tokens", 512, "Tokens that each has generated.", 2)
_BATCHED = flags.DEFINE_integer("max_num_batched_tokens", 512, "Tokens of a step at most.", 1)
_LOGPROBS = flags.DEFINE_integer("logprobs", None, "Likeliest tokens to keep of each.", 0)


def main(argv: list[str]) -> None:
    """Measures and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    number, length = _NUM_ROWS.value, _NUM_TOKENS.value
    config = EngineConfig(
        max_num_seqs=number, max_model_len=length + 80, prefix_cache=False,
        max_num_batched_tokens=_BATCHED.value, num_pages=number * (length // 16 + 6) + 1,
    )  # fmt: skip
    if _SHAPE.value is None:
        engine = Engine.load(DEMO, config)
    else:
        model = SHAPES[_SHAPE.value]
        engine = Engine(model, Decoder(model).init(jax.random.key(0)), config)
    engine.warm_up(num_logprobs=_LOGPROBS.value or 0)
    report: dict[str, Any] = {"num_rows": number, "num_tokens": length}
    begun = time.perf_counter()
    ids = _add(engine, [[]] * number)
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        with Snapshot(directory / "rows", {}, lambda row_id: True, every_s=0) as snapshot:
            _run(engine, ids[-1], length // 2)
            _take(engine, ids, snapshot)
            _run(engine, ids[-1], length)
            report["generate_s"] = time.perf_counter() - begun
            report["pause_s"], report["write_s"] = _take(engine, ids, snapshot)
        report["snapshot_bytes"] = (directory / "rows").stat().st_size
        stats = engine.stats()
        report["page_bytes"] = stats.num_used_pages * stats.page_bytes
        for request_id in ids:
            engine.abort(request_id)
        with Snapshot(directory / "rows", {}, lambda row_id: True) as snapshot:
            begun = time.perf_counter()
            ids = _add(engine, [snapshot.progress(str(row)) for row in range(number)])
            _run(engine, ids[-1], length + 1)
            report["resume_s"] = time.perf_counter() - begun
        pages = np.random.default_rng(0).bytes(report["page_bytes"])
        report |= _orbax(directory / "pages", np.frombuffer(pages, np.float32))
    print(json.dumps(report))


def _add(engine: Engine, resume: list[Any]) -> list[str]:
    params = SamplingParams(
        max_tokens=_NUM_TOKENS.value + 64, seed=1, ignore_eos=True, logprobs=_LOGPROBS.value
    )
    return [engine.add_request([1 + i, 2], params, resume=own) for i, own in enumerate(resume)]


def _run(engine: Engine, request_id: str, length: int) -> None:
    """Steps until the request that came last has so many tokens."""
    while not any(len(c.token_ids) >= length for c in engine.progress(request_id)):
        engine.step()


def _take(engine: Engine, ids: list[str], snapshot: Snapshot) -> tuple[float, float]:
    """Takes a snapshot. Returns: seconds that steps wait for it, and until it is on disk."""
    begun = time.perf_counter()
    snapshot.take((str(row), engine.progress(i)) for row, i in enumerate(ids))
    paused_s = time.perf_counter() - begun
    while not snapshot.is_due:
        time.sleep(1e-4)
    return paused_s, time.perf_counter() - begun


def _orbax(directory: pathlib.Path, pages: np.ndarray) -> dict[str, float]:
    """Seconds that Orbax takes to write pages, and to read them onto the device."""
    on_device = jax.block_until_ready(jax.device_put(pages))
    with ocp.StandardCheckpointer() as checkpointer:
        begun = time.perf_counter()
        checkpointer.save(directory, {"pages": on_device})
        checkpointer.wait_until_finished()
        written_s = time.perf_counter() - begun
        begun = time.perf_counter()
        jax.block_until_ready(checkpointer.restore(directory, {"pages": on_device}))
        return {"orbax_write_s": written_s, "orbax_read_s": time.perf_counter() - begun}


if __name__ == "__main__":
    run_program(main)
