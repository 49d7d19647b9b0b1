# SPDX-License-Identifier: Apache-2.0
"""A step's work as a value, in ids and numbers: what the scheduler plans and the device does."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence

from jpaged.host.logits_processors import Processing
from jpaged.host.params import LogprobsMode


class Row(typing.NamedTuple):
    """A sequence that computes tokens.

    Attributes:
      key: whose tokens they are, `(request_id, sample_index)`.
      table_id: its key in the `PageTable`.
      start: position of the first token that it computes; the pages hold those before.
      num_tokens: how many it computes, at least one.
      token_ids: which, where the host knows them; otherwise empty.
      source: the sample of the step before that is its only token; -1 where the host knows.
    """

    key: tuple[str, int]
    table_id: int
    start: int
    num_tokens: int
    token_ids: Sequence[int]
    source: int


class Draw(typing.NamedTuple):
    """How the tokens of a sequence are drawn; see `SamplingParams`.

    Attributes:
      temperature, top_k, top_p, min_p: as there.
      seed: of the request.
      sample_index: of the sequence, as each draws with other random bits.
      num_logprobs: likeliest tokens to report with each token.
      logprobs_mode: what their log-probabilities are of; "raw" where none are wanted.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    sample_index: int
    num_logprobs: int
    logprobs_mode: str = LogprobsMode.RAW.value


class Sample(typing.NamedTuple):
    """A token that is drawn.

    Attributes:
      row: whose tokens it continues.
      offset: after which of the tokens that the row computes.
      draw: how.
      processing: what is done to its logits before; None leaves them.
    """

    row: int
    offset: int
    draw: Draw
    processing: Processing | None


class Rows(typing.NamedTuple):
    """The rows of a step: the fields of `Row`, one entry a row.

    A step has hundreds of rows: as columns they are few objects, and arrays are made of them at
    once.
    """

    keys: tuple[tuple[str, int], ...] = ()
    table_ids: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    num_tokens: tuple[int, ...] = ()
    token_ids: tuple[Sequence[int], ...] = ()
    sources: tuple[int, ...] = ()

    def each(self) -> list[Row]:
        """One by one."""
        return [Row(*fields) for fields in zip(*self, strict=True)]


class Samples(typing.NamedTuple):
    """The samples of a step: the fields of `Sample`, one entry a sample."""

    rows: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    draws: tuple[Draw, ...] = ()
    processing: tuple[Processing | None, ...] = ()

    def each(self) -> list[Sample]:
        """One by one."""
        return [Sample(*fields) for fields in zip(*self, strict=True)]


class Scores(typing.NamedTuple):
    """Given tokens whose log-probabilities are wanted, one entry each; see `host.scored`.

    Attributes:
      rows: whose tokens they follow.
      offsets: after which of the tokens that the row computes.
      targets: which they are.
      num_likeliest: likeliest tokens to report with each.
    """

    rows: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    num_likeliest: tuple[int, ...] = ()


class Search(typing.NamedTuple):
    """Samples of which the best continuations of all together are wanted, not one of each.

    Attributes:
      first_sample: the others follow it.
      scores: what each has so far.
      width: as many samples as there may ever be.
      num_candidates: continuations wanted.
    """

    first_sample: int
    scores: tuple[float, ...]
    width: int
    num_candidates: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One step's work.

    Attributes:
      rows: what is computed.
      samples: what is drawn after it.
      searches: which samples are searched for continuations.
      swap_outs: `(page, host_page)` to copy to host memory before anything else.
      swap_ins: `(host_page, page)` to copy back after that.
      copies: `(src, dst)` pages to copy after that, before the step writes.
      num_prefill_tokens: of the tokens, those of rows that are not a plain decode.
      num_preemptions: sequences that lost their pages to it.
      num_lookup_tokens: tokens of sequences that were admitted.
      num_hit_tokens: of them, those that were found in the prefix cache.
      num_disk_tokens: of these, those that the prompt cache had on disk.
      num_recomputed_tokens: of the others, those that were computed before a preemption.
      scores: what is scored after the rows.
    """

    rows: Rows = dataclasses.field(default_factory=Rows)
    samples: Samples = dataclasses.field(default_factory=Samples)
    searches: tuple[Search, ...] = ()
    swap_outs: tuple[tuple[int, int], ...] = ()
    swap_ins: tuple[tuple[int, int], ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    num_prefill_tokens: int = 0
    num_preemptions: int = 0
    num_lookup_tokens: int = 0
    num_hit_tokens: int = 0
    num_disk_tokens: int = 0
    num_recomputed_tokens: int = 0
    scores: Scores = dataclasses.field(default_factory=Scores)

    @property
    def num_rows(self) -> int:
        """Sequences that compute tokens."""
        return len(self.rows.keys)

    @property
    def num_samples(self) -> int:
        """Tokens that are drawn."""
        return len(self.samples.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return sum(self.rows.num_tokens)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that rows attend to, those that they compute included, each row by itself."""
        return sum(self.rows.starts) + self.num_tokens
