# SPDX-License-Identifier: Apache-2.0
"""The samples of a step whose log-probabilities are not those of the model's logits."""

import typing
from collections.abc import Sequence

import numpy as np

from jpaged.host.params import LogprobsMode
from jpaged.host.step import Draw


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


def idle_modes(num_rows: int, num_logprobs: int) -> ModeBatch:
    """Of no sample, to compile with."""
    return ModeBatch(np.zeros(num_rows, bool), (), max(1, num_logprobs))
