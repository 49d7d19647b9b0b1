# SPDX-License-Identifier: Apache-2.0
"""Serves workloads without a device: as requests arrive, or all at once."""

import collections
import dataclasses
import math
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import tqdm

from jpaged.host.admission import SchedulerConfig
from jpaged.host.config import EngineConfig
from jpaged.host.page_table import PageTable
from jpaged.host.preemption import PreemptionCosts
from jpaged.host.queues import Queues
from jpaged.host.sequence import Sequence
from jpaged.host.stats import EngineStats
from jpaged.simulation import paper
from jpaged.simulation.contiguous import CONTIGUOUS_POLICIES, ContiguousSimulator
from jpaged.simulation.costs import CostModel, Memory, StepWork
from jpaged.simulation.layers import ONE_KIND, LayerGroups
from jpaged.simulation.paged import PagedSimulator
from jpaged.simulation.report import Trace
from jpaged.simulation.workload import Item, Workload

POLICIES = (*CONTIGUOUS_POLICIES, "paged")
# For comparison: one page table for layers that differ in what they see; who loses pages is the
# last request in order; and nobody starts without the pages to spare that there are for others.
ONE_TABLE, LAST_VICTIM, SPARE_PAGES = "paged-one-table", "paged-last-victim", "paged-spare-pages"
PAGED_POLICIES = ("paged", ONE_TABLE, LAST_VICTIM, SPARE_PAGES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """What serving requests as they arrive was like, means over time.

    The window that is measured opens when `simulate` says so, and closes as soon as all requests
    have arrived and none waits; if that is so when it opens, it closes when all have ended.

    Attributes:
      memory: share of the slots that are `live`, `reserved`, `internal`, `external` and `idle`; see
        `jpaged.simulation.costs.Memory`.
      mean_running: sequences in a step.
      mean_step_s: seconds of a step.
      saturated: share of the time in which requests waited.
      saving: share of the pages that sharing saved, over all steps.
      hit_rate: share of the tokens of requests that the prefix cache had.
      recomputed_share: share of the computed tokens that preemptions had computed again.
      requests_per_s: requests that ended.
      latency_s_per_token: from arrival to end by output tokens, mean over all that ended.
      time_to_first_token_s: from arrival, `p50`, `p90` and `p99` over all that ended.
      time_per_output_token_s: of those after the first, likewise over all that had more than one.
      preemptions, swapped_pages: in all.
      simulated_s: what the whole took.
    """

    memory: dict[str, float]
    mean_running: float
    mean_step_s: float
    saturated: float
    saving: float
    hit_rate: float
    recomputed_share: float
    requests_per_s: float
    latency_s_per_token: float
    time_to_first_token_s: dict[str, float]
    time_per_output_token_s: dict[str, float]
    preemptions: int
    swapped_pages: int
    simulated_s: float

    @property
    def live_share(self) -> float:
        """Of the memory that is not idle, the share that holds a token."""
        return self.memory["live"] / max(1 - self.memory["idle"], 1e-9)

    @property
    def waste(self) -> float:
        """Of the memory that requests have, the share that they do not need and will not fill."""
        held = self.memory["live"] + self.memory["reserved"] + self.memory["internal"]
        return self.memory["internal"] / max(held, 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """The attributes, `live_share` and `waste`."""
        return dataclasses.asdict(self) | {"live_share": self.live_share, "waste": self.waste}


def simulate(
    simulator: PagedSimulator | ContiguousSimulator,
    items: SequenceOf[Item],
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
    clock, next_item, num_ended, num_swapped, times = 0.0, 0, 0, 0, _Times(items)
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
            if isinstance(simulator, PagedSimulator):
                simulator.clock_s = clock
            work = simulator.step()
            times.take(work, clock)
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
    stats = simulator.stats() if isinstance(simulator, PagedSimulator) else None
    return Serving(
        memory={f.name: window[f.name] / span for f in dataclasses.fields(Memory)},
        mean_running=window["running"] / span,
        mean_step_s=span / max(window["steps"], 1),
        saturated=window["waiting"] / span,
        saving=stats.mean_saving if stats else 0.0,
        hit_rate=stats.hit_rate if stats else 0.0,
        recomputed_share=stats.recomputed_share if stats else 0.0,
        requests_per_s=window["ended"] / span,
        latency_s_per_token=float(np.mean(times.latencies)) if times.latencies else math.nan,
        time_to_first_token_s=_percentiles(times.to_first_token),
        time_per_output_token_s=_percentiles(times.per_output_token),
        preemptions=simulator.num_preemptions,
        swapped_pages=num_swapped,
        simulated_s=clock,
    )


class _Times:
    """What requests waited, in seconds; see `Serving`."""

    def __init__(self, items: SequenceOf[Item]):
        """Nobody has waited yet."""
        self.latencies: list[float] = []
        self.to_first_token: list[float] = []
        self.per_output_token: list[float] = []
        self._items = items
        self._started: dict[int, float] = {}

    def take(self, work: StepWork, now: float) -> None:
        """Notes who has had the first or last token by now."""
        for number in work.started:
            self._started[number] = now
        for number in work.finished:
            item, first = self._items[number], self._started.pop(number)
            self.latencies.append((now - item.arrival_s) / item.num_output_tokens)
            self.to_first_token.append(first - item.arrival_s)
            if item.num_output_tokens > 1:
                self.per_output_token.append((now - first) / (item.num_output_tokens - 1))


def _percentiles(values: SequenceOf[float]) -> dict[str, float]:
    found = np.percentile(values, (50, 90, 99)).tolist() if values else [math.nan] * 3
    return dict(zip(("p50", "p90", "p99"), found, strict=True))


def serve(
    policy: str,
    work: Workload,
    *,
    config: SchedulerConfig = paper.BUDGETS,
    num_slots: int = paper.NUM_SLOTS,
    page_size: int = 16,
    preemption: str = "recompute",
    costs: CostModel = paper.COSTS,
    drain: bool = False,
    progress: str | None = None,
    record_steps: str | None = None,
    record: str | None = None,
    layers: LayerGroups = ONE_KIND,
) -> Serving:
    """Serves a workload under a policy.

    Args:
      policy: of `POLICIES` or `PAGED_POLICIES`.
      work: the requests.
      config: budgets; what it says of preemption is not looked at.
      num_slots: tokens that the memory holds, of which `paged` makes as many pages as it can.
      page_size: of `paged`.
      preemption: of `paged`; host memory has room for twice the pool.
      costs: how long steps and copies take.
      drain: see `simulate`.
      progress: likewise.
      record_steps: file for the steps of `paged`, as in `EngineConfig`.
      record: file for its pages over time, likewise.
      layers: of the model; contiguous policies keep all tokens for all of them.

    Raises:
      ValueError: if there is no such policy, a request could never run, or the file cannot be
        written.
    """
    layers = dataclasses.replace(layers, one_table=policy == ONE_TABLE)
    num_pages = layers.num_pages(num_slots, page_size)
    swap_s = 2 * costs.copy_s(1, page_size) * layers.page_layers / layers.total
    paged_config = dataclasses.replace(
        config,
        preemption=preemption,
        num_host_pages=2 * num_pages,
        costs=PreemptionCosts(swap_s, costs.flops_per_token / costs.flops_per_s),
    )

    def make(*files: str | None) -> PagedSimulator | ContiguousSimulator:
        if policy not in PAGED_POLICIES:
            return ContiguousSimulator(policy, config, num_slots)
        steps, pages = files or (None, None)
        made = PagedSimulator(paged_config, num_pages + 1, page_size, steps, layers, pages)
        if policy == LAST_VICTIM:
            made.scheduler.victims_of = _last_victims
        elif policy == SPARE_PAGES:
            made.scheduler.admission.has_room_to_the_end = lambda seq, needed, later: False
        return made

    check = make()
    for item in work.items:
        check.add(item)  # refused now, not when it arrives
    return simulate(make(record_steps, record), work.items, costs, drain=drain, progress=progress)


def _last_victims(queues: Queues, table: PageTable, index: int) -> list[Sequence]:
    """The last request in order, or the last sequence of one that is alone; see `victims_of`."""
    last = queues.last()
    return last[-1:] if last[0] is queues.running[0] else last


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
