# SPDX-License-Identifier: Apache-2.0
"""What log-probabilities a step reports: of how many likeliest tokens, and of which logits."""

import typing
from collections.abc import Sequence

import numpy as np

from jpaged.host.params import LogprobsMode
from jpaged.host.step import Draw

# Numbers of likeliest tokens that programs report, up to the vocabulary: so many, times powers of
# the other. Choosing 16 costs a CPU what choosing one does (docs/decisions.md).
_FEWEST, _TIMES = 16, 8


def likeliest_counts(most: int, vocab_size: int) -> list[int]:
    """The numbers of likeliest tokens that programs report where up to `most` are wanted.

    The last of them is at least `most`: a step reports that many, and what nobody wants of them is
    left out on the host. None are wanted with 0.
    """
    counts = [0]
    while counts[-1] < min(most, vocab_size):
        counts.append(min(max(_FEWEST, _TIMES * counts[-1]), vocab_size))
    return counts[1:]


class ModeBatch(typing.NamedTuple):
    """The samples of a step whose log-probabilities are of what they were drawn from.

    Attributes:
      filtered: bool[num_rows], whether what filters cut off is left out.
      slots: which samples they are.
      count: likeliest tokens wanted with each, at least one.
    """

    filtered: np.ndarray
    slots: Sequence[int]
    count: int


def mode_batch(draws: Sequence[Draw], num_rows: int) -> ModeBatch | None:
    """The samples of a step whose mode is not raw; None if there are none.

    Args:
      draws: of each sample.
      num_rows: padded number of samples.
    """
    modes = [draw.logprobs_mode for draw in draws]
    slots = [slot for slot, mode in enumerate(modes) if mode != LogprobsMode.RAW]
    if not slots:
        return None
    filtered = np.zeros(num_rows, bool)
    filtered[: len(modes)] = [mode == LogprobsMode.FILTERS for mode in modes]
    # So that none and one share a program.
    return ModeBatch(filtered, slots, max(1, *(draws[slot].num_logprobs for slot in slots)))


def idle_modes(num_rows: int, count: int) -> ModeBatch:
    """Of no sample, to compile with."""
    return ModeBatch(np.zeros(num_rows, bool), (), count)
