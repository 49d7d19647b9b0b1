# SPDX-License-Identifier: Apache-2.0
"""Measures throughput, latency and how well the page pool is used.

    jpaged benchmark --model=demo --num_requests=64
    jpaged benchmark --random_weights=smollm2-135m --prompt_len=64 --output_len=64
    jpaged benchmark --scheduler_only --prompt_len=sharegpt --output_len=sharegpt

All requests arrive at once; their prompts are random tokens, and each generates the number of
tokens that was drawn for it, whatever they are. A first request alone gives the cold start; then
the workload runs once to compile and once to be measured.

--compare_reservation measures paged allocation and contiguous preallocation of max_model_len tokens
a sequence (`--reservation=max`) on the same pool. --scheduler_only makes the same comparison with
the real scheduler, pool and page table but no model: steps and pages are exact, times are absent.

The report on standard output ends with a line that is one JSON object:

  * `benchmark`: "engine" or "scheduler_only".
  * `hardware`: `cpu`, `cpu_cores`, `memory_gib`, and of JAX's default device `platform`, `device`.
  * `versions`: `python`, `jax`, `jaxlib`.
  * `model`: `name`, `num_params`; null without a model.
  * `config`: every field of `EngineConfig`, `num_pages` and `max_model_len` as they came out.
  * `workload`: `num_requests`, `prompt_len`, `output_len`, `seed`, `prompt_tokens`,
    `output_tokens`, `num_cut` (requests drawn longer than max_model_len and cut to it).
  * `cold_start`: `model_load_s`, `first_token_s` (from the start of the process to the first token
    of the first request), `compilations`, `compile_s`, and of the compilation cache `cache_hits`
    and `cache_misses`, all up to that token; null without a model.
  * `runs`: one object for each reservation, `paged` or `max`; in it
      * times, absent without a model: `wall_s`, `output_tokens_per_s`, `total_tokens_per_s`,
        `prefill_tokens_per_s` (of steps with prefill), `decode_tokens_per_s` and
        `mean_decode_step_s` (of steps without), `time_to_first_token_s`, `latency_s` and
        `time_per_output_token_s` (each with `p50`, `p90`, `p99` over requests), `compilations` and
        `compile_s` in the measured run, `warmup` (`wall_s`, `compilations`, `compile_s`, or null);
        with --profile also `profile` (docs/performance.md explains it; null if no step was traced),
        which makes the run slower;
      * `steps`, `preemptions`, `recomputed_tokens`, `page_copies`;
      * `utilisation`, the share of the used pages' cells that hold a token: `mean`,
        `least_after_ramp_up` (once 90 % of the peak's pages are used), `over_time`;
      * `pool_used`, the share of the pool's pages in use: `mean`, `peak`, `over_time`;
      * `running`, sequences in a step: `mean`, `peak`, `over_time`;
      * `pool`: `pages`, `page_bytes`, `bytes`;
      * `contiguous`: `pages` and `bytes` that the peak's sequences would hold if each preallocated
        max_model_len, and `fits`, how many such sequences the pool holds.
  * `comparison`: paged divided by max, `mean_running`, `peak_running`, `steps` and (with a model)
    `output_tokens_per_s`; null for one run.
"""

import dataclasses
import json
import time
from collections.abc import Callable

import jax
from absl import app, flags

from jpaged.device.memory import default_dtype
from jpaged.engine import Engine
from jpaged.host.config import EngineConfig
from jpaged.host.params import SamplingParams
from jpaged.measure import machine
from jpaged.measure.machine import CompileClock
from jpaged.measure.runs import measure_reservations
from jpaged.models import checkpoint, hub
from jpaged.models.decoder import Decoder
from jpaged.models.shapes import SHAPES
from jpaged.scripts.flags import (
    define_engine_flags,
    enable_compilation_cache,
    engine_config_from_flags,
    model_path,
    require_device,
    run,
)
from jpaged.scripts.profile_flags import (
    define_profile_flags,
    profile_config_from_flags,
    show_profile,
)
from jpaged.simulation.lengths import SPEC_HELP, parse_lengths
from jpaged.simulation.report import Report, cache_report, compare_runs, sparkline
from jpaged.simulation.serving import run_scheduler
from jpaged.simulation.workload import Workload, make_workload
from jpaged.text import load_tokenizer

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Model directory, Hugging Face's or our own, or a model's name on the Hugging Face hub, "
    "org/name; demo is the shipped checkpoint.",
)
_RANDOM_WEIGHTS = flags.DEFINE_enum(
    "random_weights", None, sorted(SHAPES), "Random weights of this public model's shape."
)
_NUM_REQUESTS = flags.DEFINE_integer("num_requests", 32, "Requests.", lower_bound=1)
_PROMPT_LEN = flags.DEFINE_string("prompt_len", "64", f"Tokens of a prompt: {SPEC_HELP}.")
_OUTPUT_LEN = flags.DEFINE_string("output_len", "64", f"Tokens to generate: {SPEC_HELP}.")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of the weights, the workload and the samples.", lower_bound=0
)
_WARMUP = flags.DEFINE_bool("warmup", True, "Run the workload once before it is measured.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from the likeliest; 0: from all.", lower_bound=0)
_COMPARE = flags.DEFINE_bool(
    "compare_reservation", False, "Measure paged and max reservation on the same pool."
)
_SCHEDULER_ONLY = flags.DEFINE_bool(
    "scheduler_only", False, "Run the scheduler without a model, paged and max side by side."
)
define_engine_flags()
define_profile_flags()

_WEIGHTS_SEED = 0
_NO_MODEL_MAX_LEN = 2048
# Without a model to size it by, the pool holds this many sequences of max_model_len.
_NO_MODEL_SEQUENCES = 8
_NO_MODEL_VOCAB = 1024


def main(argv: list[str]) -> None:
    """Measures and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    config = engine_config_from_flags()
    try:
        report = _scheduler_only(config) if _SCHEDULER_ONLY.value else _engine(config)
    except (FileNotFoundError, ValueError) as e:
        raise app.UsageError(str(e)) from e
    _print_report(report)
    print(json.dumps(report))


def _scheduler_only(config: EngineConfig) -> Report:
    if _MODEL.value is not None or _RANDOM_WEIGHTS.value is not None:
        raise app.UsageError("--scheduler_only takes neither --model nor --random_weights")
    if flags.FLAGS.profile is not None:
        raise app.UsageError("--scheduler_only has no device, and takes no --profile")
    max_model_len = config.max_model_len or _NO_MODEL_MAX_LEN
    pages_per_seq = -(-max_model_len // config.page_size)
    config = dataclasses.replace(
        config,
        max_model_len=max_model_len,
        num_pages=config.num_pages or 1 + _NO_MODEL_SEQUENCES * pages_per_seq,
    )
    workload = _workload(max_model_len, _NO_MODEL_VOCAB)
    runs = {}
    for reservation in ("paged", "max"):
        stats, trace = run_scheduler(dataclasses.replace(config, reservation=reservation), workload)
        runs[reservation] = cache_report(stats, trace, workload)
    return _report("scheduler_only", config, workload, runs)


def _engine(config: EngineConfig) -> Report:
    if (_MODEL.value is None) == (_RANDOM_WEIGHTS.value is None):
        raise app.UsageError(
            "give exactly one of --model=DIR and --random_weights=SHAPE, or --scheduler_only"
        )
    for role, spec in (("prompt", _PROMPT_LEN.value), ("output", _OUTPUT_LEN.value)):
        parse_lengths(spec, role)  # before the model is loaded
    profile = profile_config_from_flags()
    if profile is not None and _COMPARE.value:
        raise app.UsageError("--profile is of one run: leave out --compare_reservation")
    enable_compilation_cache()
    require_device()
    clock = CompileClock()
    start = time.perf_counter()
    name, model_config, params, tokenizer = _load_model(config)
    load_s = time.perf_counter() - start
    measured = measure_reservations(
        lambda own: Engine(model_config, params, own, tokenizer),
        config,
        ("paged", "max") if _COMPARE.value else (config.reservation,),
        lambda max_model_len: _workload(max_model_len, model_config.vocab_size),
        SamplingParams(
            temperature=_TEMPERATURE.value,
            top_k=_TOP_K.value,
            seed=_SEED.value % 2**32,
            ignore_eos=True,
        ),
        clock,
        warmup=_WARMUP.value,
        profile=profile,
    )
    if profile is not None:
        show_profile(measured.runs[config.reservation]["profile"])
    return _report(
        "engine",
        measured.config,
        measured.workload,
        measured.runs,
        model={"name": name, "num_params": Decoder(model_config).num_params},
        cold_start={"model_load_s": load_s, **measured.cold_start},
    )


def _load_model(config: EngineConfig):
    """Returns the model's name, config, parameters (in memory) and tokenizer or None."""
    dtype = default_dtype(config)
    if (shape := _RANDOM_WEIGHTS.value) is not None:
        name, model_config, tokenizer = f"{shape}, random weights", SHAPES[shape], None
        params = Decoder(model_config).init(jax.random.key(_WEIGHTS_SEED), dtype)
    else:
        given = _MODEL.value or ""
        directory = model_path(given)
        model_config, params = checkpoint.load(directory, dtype)
        name = given if hub.is_name(given) else directory.name
        tokenizer = load_tokenizer(directory)
    return name, model_config, jax.block_until_ready(params), tokenizer


def _workload(max_model_len: int, vocab_size: int) -> Workload:
    return make_workload(
        _NUM_REQUESTS.value,
        parse_lengths(_PROMPT_LEN.value, "prompt"),
        parse_lengths(_OUTPUT_LEN.value, "output"),
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        seed=_SEED.value,
    )


def _report(
    benchmark: str,
    config: EngineConfig,
    workload: Workload,
    runs: dict[str, Report],
    *,
    model: Report | None = None,
    cold_start: Report | None = None,
) -> Report:
    return {
        "benchmark": benchmark,
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "model": model,
        "config": dataclasses.asdict(config),
        "workload": {
            "num_requests": len(workload.items),
            "prompt_len": _PROMPT_LEN.value,
            "output_len": _OUTPUT_LEN.value,
            "seed": _SEED.value,
            "prompt_tokens": workload.num_prompt_tokens,
            "output_tokens": workload.num_output_tokens,
            "num_cut": workload.num_cut,
        },
        "cold_start": cold_start,
        "runs": runs,
        "comparison": compare_runs(runs),
    }


def _print_report(report: Report) -> None:
    hardware, versions, work = report["hardware"], report["versions"], report["workload"]
    print(
        f"hardware   {hardware['cpu']}, {hardware['cpu_cores']} cores, "
        f"{hardware['memory_gib']} GiB; jax on {hardware['platform']} ({hardware['device']})"
    )
    print("versions   " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    if report["model"] is not None:
        model = report["model"]
        print(f"model      {model['name']}, {model['num_params'] / 1e6:.1f} M parameters")
    print("config     " + ", ".join(f"{k}={v}" for k, v in report["config"].items()))
    print(
        f"workload   {work['num_requests']} requests, {work['prompt_tokens']} prompt tokens "
        f"({work['prompt_len']}), {work['output_tokens']} output tokens ({work['output_len']}), "
        f"seed {work['seed']}, {work['num_cut']} cut"
    )
    if report["cold_start"] is not None:
        cold = report["cold_start"]
        print(
            f"cold start {cold['first_token_s']:.2f} s to the first token: model loaded in "
            f"{cold['model_load_s']:.2f} s, {cold['compilations']} programs compiled in "
            f"{cold['compile_s']:.2f} s (compilation cache: {cold['cache_hits']} hits, "
            f"{cold['cache_misses']} misses)"
        )
    runs = report["runs"]
    print("\n" + " " * 34 + "".join(f"{name:>22}" for name in runs))
    for label, show in _ROWS:
        cells = [_shown(show, own) for own in runs.values()]
        if any(cells):
            print(f"{label:<34}" + "".join(f"{cell:>22}" for cell in cells))
    for name, own in runs.items():
        print(f"\nover the run, {name}")
        print(f"  utilisation  {sparkline(own['utilisation']['over_time'])}")
        print(f"  pool used    {sparkline(own['pool_used']['over_time'])}")
    if report["comparison"] is not None:
        ratios = report["comparison"]
        print(
            "\npaged / max: "
            + ", ".join(f"{name.replace('_', ' ')} {ratio:.2f}" for name, ratio in ratios.items())
        )
    for name, own in runs.items():
        if _WARMUP.value and own.get("compilations"):
            print(f"\n{name}: {own['compilations']} programs compiled after warm-up, see the log")
    print()


def _shown(show: Callable[[Report], str], run_report: Report) -> str:
    try:
        return show(run_report)
    except (KeyError, TypeError):
        return ""  # not measured in this run


def _quantiles(values: dict[str, float], unit: float, digits: int) -> str:
    return " / ".join(f"{values[q] / unit:.{digits}f}" for q in ("p50", "p90", "p99"))


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


_ROWS: tuple[tuple[str, Callable[[Report], str]], ...] = (
    ("wall time", lambda r: f"{r['wall_s']:.2f} s"),
    ("output tokens/s", lambda r: f"{r['output_tokens_per_s']:.1f}"),
    ("total tokens/s", lambda r: f"{r['total_tokens_per_s']:.1f}"),
    ("prefill tokens/s", lambda r: f"{r['prefill_tokens_per_s']:.1f}"),
    ("decode tokens/s", lambda r: f"{r['decode_tokens_per_s']:.1f}"),
    ("mean decode step", lambda r: f"{r['mean_decode_step_s'] * 1e3:.2f} ms"),
    ("first token p50/p90/p99, s", lambda r: _quantiles(r["time_to_first_token_s"], 1, 2)),
    ("latency p50/p90/p99, s", lambda r: _quantiles(r["latency_s"], 1, 2)),
    (
        "each next token p50/p90/p99, ms",
        lambda r: _quantiles(r["time_per_output_token_s"], 1e-3, 1),
    ),
    ("warm-up run", lambda r: f"{r['warmup']['wall_s']:.2f} s"),
    (
        "compiled in warm-up",
        lambda r: f"{r['warmup']['compilations']} in {r['warmup']['compile_s']:.2f} s",
    ),
    ("compiled in measured run", lambda r: f"{r['compilations']} in {r['compile_s']:.2f} s"),
    ("steps", lambda r: f"{r['steps']}"),
    ("running, mean", lambda r: f"{r['running']['mean']:.2f}"),
    ("running, peak", lambda r: f"{r['running']['peak']}"),
    ("utilisation, mean", lambda r: f"{r['utilisation']['mean']:.2%}"),
    (
        "utilisation, least once full",
        lambda r: f"{r['utilisation']['least_after_ramp_up']:.2%}",
    ),
    ("pool used, mean / peak", lambda r: "{mean:.1%} / {peak:.1%}".format(**r["pool_used"])),
    ("preemptions", lambda r: f"{r['preemptions']}"),
    ("tokens recomputed", lambda r: f"{r['recomputed_tokens']}"),
    ("pages copied", lambda r: f"{r['page_copies']}"),
    ("pool, pages", lambda r: f"{r['pool']['pages']}"),
    ("pool, size", lambda r: _mib(r["pool"]["bytes"]) if r["pool"]["bytes"] else ""),
    ("contiguous: pages at peak", lambda r: f"{r['contiguous']['pages']}"),
    (
        "contiguous: size at peak",
        lambda r: _mib(r["contiguous"]["bytes"]) if r["contiguous"]["bytes"] else "",
    ),
    ("contiguous: sequences that fit", lambda r: f"{r['contiguous']['fits']}"),
)


if __name__ == "__main__":
    run(main)
