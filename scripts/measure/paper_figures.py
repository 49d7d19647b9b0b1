# SPDX-License-Identifier: Apache-2.0
"""Reproduces the paper's figures: runs the experiments of docs/paper_figures.md, and writes it.

    python -m scripts.measure.paper_figures --output=docs

Writes paper_figures.md to --output, made from docs/paper_figures/template.md, and beside it the
folder paper_figures with plots and figures (figures.json). Requests are served without a model
(`jpaged.simulation`), with the policies and the cost model of `jpaged simulate`; beams are searched
for by the real engine with the shipped checkpoint. Takes minutes; needs matplotlib.
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

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.scripts.demo.corpus import stories
from jpaged.scripts.flags import run
from jpaged.simulation.lengths import parse_lengths
from jpaged.simulation.paper import BUDGETS, COSTS, LOADS, PAPER, VOCAB_SIZE
from jpaged.simulation.serving import POLICIES, serve
from jpaged.simulation.workload import Workload, make_workload

_SOURCE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "paper_figures"
_LESS_VARIED = "lognormal:mean=337.99,sigma=0.75"
# Beam searches of the real engine: requests, sequences at once, tokens that the checkpoint takes.
_BEAM_REQUESTS = {"sharegpt": 12, "alpaca": 36}
_BEAM_SEQS, _BEAM_LEN = 72, 1024
_WASTES = ("reserved", "internal", "external")
_PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def define_flags() -> None:
    """Defines the flags; a function, so that a test can import the rest."""
    flags.DEFINE_string("output", None, "Directory to write to.", required=True)
    flags.DEFINE_integer("seed", 0, "Of lengths and arrivals.", lower_bound=0)


def main(argv: list[str]) -> None:
    """Makes the report."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    make_report(pathlib.Path(flags.FLAGS.output), flags.FLAGS.seed)


def make_report(directory: pathlib.Path, seed: int) -> None:
    """Runs all experiments and writes paper_figures.md, and a folder of that name, to `directory`.

    Args:
      directory: is made where it is missing.
      seed: of lengths and arrivals.

    Raises:
      app.UsageError: if matplotlib is missing, or the directory cannot be made.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise app.UsageError(
            "the plots need matplotlib: run `make figures`, or pip install -e '.[plots]'"
        )
    folder = directory / "paper_figures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise app.UsageError(f"--output={directory}: {e.strerror}") from e
    jobs, figures = _jobs(seed), {}
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


def _jobs(seed: int) -> dict[tuple[str, ...], Callable[[], Any]]:
    """Every run of the report, and where its result goes in figures.json."""
    jobs: dict[tuple[str, ...], Callable[[], Any]] = {}
    counts = {"sharegpt": 2000, "alpaca": 6000}
    beams = _Beams(seed)

    def served(name: str, policy: str, rate: float, count: int, **options: Any) -> dict[str, Any]:
        output, n = options.pop("output", name), options.pop("n", 1)
        work = _workload(name, output, rate, count, num_samples=n, seed=seed)
        return _rounded(serve(policy, work, **options).as_dict())

    def add(path: tuple[str, ...], function: Callable[..., Any], *args: Any, **options: Any):
        jobs[path] = functools.partial(function, *args, **options)

    for name, rate in LOADS.items():
        jobs["loads", name] = lambda name=name, rate=rate: _rounded(
            _workload(name, name, rate, counts[name], seed=seed).describe()
        )
        for policy in POLICIES:
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
    for policy in POLICIES:
        add(("less_varied", policy), served, "sharegpt", policy, 2.0, 2000, output=_LESS_VARIED)
        for rate in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25):
            add(("rates", policy, f"{rate:g}"), served, "sharegpt", policy, rate, 600)
    for size in _PAGE_SIZES:
        pages = -(-256 // size)
        jobs["copies", f"{size}"] = lambda size=size, pages=pages: {
            "swap_s": 2 * COSTS.copy_s(pages, size),
            "recompute_s": COSTS.device_s(256, 256),
        }
    for size in (1, 4, 16, 64, 256):
        for way in ("recompute", "swap", "auto"):
            options = {"page_size": size, "preemption": way, "num_slots": 4096, "drain": True}
            path = ("preemption", f"{size}", way)
            add(path, served, "sharegpt", "paged", 0.6, 400, **options)
    return jobs


def _workload(
    prompt: str,
    output: str,
    rate: float,
    count: int,
    *,
    num_samples: int = 1,
    max_len: int = BUDGETS.max_model_len,
    seed: int,
) -> Workload:
    return make_workload(
        count,
        parse_lengths(prompt, "prompt"),
        parse_lengths(output, "output"),
        max_model_len=max_len,
        vocab_size=VOCAB_SIZE,
        seed=seed,
        num_samples=num_samples,
        rate=rate,
    )


class _Beams:
    """The real engine with the shipped checkpoint, made when it is needed first."""

    def __init__(self, seed: int):
        self._seed = seed

    def search(self, name: str, width: int) -> dict[str, Any]:
        """Runs beam searches on prompts of the checkpoint's corpus, and says what sharing saved."""
        count, seed = _BEAM_REQUESTS[name], self._seed
        work = _workload(name, name, math.inf, count, max_len=_BEAM_LEN, seed=seed)
        engine, texts, prompts = self._engine, stories(seed), []
        assert engine.tokenizer is not None
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
        return {"saving": round(stats.mean_saving, 4), **counts, **_rounded(work.describe())}

    @functools.cached_property
    def _engine(self) -> Engine:
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
            ((f"`{name}`", f"{value:.4g}") for name, value in dataclasses.asdict(COSTS).items()),
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
                for name, rate in LOADS.items()
                for policy, own in figures["at_rate"][name].items()
            ),
        ),
        "page_size": _table(
            ("page size", *(f"{name}: {what}" for name in LOADS for what in ("live", "running"))),
            (
                (
                    f"{size}",
                    *(
                        cell
                        for name in LOADS
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
                row += f"**{own['saving']:.1%}**", f"{printed[n]:.1%}" if n in printed else ""
            rows.append(tuple(row))
        header = (f"{n}, paper" if paper else n for n in ("2", "4", "6") for paper in (False, True))
        tables[kind] = _table(("load", *header), rows)
    return tables


def _number(value: float) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [tuple(header), *map(tuple, rows)]
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    define_flags()
    run(main)
