# SPDX-License-Identifier: Apache-2.0
"""Requests to measure with, and what a run of them was like; runs them without a model, too.

Nothing here needs jax. What runs without a model is `jpaged.simulation.simulator`.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import tqdm

from jpaged.host.admission import SchedulerConfig
from jpaged.host.config import EngineConfig
from jpaged.host.stats import Counters, EngineStats
from jpaged.simulation.simulator import ContiguousSimulator, CostModel, Item, Memory, PagedSimulator

# The trace is shown with this many marks, and reported with this many numbers.
TRACE_POINTS = 60
# A run has ramped up once it has held this share of the pages that it ever holds.
_RAMPED_UP = 0.9
_BARS = "▁▂▃▄▅▆▇█"

Report = dict[str, Any]

SPEC_HELP = "a number, uniform:LOW,HIGH, lognormal:mean=M,sigma=S, sharegpt or alpaca"


class Lengths(Protocol):
    """A distribution of lengths in tokens."""

    @property
    def least(self) -> int:
        """The shortest length that can be drawn."""
        ...

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draws i64[count], each at least 1."""
        ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Every length from `low` to `high`, both included, is as likely."""

    low: int
    high: int

    def __post_init__(self):
        if not 1 <= self.low <= self.high:
            raise ValueError(f"lengths from {self.low} to {self.high}: need 1 <= LOW <= HIGH")

    @property
    def least(self) -> int:
        """The shortest length that can be drawn."""
        return self.low

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draws i64[count]."""
        return rng.integers(self.low, self.high, size=count, endpoint=True)


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """The logarithm of the length is normal; few lengths are far above the mean, most are below.

    Attributes:
      mean: of the lengths, not of their logarithms.
      sigma: standard deviation of the logarithms.
    """

    mean: float
    sigma: float
    least = 1

    def __post_init__(self):
        if not (1 <= self.mean < math.inf and 0 <= self.sigma < math.inf):
            raise ValueError(
                f"mean={self.mean:g}, sigma={self.sigma:g}: need mean >= 1, sigma >= 0"
            )

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draws i64[count], rounded, at least 1."""
        mu = math.log(self.mean) - self.sigma**2 / 2
        return np.maximum(np.rint(rng.lognormal(mu, self.sigma, count)), 1).astype(np.int64)


# The means are those of ShareGPT and Alpaca in Kwon et al. 2023 (figure 11); the paper gives no
# variance, so the sigmas are a choice made here: people paste all sorts of things into a chat.
SHAREGPT = {"prompt": LogNormal(161.31, 1.2), "output": LogNormal(337.99, 0.9)}
ALPACA = {"prompt": LogNormal(19.31, 0.5), "output": LogNormal(58.45, 0.9)}
_NAMED = {"sharegpt": SHAREGPT, "alpaca": ALPACA}


def parse_lengths(spec: str, role: str) -> Lengths:
    """Reads a distribution of lengths.

    Args:
      spec: "64", "uniform:32,96", "lognormal:mean=161,sigma=1.2", "sharegpt" or "alpaca".
      role: "prompt" or "output", which of the two lengths of ShareGPT or Alpaca.

    Returns:
      The distribution.

    Raises:
      ValueError: if the spec is none of these, or its numbers are out of range.
    """
    name, _, rest = spec.strip().partition(":")
    try:
        if name in _NAMED and not rest:
            return _NAMED[name][role]
        if name == "uniform":
            low, high = map(int, rest.split(","))
            return Uniform(low, high)
        if name == "lognormal":
            fields = dict(part.strip().split("=") for part in rest.split(","))
            return LogNormal(float(fields.pop("mean")), float(fields.pop("sigma")), **fields)
        return Uniform(int(spec), int(spec))
    except (KeyError, TypeError, ValueError) as e:
        reason = f" ({e})" if "need" in str(e) else ""
        raise ValueError(f"{role} lengths {spec!r}{reason}: give {SPEC_HELP}") from e


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests to run.

    Attributes:
      items: the requests, in order of arrival.
      num_cut: how many of them were drawn longer than max_model_len and cut to it.
    """

    items: list[Item]
    num_cut: int

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(item.prompt_token_ids) for item in self.items)

    @property
    def num_output_tokens(self) -> int:
        """Tokens to generate in all."""
        return sum(item.num_output_tokens for item in self.items)


def make_workload(
    num_requests: int,
    prompt_lengths: Lengths,
    output_lengths: Lengths,
    *,
    max_model_len: int,
    vocab_size: int,
    seed: int,
    num_samples: int = 1,
    rate: float = math.inf,
) -> Workload:
    """Draws requests; equal arguments give equal requests.

    Args:
      num_requests: how many.
      prompt_lengths: distribution of the prompts' lengths.
      output_lengths: distribution of the outputs' lengths.
      max_model_len: a prompt is cut to leave room for one token, then its output to what is left.
      vocab_size: token ids are below it.
      seed: of the lengths, the token ids and the arrivals.
      num_samples: of each request.
      rate: requests a second, which arrive independently (Poisson); infinite for all at once.

    Returns:
      The workload.

    Raises:
      ValueError: if not even the shortest lengths fit max_model_len.
    """
    shortest = prompt_lengths.least + output_lengths.least
    if shortest > max_model_len:
        raise ValueError(
            f"prompts and outputs have {shortest} tokens at least, more than max_model_len="
            f"{max_model_len}; shorten them or raise max_model_len"
        )
    # Streams of their own, so that one distribution does not change what another draws.
    prompt_rng, output_rng, token_rng, time_rng = np.random.default_rng(seed).spawn(4)
    drawn_prompts = prompt_lengths.draw(prompt_rng, num_requests)
    drawn_outputs = output_lengths.draw(output_rng, num_requests)
    prompts = np.minimum(drawn_prompts, max_model_len - 1)
    outputs = np.minimum(drawn_outputs, max_model_len - prompts)
    arrivals = time_rng.exponential(1 / rate, num_requests).cumsum()
    items = [
        Item(token_rng.integers(vocab_size, size=prompt).tolist(), output, num_samples, arrival_s)
        for prompt, output, arrival_s in zip(
            prompts.tolist(), outputs.tolist(), arrivals.tolist(), strict=True
        )
    ]
    num_cut = int(((prompts < drawn_prompts) | (outputs < drawn_outputs)).sum())
    return Workload(items, num_cut)


class Trace:
    """How full the pool was over a run, one entry a step, counters starting from zero."""

    def __init__(self):
        self._utilisation: list[float] = []
        self._used: list[float] = []
        self._running: list[int] = []
        self._before = Counters()

    def record(self, stats: EngineStats) -> None:
        """Adds the step that was scheduled since the last call, if one was."""
        totals, before = stats.totals, self._before
        if totals.num_steps > before.num_steps:
            self._utilisation.append(stats.utilisation)
            self._used.append(stats.num_used_pages / stats.num_usable_pages)
            self._running.append(totals.running_steps - before.running_steps)
        self._before = totals

    def least_utilisation(self) -> float:
        """The least utilisation from the step on that first held nearly as many pages as ever."""
        if not self._used:
            return 1.0
        enough = _RAMPED_UP * max(self._used)
        start = next(i for i, used in enumerate(self._used) if used >= enough)
        return min(self._utilisation[start:])

    @property
    def mean_used(self) -> float:
        """Share of the pool's pages in use, mean over the steps."""
        return float(np.mean(self._used)) if self._used else 0.0

    def utilisation_over_time(self) -> list[float]:
        """Utilisation in at most `TRACE_POINTS` equal parts of the run, each a mean."""
        return _resample(self._utilisation)

    def used_over_time(self) -> list[float]:
        """Share of the pool's pages in use, likewise."""
        return _resample(self._used)

    def running_over_time(self) -> list[float]:
        """Running sequences, likewise."""
        return _resample(self._running)


def run_scheduler(config: EngineConfig, workload: Workload) -> tuple[EngineStats, Trace]:
    """Runs a workload without a model.

    Args:
      config: with num_pages and max_model_len; what concerns the device is not looked at.
      workload: what to run.

    Returns:
      The totals, and the run step by step.

    Raises:
      ValueError: if a request could never run.
    """
    assert config.num_pages is not None and config.max_model_len is not None
    budgets = SchedulerConfig(
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        reservation=config.reservation,
    )
    host, trace = PagedSimulator(budgets, config.num_pages, config.page_size), Trace()
    for item in workload.items:
        host.add(item)
    while host.has_unfinished_requests:
        host.step()
        trace.record(host.stats())
    host.table.check_invariants()
    return host.stats(), trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """What serving requests as they arrive was like, means over time.

    The window that is measured opens when `simulate` says so, and closes as soon as all requests
    have arrived and none waits; if that is so when it opens, it closes when all have ended.

    Attributes:
      memory: share of the slots that are `live`, `reserved`, `internal`, `external` and `idle`; see
        `jpaged.simulation.simulator.Memory`.
      mean_running: sequences in a step.
      mean_step_s: seconds of a step.
      saturated: share of the time in which requests waited.
      saving: share of the pages that sharing saved, over all steps.
      requests_per_s: requests that ended.
      latency_s_per_token: from arrival to end by output tokens, mean over all that ended.
      preemptions, swapped_pages: in all.
      simulated_s: what the whole took.
    """

    memory: dict[str, float]
    mean_running: float
    mean_step_s: float
    saturated: float
    saving: float
    requests_per_s: float
    latency_s_per_token: float
    preemptions: int
    swapped_pages: int
    simulated_s: float

    @property
    def live_share(self) -> float:
        """Of the memory that is not idle, the share that holds a token."""
        return self.memory["live"] / max(1 - self.memory["idle"], 1e-9)


def simulate(
    simulator: PagedSimulator | ContiguousSimulator,
    items: Sequence[Item],
    costs: CostModel,
    *,
    warm_up: float = 0.2,
    drain: bool = False,
    progress: str | None = None,
) -> Serving:
    """Has a simulator serve requests in the time that a cost model gives its steps.

    Args:
      simulator: without requests.
      items: in order of arrival.
      costs: how long steps take.
      warm_up: the window opens when this share of the requests has ended.
      drain: whether to go on when the window has closed, until all have ended.
      progress: names a progress bar on standard error; None shows none.

    Returns:
      What it was like.

    Raises:
      ValueError: if a request could never run.
    """
    clock, next_item, num_ended, num_swapped, latencies = 0.0, 0, 0, 0, []
    opened, closed, to_the_end = False, False, False
    window: dict[str, float] = collections.defaultdict(float)
    with tqdm.tqdm(
        total=len(items), desc=progress, unit="request", disable=progress is None
    ) as bar:
        while num_ended < len(items) and (drain or not closed):
            if not simulator.has_unfinished_requests:
                clock = max(clock, items[next_item].arrival_s)
            while next_item < len(items) and items[next_item].arrival_s <= clock:
                simulator.add(items[next_item])
                next_item += 1
            work = simulator.step()
            for number in work.finished:
                item = items[number]
                latencies.append((clock - item.arrival_s) / item.num_output_tokens)
            num_ended += len(work.finished)
            bar.update(len(work.finished))
            num_swapped += work.num_swapped_pages
            took = costs.step_s(work, simulator.page_size)
            clock += took
            nobody_comes = next_item == len(items) and not simulator.num_waiting
            if not opened and num_ended >= warm_up * len(items):
                opened, to_the_end = True, nobody_comes
            closed = closed or (opened and nobody_comes and not to_the_end)
            if opened and not closed and work.num_seqs:
                window["steps"] += 1
                window["time"] += took
                window["waiting"] += took * (simulator.num_waiting > 0)
                window["running"] += took * work.num_seqs
                window["ended"] += len(work.finished)
                for name, slots in dataclasses.asdict(work.memory).items():
                    window[name] += took * slots / work.memory.total
    span = window["time"] or 1.0
    return Serving(
        memory={f.name: window[f.name] / span for f in dataclasses.fields(Memory)},
        mean_running=window["running"] / span,
        mean_step_s=span / max(window["steps"], 1),
        saturated=window["waiting"] / span,
        saving=simulator.stats().mean_saving if isinstance(simulator, PagedSimulator) else 0.0,
        requests_per_s=window["ended"] / span,
        latency_s_per_token=float(np.mean(latencies)) if latencies else math.nan,
        preemptions=simulator.num_preemptions,
        swapped_pages=num_swapped,
        simulated_s=clock,
    )


def cache_report(stats: EngineStats, trace: Trace, workload: Workload) -> Report:
    """What can be said of a run with or without a model; `scripts.benchmark` documents the fields.

    Args:
      stats: as the run left them.
      trace: of the run's steps.
      workload: what was run.

    Returns:
      A JSON object.
    """
    totals = stats.totals
    pages_per_seq = -(-stats.max_model_len // stats.page_size)
    return {
        "steps": totals.num_steps,
        "preemptions": totals.num_preemptions,
        "recomputed_tokens": totals.num_prefill_tokens - workload.num_prompt_tokens,
        "page_copies": totals.num_page_copies,
        "utilisation": {
            "mean": stats.mean_utilisation,
            "least_after_ramp_up": trace.least_utilisation(),
            "over_time": trace.utilisation_over_time(),
        },
        "pool_used": {
            "mean": trace.mean_used,
            "peak": totals.peak_used_pages / stats.num_usable_pages,
            "over_time": trace.used_over_time(),
        },
        "running": {
            "mean": stats.mean_running,
            "peak": totals.peak_running,
            "over_time": trace.running_over_time(),
        },
        "pool": {
            "pages": stats.num_usable_pages,
            "page_bytes": stats.page_bytes,
            "bytes": stats.num_usable_pages * stats.page_bytes,
        },
        "contiguous": {
            "pages": stats.contiguous_pages,
            "bytes": stats.contiguous_pages * stats.page_bytes,
            "fits": stats.num_usable_pages // pages_per_seq,
        },
    }


def compare_runs(runs: dict[str, Report]) -> dict[str, float] | None:
    """Paged divided by max, number by number; None where there is one run only."""
    if len(runs) < 2:
        return None
    paged, reserved = runs["paged"], runs["max"]
    ratios = {
        "mean_running": paged["running"]["mean"] / reserved["running"]["mean"],
        "peak_running": paged["running"]["peak"] / reserved["running"]["peak"],
        "steps": paged["steps"] / reserved["steps"],
    }
    if "output_tokens_per_s" in paged:
        speeds = paged["output_tokens_per_s"], reserved["output_tokens_per_s"]
        ratios["output_tokens_per_s"] = speeds[0] / speeds[1]
    return ratios


def sparkline(shares: Sequence[float]) -> str:
    """One mark for each number between 0 and 1."""
    return "".join(_BARS[min(int(share * len(_BARS)), len(_BARS) - 1)] for share in shares)


def _resample(values: Sequence[float]) -> list[float]:
    parts = np.array_split(np.asarray(values, np.float64), min(len(values), TRACE_POINTS) or 1)
    return [round(float(part.mean()), 4) for part in parts if part.size]
