# SPDX-License-Identifier: Apache-2.0
"""From a planned step to padded arrays; every shape the device ever sees is chosen here."""

import dataclasses
import typing
from collections.abc import Sequence

import numpy as np

from jpaged.host.burst import Burst
from jpaged.host.config import EngineConfig, step_shapes
from jpaged.host.logits_processors import ProcessorRows, processor_rows
from jpaged.host.logprobs import ModeBatch, mode_batch
from jpaged.host.params import LogprobsMode
from jpaged.host.score_batch import ScoreBatch, score_batch, score_slots
from jpaged.host.step import Draw, Search, StepPlan

_MIN_PREFILL_TOKENS = 16
_RAW = LogprobsMode.RAW


class PageRows(typing.Protocol):
    """Where the pages of a step's rows are known."""

    def snapshot(self, table_ids: Sequence[int], num_rows: int, /) -> np.ndarray:
        """As `PageTable.snapshot`."""
        ...


@dataclasses.dataclass(frozen=True, order=True)
class StepShape:
    """What a compiled step is keyed by.

    Attributes:
      num_tokens: padded length of the token axis.
      num_rows: padded number of sequences, and of samples.
    """

    num_tokens: int
    num_rows: int

    @property
    def is_decode(self) -> bool:
        """Whether there is room for one token a row alone."""
        return self.num_tokens == self.num_rows

    def __str__(self) -> str:
        return f"{self.num_tokens}x{self.num_rows}"


@dataclasses.dataclass(frozen=True)
class ShapeBuckets:
    """The few shapes that steps are padded to.

    A decode step, one token a row, is padded to a power of two of rows. Any other step gets rows
    from a coarser ladder and a power of two of tokens above them. Where shapes are given, the
    smallest that holds a step comes first, for a decode step one of decode if there is any.

    Attributes:
      max_num_tokens: largest number of tokens a step computes.
      max_num_rows: largest number of sequences, or samples, in a step.
      single: whether there is one shape only, the largest.
      given: shapes that are wanted, sorted.
    """

    max_num_tokens: int
    max_num_rows: int
    single: bool = False
    given: tuple[StepShape, ...] = ()

    @property
    def max_beams(self) -> int:
        """Beams of a search at most: a step computes all of them."""
        return min(self.max_num_tokens, self.max_num_rows)

    @classmethod
    def of(cls, config: EngineConfig) -> "ShapeBuckets":
        """Those of an engine's settings."""
        tokens, rows = config.max_num_batched_tokens, config.max_num_seqs
        given = (StepShape(*shape) for shape in step_shapes(config.step_shapes or ""))
        return cls(tokens, rows, config.deterministic, tuple(sorted(given)))

    def shape(self, num_tokens: int, num_rows: int, num_samples: int) -> StepShape:
        """The shape that a step of these numbers is padded to."""
        rows = max(num_rows, num_samples)
        if self.single:
            return StepShape(self.max_num_tokens, self.max_num_rows)
        is_decode = num_tokens == rows
        holding = [s for s in self.given if s.num_tokens >= num_tokens and s.num_rows >= rows]
        if holding:
            return next((s for s in holding if is_decode and s.is_decode), holding[0])
        if is_decode:
            rows = min(_power_of_two(rows), self.max_num_rows)
            return StepShape(rows, rows)
        rows = next(r for r in self._row_ladder() if r >= rows)
        tokens = max(_power_of_two(num_tokens), _MIN_PREFILL_TOKENS, 2 * _power_of_two(rows))
        return StepShape(max(min(tokens, self.max_num_tokens), num_tokens), rows)

    def all_shapes(self) -> list[StepShape]:
        """Every shape that `shape` can return, smallest first; where shapes are given, those."""
        if self.single:
            return [StepShape(self.max_num_tokens, self.max_num_rows)]
        if self.given:
            return list(self.given)
        most = min(self.max_num_rows, self.max_num_tokens)
        decode_rows = {min(2**i, self.max_num_rows) for i in range((most - 1).bit_length() + 1)}
        shapes = {StepShape(rows, rows) for rows in decode_rows}
        sizes = {
            min(2**i, self.max_num_tokens) for i in range(self.max_num_tokens.bit_length() + 1)
        }
        for rows in self._row_ladder():
            shapes |= {self.shape(tokens, 1, rows) for tokens in sizes if tokens != rows}
        return sorted(shapes)

    def shapes_within(self, num_tokens: int, num_rows: int) -> list[StepShape]:
        """Of all shapes, those that steps of at most so many tokens and rows have."""
        if self.single or self.given:
            return self.all_shapes()
        most = self.shape(num_tokens, num_rows, 0)
        decode = self.shape(num_rows, num_rows, 0)
        return [
            shape
            for shape in self.all_shapes()
            if shape.num_rows <= (decode if shape.is_decode else most).num_rows
            and shape.num_tokens <= most.num_tokens
        ]

    def _row_ladder(self) -> list[int]:
        ladder = [4]
        while ladder[-1] < self.max_num_rows:
            ladder.append(4 * ladder[-1])
        return [min(rows, self.max_num_rows) for rows in ladder]


class SamplingRows(typing.NamedTuple):
    """Sampling parameters, one entry a sample; see `jpaged.host.params.SamplingParams`.

    Attributes:
      temperature: f32[num_samples]; 0 is greedy.
      top_k: i32[num_samples]; 0 keeps all.
      top_p: f32[num_samples]; 1 keeps all.
      min_p: f32[num_samples].
      seeds: u32[num_samples], the request's seed.
      sample_indices: u32[num_samples], which of the request's samples.
      positions: i32[num_samples], position of the token to be chosen.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seeds: np.ndarray
    sample_indices: np.ndarray
    positions: np.ndarray


@dataclasses.dataclass(frozen=True)
class BeamBatch:
    """The beams of one search in a step.

    Attributes:
      slots: i32[beam_width], which samples they are.
      scores: f32[beam_width], sums of their log-probabilities; -inf where there is no beam.
      num_candidates: continuations wanted.
      processed: whether their log-probabilities are changed by the processors of the batch.
    """

    slots: np.ndarray
    scores: np.ndarray
    num_candidates: int
    processed: bool = False


@dataclasses.dataclass(frozen=True)
class Batch:
    """A step as NumPy arrays, padded to `shape`.

    Attributes:
      shape: what it is padded to.
      token_ids, positions, logits_indices: as in `models.inputs.PagedInputs`; a token id is not
        read where `previous_slots` is set.
      page_table, kv_lens, cu_q_lens, num_seqs: as in `pallas_kernels.rows.Rows`.
      previous_slots: i32[num_tokens], which sample of the step before is this token, or -1.
      sampling: how tokens are drawn, one entry a row of the padded shape.
      num_samples: live samples.
      num_logprobs: likeliest tokens wanted with each sample or score; 0 for none.
      modes: samples whose log-probabilities are not the model's, and not among those of
        num_logprobs; None where there are none.
      scores: of given tokens whose log-probabilities are wanted; None where none are.
      beams: one for each beam search.
      processors: what changes the logits of samples before tokens are chosen; None where nothing
        does.
      burst: the steps that follow this one in the same dispatch; None where it is not dispatched
        so. The page table has the pages of all of them.
    """

    shape: StepShape
    token_ids: np.ndarray
    previous_slots: np.ndarray
    positions: np.ndarray
    page_table: np.ndarray
    kv_lens: np.ndarray
    cu_q_lens: np.ndarray
    num_seqs: np.ndarray
    logits_indices: np.ndarray
    sampling: SamplingRows
    num_samples: int
    num_logprobs: int
    beams: tuple[BeamBatch, ...]
    processors: ProcessorRows | None
    burst: Burst | None = None
    scores: ScoreBatch | None = None
    modes: ModeBatch | None = None


def build_batch(step: StepPlan, table: PageRows, buckets: ShapeBuckets) -> Batch:
    """Pads a planned step to the nearest shape.

    Args:
      step: with at least one row.
      table: the page table, as the scheduler left it, or a step of a log.
      buckets: the shapes to choose from.

    Returns:
      The batch; it shares no memory with `table`.
    """
    rows, samples = step.rows, step.samples
    num_rows, num_samples = step.num_rows, step.num_samples
    q_lens = np.array(rows.num_tokens, np.int32)
    num_tokens, slots = int(q_lens.sum()), score_slots(step)
    shape = buckets.shape(num_tokens, num_rows, max((num_samples, *(s + 1 for s in slots))))

    cu_q_lens = np.full(shape.num_rows + 1, num_tokens, np.int32)
    cu_q_lens[0] = 0
    np.cumsum(q_lens, out=cu_q_lens[1 : num_rows + 1])
    first = cu_q_lens[:num_rows]
    start = np.array(rows.starts, np.int32)
    kv_lens = np.zeros(shape.num_rows, np.int32)
    kv_lens[:num_rows] = start + q_lens

    token_ids = np.zeros(shape.num_tokens, np.int32)
    previous_slots = np.full(shape.num_tokens, -1, np.int32)
    positions = np.zeros(shape.num_tokens, np.int32)
    positions[:num_tokens] = np.arange(num_tokens, dtype=np.int32) + np.repeat(
        start - first, q_lens
    )
    # Of a row whose token is still on the device, that is the only one.
    previous_slots[first] = rows.sources
    for at, tokens in zip(first.tolist(), rows.token_ids, strict=True):
        if tokens:
            token_ids[at : at + len(tokens)] = tokens

    logits_indices = np.zeros(shape.num_rows, np.int32)
    if num_samples:
        logits_indices[:num_samples] = first[list(samples.rows)] + samples.offsets
    if slots:
        logits_indices[slots] = first[list(step.scores.rows)] + step.scores.offsets
    sources = [rows.sources[row] for row in samples.rows]
    processors = processor_rows(samples.processing, sources, shape.num_rows)
    return Batch(
        shape=shape,
        token_ids=token_ids,
        previous_slots=previous_slots,
        positions=positions,
        page_table=table.snapshot(rows.table_ids, shape.num_rows),
        kv_lens=kv_lens,
        cu_q_lens=cu_q_lens,
        num_seqs=np.array([num_rows], np.int32),
        logits_indices=logits_indices,
        sampling=_sampling_rows(
            samples.draws, positions[logits_indices[:num_samples]] + 1, shape.num_rows
        ),
        num_samples=num_samples,
        num_logprobs=max(
            max(
                (draw.num_logprobs for draw in samples.draws if draw.logprobs_mode == _RAW),
                default=0,
            ),
            max(step.scores.num_likeliest, default=0),
        ),
        beams=tuple(_beam_batch(search, processors) for search in step.searches),
        processors=processors,
        scores=score_batch(step, slots, shape.num_rows),
        modes=mode_batch(samples.draws, shape.num_rows),
    )


def _beam_batch(search: Search, processors: ProcessorRows | None) -> BeamBatch:
    count, first = len(search.scores), search.first_sample
    scores = np.full(search.width, -np.inf, np.float32)
    scores[:count] = search.scores
    slots = np.full(search.width, first, np.int32)
    slots[:count] += np.arange(count, dtype=np.int32)
    processed = processors is not None and bool(processors.active[first])
    return BeamBatch(slots, scores, search.num_candidates, processed)


def empty_batch(
    shape: StepShape, pages_per_seq: int, num_logprobs: int = 0, num_groups: int = 1
) -> Batch:
    """A batch without a live row, to compile a shape with: running it changes nothing."""
    groups = (num_groups,) if num_groups > 1 else ()
    tokens, rows = np.zeros(shape.num_tokens, np.int32), np.zeros(shape.num_rows, np.int32)
    return Batch(
        shape=shape,
        token_ids=tokens,
        previous_slots=tokens - 1,
        positions=tokens,
        page_table=np.zeros((*groups, shape.num_rows, pages_per_seq), np.int32),
        kv_lens=rows,
        cu_q_lens=np.zeros(shape.num_rows + 1, np.int32),
        num_seqs=np.zeros(1, np.int32),
        logits_indices=rows,
        sampling=_sampling_rows((), rows[:0], shape.num_rows),
        num_samples=0,
        num_logprobs=num_logprobs,
        beams=(),
        processors=None,
    )


def _sampling_rows(draws: Sequence[Draw], positions: np.ndarray, num_rows: int) -> SamplingRows:
    """Parameters of samples, padded with those of greedy sampling."""

    def column(values: Sequence[float] | np.ndarray, dtype: type) -> np.ndarray:
        padded = np.zeros(num_rows, dtype)
        padded[: len(values)] = values
        return padded

    columns = zip(*draws, strict=True) if draws else iter([()] * 8)
    temperature, top_k, top_p, min_p, seeds, indices, *_ = columns
    return SamplingRows(
        column(temperature, np.float32),
        column(top_k, np.int32),
        column(top_p, np.float32),
        column(min_p, np.float32),
        column(seeds, np.uint32),
        column(indices, np.uint32),
        column(positions, np.int32),
    )


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
