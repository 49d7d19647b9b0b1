# SPDX-License-Identifier: Apache-2.0
"""Draws the plots of docs/paper_figures.md; `scripts.measure.paper_figures` calls it.

Not part of a package, as nothing else needs matplotlib. Equal figures give equal files.
"""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt

# Text stays text, so files are small; identifiers are drawn from a fixed salt.
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "jpaged",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
)

_COLOURS = {
    "contiguous-max": "#b5485d",
    "contiguous-pow2": "#d98c4a",
    "contiguous-oracle": "#7a8b5a",
    "paged": "#2b6ca3",
}
_PARTS = {
    "live": ("#2b6ca3", "token states"),
    "reserved": ("#9cc3e0", "reserved, used later"),
    "internal": ("#d98c4a", "internal fragmentation"),
    "external": ("#c9c9c9", "external fragmentation and kept free"),
}
_PAPER = {"color": "black", "marker": "D", "linestyle": "none", "markersize": 4}
_LOAD_COLOURS = {"sharegpt": "#2b6ca3", "alpaca": "#d98c4a"}


def draw(figures: dict[str, Any], paper: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes all plots.

    Args:
      figures: as figures.json has them.
      paper: the paper's numbers, `jpaged.simulation.paper.PAPER`.
      folder: where to.
    """
    for name, plot in (
        ("memory", _memory),
        ("running", _running),
        ("rates", _rates),
        ("sharing", _sharing),
        ("page_size", _page_size),
        ("preemption", _preemption),
    ):
        figure = plot(figures, paper)
        figure.tight_layout()
        metadata = {"Date": None, "Creator": None}
        figure.savefig(folder / f"{name}.svg", format="svg", metadata=metadata)
        plt.close(figure)


def _memory(figures: dict[str, Any], paper: dict[str, Any]):
    figure, axes = plt.subplots(figsize=(6.4, 3.0))
    runs = figures["at_rate"]["sharegpt"]
    left = [0.0] * len(runs)
    for part, (colour, label) in _PARTS.items():
        memories = [run["memory"] for run in runs.values()]
        shares = [100 * memory[part] / (1 - memory["idle"]) for memory in memories]
        axes.barh(list(runs), shares, left=left, color=colour, label=label, height=0.6)
        left = [before + share for before, share in zip(left, shares, strict=True)]
    printed = [100 * paper["live"][policy] for policy in runs]
    axes.plot(printed, list(runs), label="paper, token states", **_PAPER)
    axes.invert_yaxis()
    axes.set(xlabel="share of the memory in demand, %", xlim=(0, 100))
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, fontsize=8)
    return figure


def _running(figures: dict[str, Any], paper: dict[str, Any]):
    figure, both = plt.subplots(1, 2, figsize=(6.8, 2.9))
    for axes, (load, runs) in zip(both, figures["at_rate"].items(), strict=True):
        names = [policy.removeprefix("contiguous-") for policy in runs]
        axes.bar(names, [r["mean_running"] for r in runs.values()], color=list(_COLOURS.values()))
        axes.plot(names, [paper["running"][load][p] for p in runs], label="paper", **_PAPER)
        axes.set(title=load, ylabel="requests running at once, mean")
        axes.legend()
    return figure


def _rates(figures: dict[str, Any], paper: dict[str, Any]):
    figure, axes = plt.subplots(figsize=(6.0, 3.2))
    for policy, runs in figures["rates"].items():
        rates = [float(rate) for rate in runs]
        means = [run["mean_running"] for run in runs.values()]
        axes.plot(rates, means, color=_COLOURS[policy], marker=".", label=policy)
    at_two = paper["running"]["sharegpt"].values()
    axes.plot([2.0] * len(at_two), list(at_two), label="paper", **_PAPER)
    axes.set(
        xlabel="ShareGPT-like requests a second", ylabel="running at once, mean", ylim=(0, None)
    )
    axes.legend()
    return figure


def _sharing(figures: dict[str, Any], paper: dict[str, Any]):
    figure, both = plt.subplots(1, 2, figsize=(6.8, 3.0), sharey=True)
    titles = {"sampling": "parallel sampling", "beams": "beam search"}
    for axes, (kind, title) in zip(both, titles.items(), strict=True):
        for load, colour in _LOAD_COLOURS.items():
            runs, printed = figures[kind][load], paper[kind][load]
            savings = [100 * run["saving"] for run in runs.values()]
            axes.plot([int(n) for n in runs], savings, color=colour, marker="o", label=load)
            values = [100 * value for value in printed.values()]
            style = {**_PAPER, "color": colour, "fillstyle": "none", "markersize": 6}
            axes.plot([int(n) for n in printed], values, label=f"{load}, paper", **style)
        axes.set(title=title, xlabel="samples, or beams", xticks=(2, 4, 6), ylim=(0, 85))
    both[0].set_ylabel("pages saved, %")
    both[0].legend(fontsize=8)
    return figure


def _page_size(figures: dict[str, Any], paper: dict[str, Any]):
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 2.9))
    for load, runs in figures["page_size"].items():
        sizes = [int(size) for size in runs]
        runs = list(runs.values())
        colour = _LOAD_COLOURS[load]
        live = [100 * run["live_share"] for run in runs]
        most = max(run["mean_running"] for run in runs)
        running = [100 * run["mean_running"] / most for run in runs]
        left.plot(sizes, live, color=colour, marker=".", label=load)
        right.plot(sizes, running, color=colour, marker=".", label=load)
    for axes, label in ((left, "token states, % of the memory"), (right, "running, % of the most")):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="page size, tokens", ylabel=label, ylim=(0, 105), xticks=sizes)
        axes.set_xticks(sizes, [f"{size}" for size in sizes])
        axes.legend()
    return figure


def _preemption(figures: dict[str, Any], paper: dict[str, Any]):
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 2.9))
    sizes = [int(size) for size in figures["copies"]]
    for way, colour in (("swap", "#b5485d"), ("recompute", "#2b6ca3")):
        times = [1e3 * own[f"{way}_s"] for own in figures["copies"].values()]
        left.plot(sizes, times, color=colour, marker=".", label=way)
    left.set(title="256 tokens", ylabel="milliseconds", ylim=(0, None))
    served = figures["preemption"]
    for way, colour in (("swap", "#b5485d"), ("recompute", "#2b6ca3"), ("auto", "#7a8b5a")):
        latencies = [own[way]["latency_s_per_token"] for own in served.values()]
        right.plot([int(s) for s in served], latencies, color=colour, marker=".", label=way)
    right.set(title="served end to end", ylabel="seconds a token", ylim=(0, None))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("page size, tokens")
        axes.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
        axes.legend()
    return figure
