# SPDX-License-Identifier: Apache-2.0
"""What changes the logits of single requests before tokens are chosen: the host's side of it.

Sets of tokens are bitmaps over the vocabulary, `u8[ceil(vocab_size / 8)]`, token t in bit t % 8 of
byte t // 8: their size does not depend on how long a sequence is, so a step needs one program.
"""

from __future__ import annotations

import typing
from collections.abc import Collection, Sequence

import numpy as np

from jpaged.host.params import SamplingParams


class Processing(typing.NamedTuple):
    """What is done to the logits of one sample.

    Attributes:
      repetition_penalty: 1 is none.
      seen: u8[bytes], tokens of prompt and answer that the host knows; None without a penalty.
      blocked: u8[bytes], tokens that cannot be chosen; None if all can.
      renormalized: whether a beam's scores are log-probabilities again then.
    """

    repetition_penalty: float
    seen: np.ndarray | None
    blocked: np.ndarray | None
    renormalized: bool


class ProcessorRows(typing.NamedTuple):
    """What `sampling.process_logits` does, one entry a sample.

    Attributes:
      active: bool[num_samples], whether it does anything.
      repetition_penalty: f32[num_samples]; 1 is none.
      seen: u8[num_samples, bytes], tokens of prompt and answer that the host knows.
      previous_slots: i32[num_samples], which sample of the step before is one more, or -1.
      blocked: u8[num_samples, bytes], tokens that cannot be chosen.
      renormalized: bool[num_samples], whether a beam's scores are log-probabilities again then.
    """

    active: np.ndarray
    repetition_penalty: np.ndarray
    seen: np.ndarray
    previous_slots: np.ndarray
    blocked: np.ndarray
    renormalized: np.ndarray


class LogitsProcessors:
    """Those of one request."""

    def __init__(self, params: SamplingParams, eos_token_ids: Collection[int], vocab_size: int):
        """Prepares what does not change.

        Args:
          params: of the request, resolved.
          eos_token_ids: the model's own; tokens that end a sample cannot be chosen too early.
          vocab_size: of the logits.

        Raises:
          ValueError: if no token were left to choose.
        """
        assert params.repetition_penalty is not None and params.min_tokens is not None
        self.repetition_penalty = params.repetition_penalty
        self.renormalizes = bool(params.renormalize_logits)
        self.num_bytes = -(-vocab_size // 8)
        self._min_tokens = params.min_tokens
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        self._suppressed = frozenset(params.suppress_tokens or ())
        self._early = self._suppressed | (stops if params.min_tokens else frozenset())
        if len(self._early) >= vocab_size:
            early = f" and, before min_tokens={params.min_tokens}, the stop tokens"
            raise ValueError(
                f"suppress_tokens{early if params.min_tokens else ''} leave none of the "
                f"{vocab_size} tokens of the vocabulary to choose"
            )
        # Made when they are needed: a request that waits has none.
        self._blocked: dict[frozenset[int], np.ndarray] = {}
        # By sample: how many of its tokens are in the bitmap.
        self._seen: dict[int, tuple[int, np.ndarray]] = {}

    @classmethod
    def of(
        cls, params: SamplingParams, eos_token_ids: Collection[int], vocab_size: int
    ) -> LogitsProcessors | None:
        """The processors that parameters ask for; None, at no cost, if they ask for none."""
        if params.repetition_penalty == 1 and not params.min_tokens and not params.suppress_tokens:
            return None
        return cls(params, eos_token_ids, vocab_size)

    def blocked(self, num_generated: int) -> np.ndarray | None:
        """Tokens that cannot be chosen after so many generated ones; None if all can."""
        tokens = self._early if num_generated < self._min_tokens else self._suppressed
        if tokens and tokens not in self._blocked:
            self._blocked[tokens] = self._bitmap(tokens)
        return self._blocked.get(tokens)

    def processing(
        self, index: int, token_ids: Sequence[int], num_generated: int
    ) -> Processing | None:
        """What is to be done before the next token of a sequence; None if nothing is.

        It depends on the sequence's own tokens and their number only.

        Args:
          index: which of the request's sequences.
          token_ids: prompt and generated tokens that the host knows.
          num_generated: of generated ones, those that only the device knows included.
        """
        blocked, penalty = self.blocked(num_generated), self.repetition_penalty
        if blocked is None and penalty == 1:
            return None
        seen = None if penalty == 1 else self._seen_in(index, token_ids)
        return Processing(penalty, seen, blocked, self.renormalizes)

    def _seen_in(self, index: int, token_ids: Sequence[int]) -> np.ndarray:
        if not isinstance(token_ids, list):
            return self._bitmap(token_ids[:])  # of a search: other tokens each time
        # A list only grows.
        count, bitmap = self._seen.get(index) or (0, self._bitmap(()))
        _set(bitmap, token_ids[count:])
        self._seen[index] = len(token_ids), bitmap
        return bitmap.copy()

    def _bitmap(self, token_ids: Collection[int]) -> np.ndarray:
        bitmap = np.zeros(self.num_bytes, np.uint8)
        _set(bitmap, list(token_ids))
        return bitmap


def processor_rows(
    processing: Sequence[Processing | None], sources: Sequence[int], num_rows: int
) -> ProcessorRows | None:
    """What is to be done to the logits of a step's samples; None, at no cost, if nothing is.

    Args:
      processing: of each sample.
      sources: for each, which sample of the step before is its newest token, if the host does not
        know it yet: that one counts too. -1 if it does.
      num_rows: padded number of samples.
    """
    rows: ProcessorRows | None = None
    for slot, own in enumerate(processing):
        if own is None:
            continue
        bitmap = own.seen if own.blocked is None else own.blocked
        assert bitmap is not None
        rows = rows or idle_rows(num_rows, len(bitmap))
        rows.active[slot] = True
        rows.renormalized[slot] = own.renormalized
        if own.blocked is not None:
            rows.blocked[slot] = own.blocked
        if own.seen is not None:
            rows.repetition_penalty[slot] = own.repetition_penalty
            rows.seen[slot] = own.seen
            rows.previous_slots[slot] = sources[slot]
    return rows


def idle_rows(num_rows: int, num_bytes: int) -> ProcessorRows:
    """Rows that leave logits as they are."""
    return ProcessorRows(
        np.zeros(num_rows, bool),
        np.ones(num_rows, np.float32),
        np.zeros((num_rows, num_bytes), np.uint8),
        np.full(num_rows, -1, np.int32),
        np.zeros((num_rows, num_bytes), np.uint8),
        np.zeros(num_rows, bool),
    )


def _set(bitmap: np.ndarray, token_ids: Sequence[int]) -> None:
    ids = np.array(token_ids, np.int64)
    np.bitwise_or.at(bitmap, ids >> 3, (1 << (ids & 7)).astype(np.uint8))
