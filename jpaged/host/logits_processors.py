# SPDX-License-Identifier: Apache-2.0
"""What changes the logits of single requests before tokens are chosen: the host's side of it.

Sets of tokens are bitmaps over the vocabulary, `u8[ceil(vocab_size / 8)]`, token t in bit t % 8 of
byte t // 8: their size does not depend on how long a sequence is, so a step needs one program.
Numbers that belong to tokens are lists (see `token_biases`).
"""

from __future__ import annotations

import typing
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from jpaged.host.params import SamplingParams
from jpaged.host.token_biases import (
    BiasEntries,
    CountEntries,
    TokenBiases,
    TokenCounts,
    padded_width,
    widths_up_to,
)

# Pads lists of tokens: outside any vocabulary, so that nothing is written for it.
_NO_TOKEN = np.iinfo(np.int32).max


class Processing(typing.NamedTuple):
    """What is done to the logits of one sample.

    Attributes:
      num_bytes: of a bitmap.
      newest: the last token that the host knows.
      repetition_penalty: 1 is none.
      seen: u8[num_bytes], tokens of prompt and answer that the host knows; None without a penalty.
      blocked: u8[num_bytes], tokens that cannot be chosen; None if all can.
      bias: what is added; None if nothing is.
      presence_penalty, frequency_penalty: what is subtracted for tokens that were generated, once
        and each time.
      counts: of generated tokens that the host knows; None without these two.
      renormalized: whether a beam's scores are log-probabilities again then.
    """

    num_bytes: int
    newest: int
    repetition_penalty: float
    seen: np.ndarray | None
    blocked: np.ndarray | None
    bias: BiasEntries | None
    presence_penalty: float
    frequency_penalty: float
    counts: CountEntries | None
    renormalized: bool


class ProcessorRows(typing.NamedTuple):
    """What `sampling.process_logits` does, one entry a sample.

    Lists of tokens have one width, 0 if nobody needs one, and are padded with tokens outside the
    vocabulary. No token is twice in a list of counted ones; for biases see `BiasEntries`.

    Attributes:
      active: bool[num_samples], whether it does anything.
      previous_slots: i32[num_samples], which sample of the step before is the newest token, or -1.
      newest: i32[num_samples], the newest token where the host knows it.
      bias_tokens: i32[num_samples, width], to whose logits something is added.
      bias_after: i32[num_samples, width], the newest token after which it is; -1 is any.
      bias: f32[num_samples, width], how much.
      repetition_penalty: f32[num_samples]; 1 is none.
      seen: u8[num_samples, bytes], tokens of prompt and answer that the host knows.
      counted_tokens: i32[num_samples, width], generated tokens that the host knows.
      penalties: f32[num_samples, width], the frequency penalty times their counts.
      next_penalties: f32[num_samples, width], the same if the token comes once more.
      frequency_penalty: f32[num_samples], that of a token that comes for the first time.
      presence_penalty: f32[num_samples], what is subtracted for any of these on top.
      blocked: u8[num_samples, bytes], tokens that cannot be chosen.
      renormalized: bool[num_samples], whether a beam's scores are log-probabilities again then.
    """

    active: np.ndarray
    previous_slots: np.ndarray
    newest: np.ndarray
    bias_tokens: np.ndarray
    bias_after: np.ndarray
    bias: np.ndarray
    repetition_penalty: np.ndarray
    seen: np.ndarray
    counted_tokens: np.ndarray
    penalties: np.ndarray
    next_penalties: np.ndarray
    frequency_penalty: np.ndarray
    presence_penalty: np.ndarray
    blocked: np.ndarray
    renormalized: np.ndarray

    @property
    def width(self) -> int:
        """Of the lists; with the number of samples, it is what programs are keyed by."""
        return self.bias_tokens.shape[1]


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
        self._params = params
        self._vocab_size = vocab_size
        self._num_bytes = -(-vocab_size // 8)
        self._min_tokens = params.min_tokens
        self._counts_tokens = bool(params.presence_penalty or params.frequency_penalty)
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        bad_words = [ids for ids in params.bad_words_ids or () if len(ids) > 1]
        bad_tokens = {ids[0] for ids in params.bad_words_ids or () if len(ids) == 1}
        # What ends an answer is no bad word, as in transformers.
        self._suppressed = frozenset(params.suppress_tokens or ()) | (bad_tokens - stops)
        self._early = self._suppressed | (stops if params.min_tokens else frozenset())
        allowed = params.allowed_token_ids
        self._allowed = None if allowed is None else frozenset(allowed)
        self._check_rest(bad_words)
        biases: Any = (params.logit_bias, dict(params.sequence_bias or ()), bad_words)
        self._biases = TokenBiases(*biases) if any(biases) else None
        # Made when they are needed: a request that waits has none.
        self._blocked: dict[frozenset[int], np.ndarray] = {}
        # By sample: how many of its tokens are in the bitmap.
        self._seen: dict[int, tuple[int, np.ndarray]] = {}
        self._counts: dict[int, TokenCounts] = {}

    def _check_rest(self, bad_words: Sequence[tuple[int, ...]]) -> None:
        """Raises ValueError if some newest token would leave none to choose."""
        allowed, early = self._allowed, self._early
        usual = self._vocab_size - len(early) if allowed is None else len(allowed - early)
        last: dict[int | None, set[int]] = {None: set()}
        for ids in bad_words:
            if ids[-1] not in early and (allowed is None or ids[-1] in allowed):
                last.setdefault(ids[-2], set()).add(ids[-1])
        for newest, tokens in last.items():
            if usual > len(tokens):
                continue
            params = self._params
            names = [
                name
                for name, given in (
                    ("suppress_tokens", params.suppress_tokens),
                    ("bad_words_ids", params.bad_words_ids),
                    ("allowed_token_ids", allowed is not None),
                    (f"the stop tokens before min_tokens={params.min_tokens}", params.min_tokens),
                )
                if given
            ]
            after = "" if newest is None else f" after token {newest}"
            raise ValueError(
                f"{', '.join(names)} leave none of the {self._vocab_size} tokens of the vocabulary "
                f"to choose{after}"
            )

    @classmethod
    def of(
        cls, params: SamplingParams, eos_token_ids: Collection[int], vocab_size: int
    ) -> LogitsProcessors | None:
        """The processors that parameters ask for; None, at no cost, if they ask for none."""
        asked = (
            params.repetition_penalty != 1,
            params.presence_penalty,
            params.frequency_penalty,
            params.logit_bias,
            params.sequence_bias,
            params.min_tokens,
            params.suppress_tokens,
            params.bad_words_ids,
            params.allowed_token_ids is not None,
        )
        return cls(params, eos_token_ids, vocab_size) if any(asked) else None

    def widths(self, max_new_tokens: int) -> list[int]:
        """Those that its lists may have while so many tokens are generated."""
        counted = min(max_new_tokens, self._vocab_size) if self._counts_tokens else 0
        added = self._biases.max_entries if self._biases else 0
        return widths_up_to(max(counted, added))

    def blocked(self, num_generated: int) -> np.ndarray | None:
        """Tokens that cannot be chosen after so many generated ones; None if all can."""
        tokens = self._early if num_generated < self._min_tokens else self._suppressed
        if not tokens and self._allowed is None:
            return None
        if tokens not in self._blocked:
            others = np.invert(self._bitmap(self._allowed)) if self._allowed is not None else 0
            self._blocked[tokens] = self._bitmap(tokens) | others
        return self._blocked[tokens]

    def processing(
        self, index: int, token_ids: Sequence[int], num_prompt_tokens: int, num_generated: int
    ) -> Processing | None:
        """What is to be done before the next token of a sequence; None if nothing is.

        It depends on the sequence's own tokens and their number only.

        Args:
          index: which of the request's sequences.
          token_ids: prompt and generated tokens that the host knows.
          num_prompt_tokens: how many of them are the prompt.
          num_generated: of generated ones, one that only the device knows included.
        """
        params, blocked = self._params, self.blocked(num_generated)
        penalised = params.repetition_penalty != 1
        if blocked is None and not (penalised or self._counts_tokens or self._biases):
            return None
        unknown = num_prompt_tokens + num_generated - len(token_ids)
        assert unknown in (0, 1), "more than the newest token is unknown"
        assert params.repetition_penalty is not None, "not resolved"
        return Processing(
            self._num_bytes,
            int(token_ids[-1]),
            params.repetition_penalty,
            self._seen_in(index, token_ids) if penalised else None,
            blocked,
            self._biases and self._bias(self._biases, token_ids, len(token_ids) + unknown - 1),
            params.presence_penalty,
            params.frequency_penalty,
            self._counts_in(index, token_ids, num_prompt_tokens) if self._counts_tokens else None,
            bool(params.renormalize_logits),
        )

    def _bias(self, biases: TokenBiases, token_ids: Sequence[int], newest: int) -> BiasEntries:
        """What is added where the newest token has the place `newest`."""
        return biases.entries(token_ids[max(newest - biases.num_tokens_before, 0) : newest])

    def _counts_in(
        self, index: int, token_ids: Sequence[int], num_prompt_tokens: int
    ) -> CountEntries:
        assert isinstance(token_ids, list), "of a search, which has no such penalty"
        counts = self._counts.setdefault(index, TokenCounts())
        return counts.entries(token_ids, num_prompt_tokens)

    def _seen_in(self, index: int, token_ids: Sequence[int]) -> np.ndarray:
        if not isinstance(token_ids, list):
            return self._bitmap(token_ids[:])  # of a search: other tokens each time
        # A list only grows.
        count, bitmap = self._seen.get(index) or (0, self._bitmap(()))
        _set(bitmap, token_ids[count:])
        self._seen[index] = len(token_ids), bitmap
        return bitmap.copy()

    def _bitmap(self, token_ids: Collection[int]) -> np.ndarray:
        bitmap = np.zeros(self._num_bytes, np.uint8)
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
    asked = [own for own in processing if own is not None]
    if not asked:
        return None
    entries = [own.bias.tokens.size for own in asked if own.bias is not None]
    # At least one: the first token to be counted may be on the device.
    entries += [max(own.counts.tokens.size, 1) for own in asked if own.counts is not None]
    rows = idle_rows(num_rows, asked[0].num_bytes, padded_width(max(entries, default=0)))
    for slot, own in enumerate(processing):
        if own is None:
            continue
        rows.active[slot] = True
        rows.previous_slots[slot] = sources[slot]
        rows.newest[slot] = own.newest
        rows.renormalized[slot] = own.renormalized
        if own.blocked is not None:
            rows.blocked[slot] = own.blocked
        if own.seen is not None:
            rows.repetition_penalty[slot] = own.repetition_penalty
            rows.seen[slot] = own.seen
        if own.bias is not None:
            listed = slot, slice(own.bias.tokens.size)
            rows.bias_tokens[listed], rows.bias_after[listed], rows.bias[listed] = own.bias
        if own.counts is not None:
            # Multiplied here: on the device, a product and a sum may be rounded once or twice.
            listed, counts = (slot, slice(own.counts.tokens.size)), own.counts.counts
            rows.presence_penalty[slot] = own.presence_penalty
            rows.frequency_penalty[slot] = own.frequency_penalty
            rows.counted_tokens[listed] = own.counts.tokens
            rows.penalties[listed] = rows.frequency_penalty[slot] * counts.astype(np.float32)
            again = (counts + 1).astype(np.float32)
            rows.next_penalties[listed] = rows.frequency_penalty[slot] * again
    return rows


def idle_rows(num_rows: int, num_bytes: int, width: int = 0) -> ProcessorRows:
    """Rows that leave logits as they are, with room for lists of a width."""

    def numbers(*shape: int) -> np.ndarray:
        return np.zeros((num_rows, *shape), np.float32)

    def tokens(*shape: int) -> np.ndarray:
        return np.full((num_rows, *shape), _NO_TOKEN, np.int32)

    def bitmaps() -> np.ndarray:
        return np.zeros((num_rows, num_bytes), np.uint8)

    return ProcessorRows(
        active=np.zeros(num_rows, bool),
        previous_slots=np.full(num_rows, -1, np.int32),
        newest=tokens(),
        bias_tokens=tokens(width),
        bias_after=tokens(width),
        bias=numbers(width),
        repetition_penalty=numbers() + np.float32(1),
        seen=bitmaps(),
        counted_tokens=tokens(width),
        penalties=numbers(width),
        next_penalties=numbers(width),
        frequency_penalty=numbers(),
        presence_penalty=numbers(),
        blocked=bitmaps(),
        renormalized=np.zeros(num_rows, bool),
    )


def _set(bitmap: np.ndarray, token_ids: Sequence[int]) -> None:
    ids = np.array(token_ids, np.int64)
    np.bitwise_or.at(bitmap, ids >> 3, (1 << (ids & 7)).astype(np.uint8))
