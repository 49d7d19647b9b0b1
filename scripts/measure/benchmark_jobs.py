# SPDX-License-Identifier: Apache-2.0
"""Measures what a job costs beside its engine: time of its own, and memory as rows go by.

    python -m scripts.measure.benchmark_jobs --num_rows=100000

Short rows on the shipped checkpoint, first through the bare engine, then as `jpaged batch` runs
them: input checked and read, records made, written, synced and sorted. The overhead is the CPU time
of what the job does outside the engine, of the thread that drives it, over that of the whole
process: a machine that others use too does not change it, as it does rows a second.

The last line of standard output is one JSON object: `num_rows`, `overhead`, `check_s`, `sort_s`,
`own_us` (CPU microseconds a row outside the engine), `bare_rows_per_s` and `job_rows_per_s` (a
second of CPU), and for each tenth of the job `rows_per_s`, `rows_per_cpu_s` and `peak_mib`, the
most memory that the process has had by then.
"""

import json
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from absl import app, flags

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.host.outputs import RequestOutput
from jpaged.jobs import Result, Row, run
from jpaged.jobs.inputs import open_input
from jpaged.jobs.openai import RecordMaker, RowReader, encode_record
from jpaged.jobs.output import OutputFile
from jpaged.models import DEMO
from jpaged.scripts.flags import run as run_program

_NUM_ROWS = flags.DEFINE_integer("num_rows", 100_000, "Rows of the job.", 10)
_NUM_BARE = flags.DEFINE_integer("num_bare", 2_000, "Rows through the bare engine.", 1)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 8, "Tokens to generate for each.", 1)
_MAX_NUM_SEQS = flags.DEFINE_integer("max_num_seqs", 64, "Sequences that run at once.", 1)

_PROMPTS = ("Once upon a time", "The dog", "Lily and Tom were in the garden", "One day")


class _Clocked(Engine):
    """An engine that knows the CPU seconds of its caller's thread spent in it."""

    inside_s = 0.0

    def step(self) -> list[RequestOutput]:
        """Likewise."""
        return self._clock(super().step)

    def add_request(self, *args: Any, **options: Any) -> str:
        """Likewise."""
        return self._clock(lambda: super(_Clocked, self).add_request(*args, **options))

    def _clock(self, call: Callable[[], Any]) -> Any:
        begun = time.thread_time()
        try:
            return call()
        finally:
            self.inside_s += time.thread_time() - begun


class _Tenths(OutputFile):
    """An output that notes when each tenth of the rows was done, and what memory that took."""

    notes: list[tuple[float, float, float]]
    every: int

    def write(self, result: Result) -> None:
        """Likewise."""
        super().write(result)
        if self.num_done % self.every == 0:
            self.notes.append(_now())


def main(argv: list[str]) -> None:
    """Measures and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    num_seqs = _MAX_NUM_SEQS.value
    config = EngineConfig(
        max_num_seqs=num_seqs,
        deterministic=True,
        max_num_batched_tokens=max(4 * num_seqs, 64),
        num_pages=8 * num_seqs,
    )
    engine = _Clocked.load(DEMO, config)
    assert isinstance(engine, _Clocked)
    _serve(engine, 4 * num_seqs)  # compiles
    begun = time.process_time()
    _serve(engine, _NUM_BARE.value)
    bare_s = time.process_time() - begun
    with tempfile.TemporaryDirectory() as directory:
        report = _measure(engine, pathlib.Path(directory))
    report["bare_rows_per_s"] = _NUM_BARE.value / bare_s
    print(
        f"{report['num_rows']} rows: {report['own_us']:.0f} us a row outside the engine, "
        f"{report['overhead']:.1%} of all CPU time"
    )
    tenths = zip(report["rows_per_s"], report["rows_per_cpu_s"], report["peak_mib"], strict=True)
    for number, (rate, cpu_rate, peak) in enumerate(tenths, 1):
        print(f"  tenth {number:<2} {rate:8.1f} rows/s {cpu_rate:8.1f} a CPU s {peak:8.1f} MiB")
    print(json.dumps(report))


def _serve(engine: Engine, number: int) -> None:
    params = SamplingParams(max_tokens=_MAX_TOKENS.value, seed=1)
    rows = (
        Row(row_id=str(i), prompt=_PROMPTS[i % len(_PROMPTS)], params=params) for i in range(number)
    )
    waiting, window = True, 4 * engine.config.max_num_seqs
    num_live = 0
    while waiting or num_live:
        while waiting and num_live < window:
            if (row := next(rows, None)) is None:
                waiting = False
            else:
                engine.add_request(row.prompt, row.params)
                num_live += 1
        num_live -= len(engine.step())


def _measure(engine: _Clocked, directory: pathlib.Path) -> dict[str, Any]:
    number = _NUM_ROWS.value
    source = directory / "in.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for i in range(number):
            row = {"custom_id": f"r{i}", "prompt": _PROMPTS[i % len(_PROMPTS)]}
            file.write(json.dumps(row) + "\n")
    reader = RowReader(
        params=SamplingParams(max_tokens=_MAX_TOKENS.value), tokenizer=engine.tokenizer
    )
    maker = RecordMaker(engine.tokenizer, "demo")
    engine.inside_s = 0.0
    begun = time.process_time()
    begun_thread = time.thread_time()
    given = open_input([str(source)])
    ids = given.check()
    check_s = time.process_time() - begun

    def encode(result: Result) -> bytes:
        return encode_record(maker.record(result))

    with _Tenths(directory / "out.jsonl", ids, encode) as output:
        output.notes, output.every = [_now()], max(number // 10, 1)
        left = (line for line in given if output.lacks(line.row_id))
        run(map(reader.row, left), output, engine, progress=True, total=number)
        output.sync()
        begun_sort = time.process_time()
        output.sort()
        sort_s = time.process_time() - begun_sort
    own_s = time.thread_time() - begun_thread - engine.inside_s
    total_s = time.process_time() - begun
    pairs = list(zip(output.notes, output.notes[1:], strict=False))
    return {
        "num_rows": number,
        "overhead": own_s / (total_s - own_s),
        "check_s": check_s,
        "sort_s": sort_s,
        "own_us": 1e6 * own_s / number,
        "job_rows_per_s": number / total_s,
        "rows_per_s": [output.every / (after[0] - before[0]) for before, after in pairs],
        "rows_per_cpu_s": [output.every / (after[1] - before[1]) for before, after in pairs],
        "peak_mib": [after[2] for _, after in pairs],
    }


def _now() -> tuple[float, float, float]:
    """Seconds by the clock and of CPU, and the most MiB of memory until now."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    return time.monotonic(), time.process_time(), peak


if __name__ == "__main__":
    run_program(main)
