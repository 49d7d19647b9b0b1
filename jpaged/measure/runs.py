# SPDX-License-Identifier: Apache-2.0
"""Measures engines while they serve a workload; `scripts.benchmark` documents the reports."""

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence

import numpy as np

from jpaged.engine import Engine
from jpaged.host.config import EngineConfig
from jpaged.host.params import SamplingParams
from jpaged.measure.machine import CompileClock, seconds_since_process_start
from jpaged.measure.profile import Profile, ProfileConfig
from jpaged.simulation.report import Report, Trace, cache_report
from jpaged.simulation.workload import Item, Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What `measure_reservations` found.

    Attributes:
      config: with `num_pages` and `max_model_len` as the first engine chose them.
      workload: that was served.
      cold_start: up to the first token: `first_token_s` (from the start of the process),
        `compilations`, `compile_s`, `cache_hits` and `cache_misses`.
      runs: a report for each reservation.
    """

    config: EngineConfig
    workload: Workload
    cold_start: Report
    runs: dict[str, Report]


def measure_reservations(
    make_engine: Callable[[EngineConfig], Engine],
    config: EngineConfig,
    reservations: Sequence[str],
    workload_of: Callable[[int], Workload],
    params: SamplingParams,
    clock: CompileClock,
    *,
    warmup: bool = True,
    profile: ProfileConfig | None = None,
) -> Measured:
    """Measures engines that reserve their pages in different ways, on pools of the same size.

    Args:
      make_engine: one at a time is alive, as each has a pool.
      config: what all have in common.
      reservations: of `EngineConfig.reservation`; the first engine's first request is the cold
        start.
      workload_of: by max_model_len.
      params: of all requests; token limit and seed (this one's and the request's index) are set
        for each.
      clock: from before the model was made.
      warmup: whether the workload runs once before it is measured.
      profile: what of the first engine's measured run to trace; None traces nothing.

    Raises:
      RuntimeError: if a request failed, of which no figure says anything.
      ValueError: if the pool has no room for a sequence of max_model_len tokens that a reservation
        needs, or a request could never run.
    """

    def made(reservation: str) -> Engine:
        engine = make_engine(dataclasses.replace(config, reservation=reservation))
        if config.strict_shapes:
            engine.warm_up(params=[params])
        return engine

    engine = made(reservations[0])
    stats = engine.stats()
    config = dataclasses.replace(
        config, num_pages=stats.num_usable_pages + 1, max_model_len=stats.max_model_len
    )
    workload = workload_of(stats.max_model_len)
    pages_per_seq = stats.pages_per_seq
    if "max" in reservations and stats.num_usable_pages < pages_per_seq:
        raise ValueError(
            f"reservation 'max' takes {pages_per_seq} pages a sequence and the pool has "
            f"{stats.num_usable_pages}; raise num_pages or lower max_model_len"
        )
    cold_start = _cold_start(engine, workload.items[0], params, clock)
    first = measure(engine, workload, params, clock, warmup=warmup, profile=profile)
    runs = {reservations[0]: first}
    for reservation in reservations[1:]:
        del engine
        gc.collect()  # the pool goes before the next one comes
        engine = made(reservation)
        runs[reservation] = measure(engine, workload, params, clock, warmup=warmup)
    return Measured(config=config, workload=workload, cold_start=cold_start, runs=runs)


def measure(
    engine: Engine,
    workload: Workload,
    params: SamplingParams,
    clock: CompileClock,
    *,
    warmup: bool = True,
    profile: ProfileConfig | None = None,
) -> Report:
    """Serves a workload once to compile, if `warmup`, and once to be measured.

    The arguments are those of `measure_reservations`.

    Returns:
      A JSON object.
    """
    warmed = None
    if warmup:
        ran = _run(engine, workload, params, clock)
        warmed = {key: ran[key] for key in ("wall_s", "compilations", "compile_s")}
        # From here on the engine logs what it still compiles, with its shape.
        engine.warm_up([])
    return {**_run(engine, workload, params, clock, profile), "warmup": warmed}


def _cold_start(engine: Engine, item: Item, params: SamplingParams, clock: CompileClock) -> Report:
    """Serves one token of a first request."""
    engine.add_request(item.prompt_token_ids, dataclasses.replace(params, max_tokens=1, seed=0))
    while not engine.step():
        pass
    return {
        "first_token_s": seconds_since_process_start(),
        "compilations": engine.stats().num_compilations,
        "compile_s": clock.seconds,
        "cache_hits": clock.cache_hits,
        "cache_misses": clock.cache_misses,
    }


def _run(
    engine: Engine,
    workload: Workload,
    params: SamplingParams,
    clock: CompileClock,
    profile: ProfileConfig | None = None,
) -> Report:
    while engine.has_unfinished_requests:
        engine.step()
    engine.reset_stats()
    compilations, compile_s = engine.stats().num_compilations, clock.seconds
    trace, outputs = Trace(), []
    with Profile(engine, profile) as traced:
        start = time.perf_counter()
        for index, item in enumerate(workload.items):
            seed = ((params.seed or 0) + index) % 2**32
            own = dataclasses.replace(params, max_tokens=item.num_output_tokens, seed=seed)
            engine.add_request(item.prompt_token_ids, own)
        while engine.has_unfinished_requests:
            outputs += engine.step()
            traced.look()
            trace.record(engine.stats())
        wall_s = time.perf_counter() - start

    for output in outputs:
        for completion in output.outputs:
            if completion.error is not None:
                raise RuntimeError(f"request {output.request_id!r} failed: {completion.error}")
    stats = engine.stats()
    totals, num_output_tokens = stats.totals, stats.totals.num_generated_tokens
    first = [output.time_to_first_token_s for output in outputs]
    rest = [
        (output.latency_s - output.time_to_first_token_s) / (len(tokens) - 1)
        for output in outputs
        if len(tokens := output.outputs[0].token_ids) > 1
    ]
    return {
        "wall_s": wall_s,
        "output_tokens_per_s": num_output_tokens / wall_s,
        "total_tokens_per_s": (workload.num_prompt_tokens + num_output_tokens) / wall_s,
        "prefill_tokens_per_s": stats.prefill_tokens_per_s,
        "decode_tokens_per_s": stats.decode_tokens_per_s,
        "mean_decode_step_s": (
            totals.decode_s / totals.num_decode_steps if totals.num_decode_steps else None
        ),
        "time_to_first_token_s": _percentiles(first),
        "latency_s": _percentiles([output.latency_s for output in outputs]),
        "time_per_output_token_s": _percentiles(rest),
        "compilations": stats.num_compilations - compilations,
        "compile_s": clock.seconds - compile_s,
        **cache_report(stats, trace, workload),
        **({} if profile is None else {"profile": traced.found}),
    }


def _percentiles(values: list) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
