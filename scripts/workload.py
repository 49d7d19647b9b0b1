# SPDX-License-Identifier: Apache-2.0
"""Requests to measure with, and what a run of them was like; runs them without a model, too.

Nothing here needs jax.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from jpaged.admission import SchedulerConfig
from jpaged.config import EngineConfig
from jpaged.page_pool import PagePool
from jpaged.page_table import PageTable
from jpaged.params import SamplingParams
from jpaged.scheduler import Scheduler
from jpaged.sequence import Request, Status
from jpaged.stats import Counters, EngineStats
from jpaged.step import ScheduledStep

# The trace is shown with this many marks, and reported with this many numbers.
TRACE_POINTS = 60
# A run has ramped up once it has held this share of the pages that it ever holds.
_RAMPED_UP = 0.9
_BARS = "▁▂▃▄▅▆▇█"

Report = dict[str, Any]

SPEC_HELP = "a number, uniform:LOW,HIGH, lognormal:mean=M,sigma=S or sharegpt"


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


# The means are those of ShareGPT in Kwon et al. 2023 (figure 11); the paper gives no variance, so
# the two sigmas are a choice made here: prompts vary more than answers.
SHAREGPT = {"prompt": LogNormal(161.31, 1.2), "output": LogNormal(337.99, 0.9)}


def parse_lengths(spec: str, role: str) -> Lengths:
    """Reads a distribution of lengths.

    Args:
      spec: "64", "uniform:32,96", "lognormal:mean=161,sigma=1.2" or "sharegpt".
      role: "prompt" or "output", which of the two lengths of ShareGPT.

    Returns:
      The distribution.

    Raises:
      ValueError: if the spec is none of these, or its numbers are out of range.
    """
    name, _, rest = spec.strip().partition(":")
    try:
        if name == "sharegpt" and not rest:
            return SHAREGPT[role]
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
class Item:
    """One request of a workload.

    Attributes:
      prompt_token_ids: random tokens.
      num_output_tokens: how many to generate, whatever they are.
    """

    prompt_token_ids: list[int]
    num_output_tokens: int


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests that all arrive at once.

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
) -> Workload:
    """Draws requests; equal arguments give equal requests.

    Args:
      num_requests: how many.
      prompt_lengths: distribution of the prompts' lengths.
      output_lengths: distribution of the outputs' lengths.
      max_model_len: a prompt is cut to leave room for one token, then its output to what is left.
      vocab_size: token ids are below it.
      seed: of the lengths and of the token ids.

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
    prompt_rng, output_rng, token_rng = np.random.default_rng(seed).spawn(3)
    drawn_prompts = prompt_lengths.draw(prompt_rng, num_requests)
    drawn_outputs = output_lengths.draw(output_rng, num_requests)
    prompts = np.minimum(drawn_prompts, max_model_len - 1)
    outputs = np.minimum(drawn_outputs, max_model_len - prompts)
    items = [
        Item(token_rng.integers(vocab_size, size=prompt).tolist(), output)
        for prompt, output in zip(prompts.tolist(), outputs.tolist(), strict=True)
    ]
    num_cut = int(((prompts < drawn_prompts) | (outputs < drawn_outputs)).sum())
    return Workload(items, num_cut)


class SchedulerOnly:
    """The host's half of an engine: real scheduler, pool and page table, no model.

    Like `jpaged.engine.Engine`, it schedules a step before it ends the sequences of the one before.
    """

    def __init__(self, config: SchedulerConfig, num_pages: int, page_size: int):
        """Makes an empty pool of `num_pages` pages, the reserved one included."""
        self.table = PageTable(
            PagePool(num_pages), page_size, -(-config.max_model_len // page_size)
        )
        self.scheduler = Scheduler(config, self.table)
        self.totals = Counters()
        self._inflight: ScheduledStep | None = None
        self._num_added = 0

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do."""
        return self.scheduler.has_work or self._inflight is not None

    def add(self, item: Item) -> None:
        """Queues a request.

        Raises:
          ValueError: if it could never run.
        """
        request = Request(
            str(self._num_added),
            item.prompt_token_ids,
            SamplingParams(max_tokens=item.num_output_tokens, temperature=0.0, ignore_eos=True),
            seed=0,
            max_model_len=self.scheduler.config.max_model_len,
        )
        self.scheduler.add(request)
        self._num_added += 1

    def step(self) -> None:
        """Schedules a step, and gives every sample of the one before the token 0."""
        previous, self._inflight = self._inflight, None
        if self.scheduler.has_work:
            step = self.scheduler.schedule()
            assert step.seqs or previous, "the scheduler has work but schedules none of it"
            if step.seqs:
                self.totals.record_step(step, self.table)
                self._inflight = step
        if previous is not None:
            count = len(previous.samples)
            finish_step(self.scheduler, previous, [0] * count, [0.0] * count, self.totals)

    def stats(self) -> EngineStats:
        """A reading like the engine's; a page has no bytes."""
        return EngineStats.read(
            self.scheduler,
            self.totals,
            page_bytes=0,
            num_compilations=0,
            num_unplanned_compilations=0,
        )


def finish_step(
    scheduler: Scheduler,
    step: ScheduledStep,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    totals: Counters,
) -> None:
    """Appends a step's tokens and ends sequences, as `jpaged.engine.Engine` does.

    Args:
      scheduler: whose sequences they are.
      step: the step.
      tokens: one a sample.
      logprobs: one a sample.
      totals: is brought up to date.
    """
    now = time.perf_counter()
    for sample, token, logprob in zip(step.samples, tokens, logprobs, strict=True):
        if sample.status is Status.FINISHED:
            continue
        if sample.request.first_token_s is None:
            sample.request.first_token_s = now
        sample.receive(token, logprob)
        totals.num_generated_tokens += 1
        totals.num_decode_tokens += not step.num_prefill_tokens
        if reason := sample.stop_reason(()):
            scheduler.finish(sample, reason)


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
    host, trace = SchedulerOnly(budgets, config.num_pages, config.page_size), Trace()
    for item in workload.items:
        host.add(item)
    while host.has_unfinished_requests:
        host.step()
        trace.record(host.stats())
    host.table.check_invariants()
    return host.stats(), trace


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
