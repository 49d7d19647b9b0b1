# SPDX-License-Identifier: Apache-2.0
"""Measures the host's work for one decode step of many sequences, without jax.

    python -m scripts.measure.benchmark_host

The parts of a step: `schedule` plans it and assigns pages, `build_batch` makes its arrays, `update`
reads the sampled tokens, appends them and looks for stops. A device that takes longer for a step
than their sum never waits for the host. `fork` shares the pages of one sequence.

The last line of standard output is one JSON object: `num_seqs`, `num_tokens`, `page_size`, `steps`,
`python`, `cpu_cores`, and medians in microseconds, `schedule_us`, `build_batch_us`, `update_us`,
`total_us` (of the steps' sums), `total_p99_us`, `fork_us` and `fork_pages`.
"""

import json
import os
import platform
import sys
import time

import numpy as np
from absl import app, flags

from jpaged.host.admission import SchedulerConfig
from jpaged.host.batch import ShapeBuckets, build_batch
from jpaged.host.growth.base import Outcome
from jpaged.host.reader import StepReader
from jpaged.scripts.flags import run
from jpaged.simulation.lengths import Uniform
from jpaged.simulation.paged import PagedSimulator
from jpaged.simulation.workload import make_workload

_NUM_SEQS = flags.DEFINE_integer("num_seqs", 256, "Running sequences.", lower_bound=1)
_NUM_TOKENS = flags.DEFINE_integer(
    "num_tokens", 1024, "Tokens of each, on average over the measurement.", lower_bound=1
)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 16, "Tokens a page holds.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 200, "Steps to take the median of.", lower_bound=1)
_FORK_PAGES = flags.DEFINE_integer("fork_pages", 128, "Pages of the forked one.", lower_bound=1)

_WARMUP_STEPS = 20
_FORKS = 1000
_VOCAB_SIZE = 32000


def main(argv: list[str]) -> None:
    """Measures and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    growth = _STEPS.value // 2 + _WARMUP_STEPS + _PAGE_SIZE.value
    if _NUM_TOKENS.value <= growth:
        raise app.UsageError(
            f"num_tokens={_NUM_TOKENS.value} must exceed {growth}: sequences grow as they are "
            "measured; raise num_tokens, or lower steps or page_size"
        )
    parts = _time_steps()
    total = parts.sum(axis=1)
    schedule_us, build_batch_us, update_us = np.median(parts, axis=0).tolist()
    report = {
        "num_seqs": _NUM_SEQS.value,
        "num_tokens": _NUM_TOKENS.value,
        "page_size": _PAGE_SIZE.value,
        "steps": _STEPS.value,
        "python": platform.python_version(),
        "cpu_cores": os.cpu_count(),
        "schedule_us": schedule_us,
        "build_batch_us": build_batch_us,
        "update_us": update_us,
        "total_us": float(np.median(total)),
        "total_p99_us": float(np.percentile(total, 99)),
        "fork_us": float(np.median(_time_forks())),
        "fork_pages": _FORK_PAGES.value,
    }
    assert "jax" not in sys.modules, "this measures a process without jax"
    print(
        f"{report['num_seqs']} sequences of {report['num_tokens']} tokens, page_size "
        f"{report['page_size']}: medians of {report['steps']} decode steps"
    )
    for name in ("schedule", "build_batch", "update", "total"):
        print(f"  {name:<12} {report[f'{name}_us']:9.1f} us")
    print(f"  {'total, p99':<12} {report['total_p99_us']:9.1f} us")
    print(f"  {'fork':<12} {report['fork_us']:9.1f} us for {report['fork_pages']} pages")
    print(json.dumps(report))


def _time_steps() -> np.ndarray:
    """f64[steps, 3]: microseconds of schedule, build_batch and update."""
    num_seqs, steps = _NUM_SEQS.value, _STEPS.value
    # Lengths differ by less than a page, so that every step has some sequences that need a page.
    shortest = _NUM_TOKENS.value - steps // 2 - _WARMUP_STEPS - _PAGE_SIZE.value // 2
    longest = shortest + _PAGE_SIZE.value - 1
    num_new = steps + 2 * _WARMUP_STEPS
    max_model_len = longest + num_new
    host = PagedSimulator(
        SchedulerConfig(
            max_num_batched_tokens=num_seqs * longest,  # every prompt in the first step
            max_num_seqs=num_seqs,
            max_model_len=max_model_len,
        ),
        num_pages=2 + int(1.02 * num_seqs * -(-max_model_len // _PAGE_SIZE.value)),
        page_size=_PAGE_SIZE.value,
    )
    workload = make_workload(
        num_seqs,
        Uniform(shortest, longest),
        Uniform(num_new, num_new),
        max_model_len=max_model_len,
        vocab_size=_VOCAB_SIZE,
        seed=0,
    )
    for item in workload.items:
        host.add(item)
    buckets = ShapeBuckets(num_seqs * longest, num_seqs)
    # As the device returns them: read here, one step after they were asked for.
    tokens = np.arange(num_seqs, dtype=np.int32)
    logprobs = np.zeros(num_seqs, np.float32)

    times = np.zeros((_WARMUP_STEPS + steps, 3))
    previous = host.scheduler.schedule()
    for own in times:
        start = time.perf_counter()
        step = host.scheduler.schedule()
        scheduled = time.perf_counter()
        build_batch(step.plan, host.table, buckets)
        host.totals.record_step(step.plan, host.table)
        built = time.perf_counter()
        count = len(previous.samples)
        outcome = Outcome(tokens[:count].tolist(), logprobs[:count].tolist(), None, ())
        StepReader(host.scheduler, (), host.totals).take(previous, outcome)
        own[:] = np.diff([start, scheduled, built, time.perf_counter()])
        assert step.plan.num_rows == num_seqs, "some sequences waited or ended"
        previous = step
    return 1e6 * times[_WARMUP_STEPS:]


def _time_forks() -> list[float]:
    """Microseconds of each of many forks; freeing the fork is not counted."""
    num_tokens = _FORK_PAGES.value * _PAGE_SIZE.value
    config = SchedulerConfig(max_num_batched_tokens=1, max_num_seqs=1, max_model_len=num_tokens)
    table = PagedSimulator(config, _FORK_PAGES.value + 1, _PAGE_SIZE.value).table
    parent = table.add()
    table.append(parent, num_tokens)
    times = []
    for _ in range(_FORKS):
        start = time.perf_counter()
        child = table.fork(parent)
        times.append(1e6 * (time.perf_counter() - start))
        table.free(child)
    return times


if __name__ == "__main__":
    run(main)
