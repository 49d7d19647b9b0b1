# SPDX-License-Identifier: Apache-2.0
"""Bursts: decode steps that follow each other on the device before the host has read any.

Each is an ordinary step, planned like any other, but for what only the host could say between them:
nothing starts, is preempted, released or given an address in the prefix cache. The pages of all are
taken before the first begins, so the page table as the last one leaves it serves them all.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf

import numpy as np

from jpaged.host.page_table import PageTable
from jpaged.host.params import LogprobsMode
from jpaged.host.sequence import Sequence, Status
from jpaged.host.step import Rows, Samples, StepPlan
from jpaged.host.step_builder import ScheduledStep

# Stop tokens of a row that the device knows; what it does not know, the host finds when it reads.
_MAX_STOPS = 8


class BurstRows(typing.NamedTuple):
    """What the device must know of the rows of a burst, beside those of its first step.

    Attributes:
      num_steps: i32[num_rows], steps that each takes; 0 is padding.
      slots: i32[num_rows], the row of each sample of the last step, which is what the next dispatch
        may ask for.
      stop_token_ids: i32[num_rows, stops], tokens after which nothing of a row is wanted; -1 is
        none.
    """

    num_steps: np.ndarray
    slots: np.ndarray
    stop_token_ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class Burst:
    """Steps of one dispatch.

    Attributes:
      rows: what the device must know.
      samples: of each step, the row of the first step that each of its samples is for.
    """

    rows: BurstRows
    samples: tuple[tuple[int, ...], ...]


def can_burst(step: ScheduledStep) -> bool:
    """Whether each row of a step computes one token, and draws the next with nothing but logits."""
    plan, count = step.plan, step.plan.num_rows
    return (
        not plan.num_prefill_tokens
        and not plan.searches
        and plan.num_tokens == count
        and plan.samples.rows == tuple(range(count))
        and not any(draw.num_logprobs for draw in plan.samples.draws)
        and all(draw.logprobs_mode == LogprobsMode.RAW for draw in plan.samples.draws)
        and all(seq.request.processors is None for seq in step.samples)
    )


def next_step(step: ScheduledStep, table: PageTable) -> ScheduledStep | None:
    """Plans the step that follows one that can burst, and assigns its pages.

    Args:
      step: planned just now; rows whose last token it samples are left out of the next.
      table: its pages.

    Returns:
      The step; None, with nothing changed, where pages lack, or where so many rows have ended that
      those that go on are better off in a smaller step.
    """
    plan, size = step.plan, table.page_size
    kept = [slot for slot, seq in enumerate(step.samples) if seq.status is Status.RUNNING]
    if 2 * len(kept) <= plan.num_rows:
        return None
    rows, samples = plan.rows, plan.samples
    starts = [rows.starts[slot] + 1 for slot in kept]
    table_ids = [rows.table_ids[slot] for slot in kept]
    begun = (own for own, start in zip(table_ids, starts, strict=True) if start % size == 0)
    if sum(table.pages_needed(own, 1) for own in begun) > table.pool.num_free_pages:
        return None
    seqs = tuple(step.samples[slot] for slot in kept)
    for slot, (seq, table_id) in enumerate(zip(seqs, table_ids, strict=True)):
        copies = table.append(table_id, 1)
        assert not copies, "what the step before has written is shared"
        seq.num_computed_tokens += 1
        seq.num_inflight_tokens += 1
        seq.sample_slot = slot
    count = len(kept)
    after = StepPlan(
        rows=Rows(
            tuple(rows.keys[slot] for slot in kept),
            tuple(table_ids),
            tuple(starts),
            (1,) * count,
            ((),) * count,
            tuple(kept),
        ),
        samples=Samples(
            tuple(range(count)),
            (0,) * count,
            tuple(samples.draws[slot] for slot in kept),
            (None,) * count,
        ),
    )
    return ScheduledStep(after, seqs)


def burst_of(
    steps: SequenceOf[ScheduledStep], eos_token_ids: Collection[int], num_rows: int
) -> Burst:
    """What a burst is beside its first step.

    Args:
      steps: the first can burst, each other one is the `next_step` of the one before.
      eos_token_ids: the model's own.
      num_rows: what the first step is padded to.
    """
    num_steps, slots = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32)
    own = tuple(range(steps[0].plan.num_rows))
    samples = [own]
    for step in steps[1:]:
        own = tuple(own[source] for source in step.plan.rows.sources)
        samples.append(own)
    for rows in samples:
        num_steps[list(rows)] += 1
    slots[: len(own)] = own
    stops = _stops_of(steps[0].samples, eos_token_ids, num_rows)
    return Burst(BurstRows(num_steps, slots, stops), tuple(samples))


def idle_burst(num_rows: int) -> Burst:
    """A burst without a step, to compile with."""
    return burst_of([ScheduledStep(StepPlan())], (), num_rows)


def _stops_of(
    seqs: SequenceOf[Sequence], eos_token_ids: Collection[int], num_rows: int
) -> np.ndarray:
    """`BurstRows.stop_token_ids`: as many as there is room for of what `stop_reason` looks for."""
    stops = np.full((num_rows, _MAX_STOPS), -1, np.int32)
    for row, seq in enumerate(seqs):
        params = seq.request.params
        own = () if params.ignore_eos else tuple(eos_token_ids)
        if own or params.stop_token_ids:
            own = (*own, *params.stop_token_ids)[:_MAX_STOPS]
            stops[row, : len(own)] = own
    return stops
