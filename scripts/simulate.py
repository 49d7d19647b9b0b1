# SPDX-License-Identifier: Apache-2.0
"""Serves requests without a model, and reproduces the paper's figures.

    jpaged simulate --prompt_len=sharegpt --output_len=sharegpt --rate=2
    jpaged simulate --policies=paged --page_size=32 --n=4 --rate=inf
    jpaged simulate --report=docs

Policy `paged` is the real scheduler, pool and page table; `contiguous-max`, `contiguous-pow2` and
`contiguous-oracle` reserve a block of a buddy allocator for each request, like the baselines of the
paper, Kwon et al. 2023 (`jpaged.simulation`). A cost model of OPT-13B on an A100 says how long
steps take.

The last line of standard output is one JSON object: `workload` (`prompt_len`, `output_len`, `rate`,
`n`, `seed`, `num_requests`, `prompt_mean`, `output_mean`, `num_cut`), `num_slots`, `page_size`,
`costs` (the fields of `CostModel`) and `runs`: for each policy the fields of
`jpaged.simulation.workload.Serving`, and `live_share`.

--report=DIR runs the experiments of docs/paper_figures.md and writes that file to DIR, made from
docs/paper_figures/template.md, and to DIR/paper_figures its plots and figures (figures.json). Beams
are searched for by the real engine with the shipped checkpoint. Takes minutes; needs matplotlib.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import pathlib
import re
import runpy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tqdm
from absl import app, flags

from jpaged.host.admission import SchedulerConfig
from jpaged.host.preemption import PreemptionCosts
from jpaged.scripts.flags import check_names, run
from jpaged.simulation.simulator import (
    CONTIGUOUS_POLICIES,
    ContiguousSimulator,
    CostModel,
    PagedSimulator,
)
from jpaged.simulation.workload import (
    SPEC_HELP,
    Serving,
    Workload,
    make_workload,
    parse_lengths,
    simulate,
)

_POLICIES = (*CONTIGUOUS_POLICIES, "paged")
# The 12 GiB that the paper leaves for keys and values, in tokens of 800 KiB: its 15.7 thousand.
_NUM_SLOTS = 15_728

_POLICY = flags.DEFINE_list("policies", list(_POLICIES), f"Among {', '.join(_POLICIES)}.")
_PROMPT_LEN = flags.DEFINE_string("prompt_len", "sharegpt", f"Tokens of a prompt: {SPEC_HELP}.")
_OUTPUT_LEN = flags.DEFINE_string("output_len", "sharegpt", f"Tokens to generate: {SPEC_HELP}.")
_RATE = flags.DEFINE_float("rate", 2.0, "Requests a second; inf has all arrive at once.")
_NUM_REQUESTS = flags.DEFINE_integer("num_requests", 600, "Requests.", lower_bound=1)
_N = flags.DEFINE_integer("n", 1, "Samples of each; paged alone shares.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of lengths and arrivals.", lower_bound=0)
_SLOTS = flags.DEFINE_integer("num_slots", _NUM_SLOTS, "Tokens of memory.", lower_bound=1)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 16, "Tokens a page holds.", lower_bound=1)
_MAX_LEN = flags.DEFINE_integer("max_model_len", 2048, "Most of a request.", lower_bound=2)
_MAX_SEQS = flags.DEFINE_integer("max_num_seqs", 512, "Most at once.", lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer("max_num_batched_tokens", 2560, "Of a step.", lower_bound=1)
_PREEMPTION = flags.DEFINE_enum(
    "preemption", "recompute", ["recompute", "swap", "auto"], "What preempted sequences go through."
)
_REPORT = flags.DEFINE_string("report", None, "Directory to write the report to.")

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_SOURCE = _ROOT / "docs" / "paper_figures"
_COSTS = CostModel()
_BUDGETS = SchedulerConfig(
    max_num_batched_tokens=2560, max_num_seqs=512, max_model_len=2048, prefix_cache=False
)
_LOADS = {"sharegpt": 2.0, "alpaca": 30.0}
_LESS_VARIED = "lognormal:mean=337.99,sigma=0.75"
# Beam searches of the real engine: requests, sequences at once, tokens that the checkpoint takes.
_BEAM_REQUESTS = {"sharegpt": 12, "alpaca": 36}
_BEAM_SEQS, _BEAM_LEN = 72, 1024
_WASTES = ("reserved", "internal", "external")
_PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# What the paper has, under the names that our figures have in figures.json; percentages as shares.
PAPER: dict[str, Any] = {
    "live": dict(zip(_POLICIES, (0.204, 0.268, 0.382, 0.963), strict=True)),
    "running": {
        "sharegpt": dict(zip(_POLICIES, (7.00, 9.81, 13.62, 30.42), strict=True)),
        "alpaca": dict(zip(_POLICIES, (7.00, 43.24, 72.75, 132.44), strict=True)),
    },
    # Of ShareGPT the paper's text has the ends of the range alone.
    "sampling": {
        "alpaca": {"2": 0.0609, "4": 0.0853, "6": 0.0979},
        "sharegpt": {"2": 0.162, "6": 0.305},
    },
    "beams": {
        "alpaca": {"2": 0.3756, "4": 0.5313, "6": 0.5516},
        "sharegpt": {"2": 0.443, "6": 0.663},
    },
}


def main(argv: list[str]) -> None:
    """Simulates and prints, or makes the report."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    check_names("policies", _POLICY.value, _POLICIES)
    if not _RATE.value > 0:
        raise app.UsageError(f"rate={_RATE.value:g} must be above 0; inf has all arrive at once")
    if _REPORT.value is not None:
        make_report(pathlib.Path(_REPORT.value))
        return
    try:
        _simulate_and_print()
    except ValueError as e:
        raise app.UsageError(str(e)) from e


def _simulate_and_print() -> None:
    lengths = _PROMPT_LEN.value, _OUTPUT_LEN.value
    work = _workload(
        *lengths, _RATE.value, _NUM_REQUESTS.value, num_samples=_N.value, max_len=_MAX_LEN.value
    )
    config = dataclasses.replace(
        _BUDGETS,
        max_num_batched_tokens=_MAX_TOKENS.value,
        max_num_seqs=_MAX_SEQS.value,
        max_model_len=_MAX_LEN.value,
    )
    runs = {
        policy: serve(
            policy,
            work,
            config=config,
            num_slots=_SLOTS.value,
            page_size=_PAGE_SIZE.value,
            preemption=_PREEMPTION.value,
            drain=True,
            progress=policy,
        )
        for policy in _POLICY.value
    }
    paper_live, paper_running = {}, {}
    if (_LOADS.get(lengths[0]), *lengths) == (_RATE.value, lengths[0], lengths[0]):
        paper_running = PAPER["running"][lengths[0]]
        paper_live = PAPER["live"] if lengths[0] == "sharegpt" else {}
    header = ("", "running", "(paper)", "live", "(paper)", "saved", "waits", "step", "s/token")
    rows = [
        (
            policy,
            f"{own.mean_running:.2f}",
            _format(paper_running.get(policy), ".2f"),
            f"{own.live_share:.1%}",
            _format(paper_live.get(policy), ".1%"),
            f"{own.saving:.1%}",
            f"{own.saturated:.0%}",
            f"{own.mean_step_s * 1e3:.1f} ms",
            f"{own.latency_s_per_token:.3f}",
        )
        for policy, own in runs.items()
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print("live: share of the memory in demand that holds tokens; waits: of the time, requests did")
    report = {
        "workload": dict(zip(("prompt_len", "output_len"), lengths, strict=True))
        | {"rate": _RATE.value if math.isfinite(_RATE.value) else None, "n": _N.value}
        | {"seed": _SEED.value, **_describe(work)},
        "num_slots": _SLOTS.value,
        "page_size": _PAGE_SIZE.value,
        "costs": dataclasses.asdict(_COSTS),
        "runs": {
            policy: dataclasses.asdict(own) | {"live_share": own.live_share}
            for policy, own in runs.items()
        },
    }
    print(json.dumps(report))


def _workload(
    prompt: str, output: str, rate: float, count: int, *, num_samples: int = 1, max_len: int = 2048
) -> Workload:
    return make_workload(
        count,
        parse_lengths(prompt, "prompt"),
        parse_lengths(output, "output"),
        max_model_len=max_len,
        vocab_size=50_272,
        seed=_SEED.value,
        num_samples=num_samples,
        rate=rate,
    )


def _describe(work: Workload) -> dict[str, Any]:
    count = len(work.items)
    return {
        "num_requests": count,
        "prompt_mean": work.num_prompt_tokens / count,
        "output_mean": work.num_output_tokens / count,
        "num_cut": work.num_cut,
    }


def serve(
    policy: str,
    work: Workload,
    *,
    config: SchedulerConfig = _BUDGETS,
    num_slots: int = _NUM_SLOTS,
    page_size: int = 16,
    preemption: str = "recompute",
    drain: bool = False,
    progress: str | None = None,
) -> Serving:
    """Serves a workload under a policy.

    Args:
      policy: "paged", or one of `CONTIGUOUS_POLICIES`.
      work: the requests.
      config: budgets; the defaults are those of the flags.
      num_slots: tokens that the memory holds, of which `paged` makes as many pages as it can.
      page_size: of `paged`.
      preemption: of `paged`; host memory has room for twice the pool.
      drain: see `jpaged.simulation.workload.simulate`.
      progress: likewise.

    Raises:
      ValueError: if a request could never run.
    """
    num_pages, recompute_s = num_slots // page_size, _COSTS.flops_per_token / _COSTS.flops_per_s
    paged_config = dataclasses.replace(
        config,
        preemption=preemption,
        num_host_pages=2 * num_pages,
        costs=PreemptionCosts(2 * _COSTS.copy_s(1, page_size), recompute_s),
    )

    def make() -> PagedSimulator | ContiguousSimulator:
        if policy == "paged":
            return PagedSimulator(paged_config, num_pages + 1, page_size)
        return ContiguousSimulator(policy, config, num_slots)

    check = make()
    for item in work.items:
        check.add(item)  # refused now, not when it arrives
    return simulate(make(), work.items, _COSTS, drain=drain, progress=progress)


def make_report(directory: pathlib.Path) -> None:
    """Runs all experiments and writes paper_figures.md, and a folder of that name, to `directory`.

    Raises:
      app.UsageError: if matplotlib is missing, or the directory cannot be made.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise app.UsageError(
            "--report needs matplotlib: run `make figures`, or pip install -e '.[plots]'"
        )
    if not _SOURCE.is_dir():
        raise app.UsageError(f"--report is made in a checkout: there is no {_SOURCE}")
    folder = directory / "paper_figures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise app.UsageError(f"--report={directory}: {e.strerror}") from e
    jobs, figures = _jobs(), {}
    with tqdm.tqdm(jobs.items(), unit="run", desc="report") as bar:
        for path, job in bar:
            bar.set_postfix_str(" ".join(path))
            place = functools.reduce(lambda node, key: node.setdefault(key, {}), path[:-1], figures)
            place[path[-1]] = job()
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    runpy.run_path(str(_SOURCE / "plots.py"))["draw"](figures, PAPER, folder)
    template = (_SOURCE / "template.md").read_text(encoding="utf-8")
    (directory / "paper_figures.md").write_text(fill(template, figures), encoding="utf-8")
    print(f"wrote {directory / 'paper_figures.md'}, its plots and {folder / 'figures.json'}")


def _jobs() -> dict[tuple[str, ...], Callable[[], Any]]:
    """Every run of the report, and where its result goes in figures.json."""
    jobs: dict[tuple[str, ...], Callable[[], Any]] = {}
    counts = {"sharegpt": 2000, "alpaca": 6000}
    beams = _Beams()

    def served(name: str, policy: str, rate: float, count: int, **options: Any) -> dict[str, Any]:
        output, n = options.pop("output", name), options.pop("n", 1)
        work = _workload(name, output, rate, count, num_samples=n)
        ran = serve(policy, work, **options)
        fields = {**dataclasses.asdict(ran), "live_share": ran.live_share}
        return {key: _rounded(value) for key, value in fields.items()}

    def add(path: tuple[str, ...], function: Callable[..., Any], *args: Any, **options: Any):
        jobs[path] = functools.partial(function, *args, **options)

    for name, rate in _LOADS.items():
        jobs["loads", name] = lambda name=name, rate=rate: _rounded(
            _describe(_workload(name, name, rate, counts[name]))
        )
        for policy in _POLICIES:
            add(("at_rate", name, policy), served, name, policy, rate, counts[name])
            add(("full", name, policy), served, name, policy, math.inf, counts[name])
        for n in (2, 4, 6):
            add(("sampling", name, f"{n}"), served, name, "paged", math.inf, counts[name] // 6, n=n)
            add(("beams", name, f"{n}"), beams.search, name, n)
        for size in _PAGE_SIZES:
            path = ("page_size", name, f"{size}")
            add(path, served, name, "paged", math.inf, counts[name] // 3, page_size=size)
    for n in (2, 4, 6):
        path = ("sampling", "sharegpt, σ = 0.75", f"{n}")
        add(path, served, "sharegpt", "paged", math.inf, 333, n=n, output=_LESS_VARIED)
    for policy in _POLICIES:
        add(("less_varied", policy), served, "sharegpt", policy, 2.0, 2000, output=_LESS_VARIED)
        for rate in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25):
            add(("rates", policy, f"{rate:g}"), served, "sharegpt", policy, rate, 600)
    for size in _PAGE_SIZES:
        pages = -(-256 // size)
        jobs["copies", f"{size}"] = lambda size=size, pages=pages: {
            "swap_s": 2 * _COSTS.copy_s(pages, size),
            "recompute_s": _COSTS.device_s(256, 256),
        }
    for size in (1, 4, 16, 64, 256):
        for way in ("recompute", "swap", "auto"):
            options = {"page_size": size, "preemption": way, "num_slots": 4096, "drain": True}
            path = ("preemption", f"{size}", way)
            add(path, served, "sharegpt", "paged", 0.6, 400, **options)
    return jobs


class _Beams:
    """The real engine with the shipped checkpoint, made when it is needed first."""

    def search(self, name: str, width: int) -> dict[str, Any]:
        """Runs beam searches on prompts of the checkpoint's corpus, and says what sharing saved."""
        from jpaged.host.params import SamplingParams
        from jpaged.scripts.demo.demo_corpus import stories

        work = _workload(name, name, math.inf, _BEAM_REQUESTS[name], max_len=_BEAM_LEN)
        engine, texts, prompts = self._engine, stories(_SEED.value), []
        for item in work.items:
            tokens: list[int] = []
            while len(tokens) < len(item.prompt_token_ids):
                tokens += engine.tokenizer.encode(next(texts)).ids
            prompts.append(tokens[: len(item.prompt_token_ids)])
        params = [
            SamplingParams(max_tokens=item.num_output_tokens, beam_width=width, ignore_eos=True)
            for item in work.items
        ]
        engine.reset_stats()
        engine.generate(prompts, params)
        stats = engine.stats()
        counts = {"page_copies": stats.totals.num_page_copies, "steps": stats.totals.num_steps}
        return {"saving": round(stats.mean_saving, 4), **counts, **_rounded(_describe(work))}

    @functools.cached_property
    def _engine(self) -> Any:
        # Here, as nothing else needs jax.
        from jpaged import Engine, EngineConfig

        config = EngineConfig(
            page_size=16,
            num_pages=1 + _BEAM_SEQS * _BEAM_LEN // 16,
            max_num_seqs=_BEAM_SEQS,
            max_num_batched_tokens=512,
            prefix_cache=False,
        )
        return Engine.load("demo", config)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(own) for key, own in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def fill(template: str, figures: Mapping[str, Any]) -> str:
    """Puts tables into a template.

    Args:
      template: Markdown with `{{memory}}`, `{{running}}`, `{{sampling}}`, `{{beams}}`,
        `{{page_size}}`, `{{copies}}`, `{{preemption}}`, `{{loads}}` and `{{costs}}`.
      figures: as figures.json has them.

    Raises:
      KeyError: if it names another table.
    """
    tables = _tables(figures)
    note = (
        "<!-- Made by `make figures` from paper_figures/template.md: change that instead. -->\n\n"
    )
    return note + re.sub(r"\{\{(\w+)\}\}", lambda match: tables[match[1]], template)


def _tables(figures: Mapping[str, Any]) -> dict[str, str]:
    tables = {
        "loads": _table(
            ("load", "requests", "mean prompt", "mean output", "cut to 2,048 tokens"),
            ((name, *map(_number, own.values())) for name, own in figures["loads"].items()),
        ),
        "costs": _table(
            ("`CostModel`", "value"),
            ((f"`{name}`", f"{value:.4g}") for name, value in dataclasses.asdict(_COSTS).items()),
        ),
        "memory": _table(
            ("policy", "token states", "paper", *_WASTES, "σ = 0.75: token states", "running"),
            (
                (
                    policy,
                    f"**{own['live_share']:.1%}**",
                    f"{PAPER['live'][policy]:.1%}",
                    *(
                        f"{own['memory'][part] / (1 - own['memory']['idle']):.1%}"
                        for part in _WASTES
                    ),
                    f"{figures['less_varied'][policy]['live_share']:.1%}",
                    f"{figures['less_varied'][policy]['mean_running']:.2f}",
                )
                for policy, own in figures["at_rate"]["sharegpt"].items()
            ),
        ),
        "running": _table(
            ("load", "policy", "at the rate", "paper", "requests waited", "step", "always full"),
            (
                (
                    f"{name}, {rate:g}/s",
                    policy,
                    f"**{own['mean_running']:.2f}**",
                    f"{PAPER['running'][name][policy]:.2f}",
                    f"{own['saturated']:.0%} of the time",
                    f"{1e3 * own['mean_step_s']:.0f} ms",
                    f"{figures['full'][name][policy]['mean_running']:.2f}",
                )
                for name, rate in _LOADS.items()
                for policy, own in figures["at_rate"][name].items()
            ),
        ),
        "page_size": _table(
            ("page size", *(f"{name}: {what}" for name in _LOADS for what in ("live", "running"))),
            (
                (
                    f"{size}",
                    *(
                        cell
                        for name in _LOADS
                        for own in (figures["page_size"][name][f"{size}"],)
                        for cell in (f"{own['live_share']:.1%}", f"{own['mean_running']:.1f}")
                    ),
                )
                for size in _PAGE_SIZES
            ),
        ),
        "copies": _table(
            ("page size", "swap out and in", "recompute", "recompute / swap"),
            (
                (
                    size,
                    f"{1e3 * own['swap_s']:.1f} ms",
                    f"{1e3 * own['recompute_s']:.1f} ms",
                    f"{own['recompute_s'] / own['swap_s']:.0%}",
                )
                for size, own in figures["copies"].items()
            ),
        ),
        "preemption": _table(
            (
                "page size",
                *(f"{way}: s/token (preempted)" for way in ("recompute", "swap", "auto")),
            ),
            (
                (
                    size,
                    *(f"{r['latency_s_per_token']:.3f} ({r['preemptions']})" for r in own.values()),
                )
                for size, own in figures["preemption"].items()
            ),
        ),
    }
    for kind in ("sampling", "beams"):
        rows: list[tuple[str, ...]] = []
        for name, runs in figures[kind].items():
            printed, row = PAPER[kind].get(name, {}), [name]
            for n, own in runs.items():
                row += f"**{own['saving']:.1%}**", _format(printed.get(n), ".1%")
            rows.append(tuple(row))
        header = (f"{n}, paper" if paper else n for n in ("2", "4", "6") for paper in (False, True))
        tables[kind] = _table(("load", *header), rows)
    return tables


def _number(value: float) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def _format(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [tuple(header), *map(tuple, rows)]
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run(main)
