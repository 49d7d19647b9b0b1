# SPDX-License-Identifier: Apache-2.0
"""A step while it is planned, and then with who waits for its results."""

import dataclasses
from collections.abc import Sequence as SequenceOf

from jpaged.host.growth.base import Chooser
from jpaged.host.logits_processors import Processing
from jpaged.host.prompt_cache import PageLoad
from jpaged.host.sequence import Request, Sequence
from jpaged.host.step import Draw, Rows, Samples, Scores, Search, StepPlan


@dataclasses.dataclass(frozen=True)
class ScheduledStep:
    """A planned step, and to whom its results go.

    Attributes:
      plan: what is computed.
      samples: the sequences that its samples are for.
      searchers: the requests that its searches are for.
      scored: per scored token, the request that wants it, and the position that predicts it.
      loads: pages that were read from disk, to be put into the pool with those swapped in.
    """

    plan: StepPlan
    samples: tuple[Sequence, ...] = ()
    searchers: tuple[Request, ...] = ()
    scored: tuple[tuple[Request, int], ...] = ()
    loads: tuple[PageLoad, ...] = ()


class StepBuilder:
    """Collects a step's work.

    Attributes:
      addressed: pages that were given an address in the prefix cache.
      num_extra_places: places of samples that scored tokens take beside those of sequences.
      loads: as in `ScheduledStep`.
      swap_outs, swap_ins, copies, num_preemptions, num_lookup_tokens, num_hit_tokens,
        num_disk_tokens, num_recomputed_tokens: as in `StepPlan`.
    """

    def __init__(self):
        self.addressed: set[int] = set()
        self.swap_outs: list[tuple[int, int]] = []
        self.swap_ins: list[tuple[int, int]] = []
        self.copies: list[tuple[int, int]] = []
        self.num_preemptions = self.num_lookup_tokens = self.num_hit_tokens = 0
        self.num_disk_tokens = self.num_recomputed_tokens = self.num_extra_places = 0
        self.loads: list[PageLoad] = []
        self._num_prefill_tokens = 0
        # Columns, as in `Rows` and `Samples`.
        self._keys: list[tuple[str, int]] = []
        self._table_ids: list[int] = []
        self._starts: list[int] = []
        self._num_tokens: list[int] = []
        self._token_ids: list[SequenceOf[int]] = []
        self._sources: list[int] = []
        self._sample_rows: list[int] = []
        self._offsets: list[int] = []
        self._draws: list[Draw] = []
        self._processing: list[Processing | None] = []
        self._sampled: list[Sequence] = []
        self._searches: list[Search] = []
        self._searchers: list[Request] = []
        self._scores: list[tuple[int, int, int, int]] = []
        self._scored: list[tuple[Request, int]] = []

    @property
    def num_rows(self) -> int:
        """Sequences that compute tokens."""
        return len(self._keys)

    @property
    def num_samples(self) -> int:
        """Sequences that get a token."""
        return len(self._sampled)

    def has_row(self, seq: Sequence) -> bool:
        """Whether a sequence computes tokens."""
        return seq.table_id in self._table_ids

    def add_row(self, seq: Sequence, num_tokens: int) -> int:
        """Has a sequence, with pages, compute its next tokens. Returns: its row."""
        start, table_id, token_ids, source = seq.num_computed_tokens, seq.table_id, (), -1
        assert table_id is not None
        if seq.num_inflight_tokens:
            source = seq.sample_slot  # what only the device knows is always a row's only token
        else:
            token_ids = seq.token_ids[start : start + num_tokens]
        self._keys.append(seq.key)
        self._table_ids.append(table_id)
        self._starts.append(start)
        self._num_tokens.append(num_tokens)
        self._token_ids.append(token_ids)
        self._sources.append(source)
        if num_tokens > 1 or start < seq.num_prompt_tokens:
            self._num_prefill_tokens += num_tokens
        seq.num_computed_tokens += num_tokens
        return len(self._keys) - 1

    def add_sample(self, seq: Sequence, row: int) -> None:
        """Has a sequence get the token that follows the last one of a row."""
        seq.sample_slot = len(self._sampled)
        seq.num_inflight_tokens += 1
        self._sample_rows.append(row)
        self._offsets.append(self._num_tokens[row] - 1)
        self._draws.append(seq.draw)
        self._processing.append(None if seq.request.processors is None else seq.processing())
        self._sampled.append(seq)

    def add_scores(self, seq: Sequence, row: int, last: bool) -> None:
        """Has what a row predicts be scored, as far as its request wants that.

        Args:
          seq: the row's.
          row: added just now.
          last: whether the last of its tokens gets a sample, of which a score takes the place.
        """
        scored = seq.request.scored
        assert scored is not None, "nothing is wanted"
        start = self._starts[row]
        positions = scored.positions(start, start + self._num_tokens[row])
        for position in positions:
            target = scored.token_ids[position + 1]
            self._scores.append((row, position - start, target, scored.num_likeliest))
            self._scored.append((seq.request, position))
        shares = last and bool(positions) and positions[-1] == start + self._num_tokens[row] - 1
        self.num_extra_places += max(len(positions) - (shares or not last), 0)

    def add_search(self, request: Request, chooser: Chooser, first_sample: int) -> None:
        """Has the samples of a request, from that one on, be searched together."""
        self._searches.append(Search(first_sample, *chooser.selection()))
        self._searchers.append(request)

    def build(self) -> ScheduledStep:
        """The step."""
        plan = StepPlan(
            rows=Rows(
                tuple(self._keys),
                tuple(self._table_ids),
                tuple(self._starts),
                tuple(self._num_tokens),
                tuple(self._token_ids),
                tuple(self._sources),
            ),
            samples=Samples(
                tuple(self._sample_rows),
                tuple(self._offsets),
                tuple(self._draws),
                tuple(self._processing),
            ),
            searches=tuple(self._searches),
            scores=Scores(*zip(*self._scores, strict=True)) if self._scores else Scores(),
            swap_outs=tuple(self.swap_outs),
            swap_ins=tuple(self.swap_ins),
            copies=tuple(self.copies),
            num_prefill_tokens=self._num_prefill_tokens,
            num_preemptions=self.num_preemptions,
            num_lookup_tokens=self.num_lookup_tokens,
            num_hit_tokens=self.num_hit_tokens,
            num_disk_tokens=self.num_disk_tokens,
            num_recomputed_tokens=self.num_recomputed_tokens,
        )
        results = tuple(self._sampled), tuple(self._searchers), tuple(self._scored)
        return ScheduledStep(plan, *results, tuple(self.loads))
