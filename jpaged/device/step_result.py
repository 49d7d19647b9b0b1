# SPDX-License-Identifier: Apache-2.0
"""What a dispatch has sampled, on the device until the host reads it."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from jpaged.host.growth.base import Candidate, Outcome


@dataclasses.dataclass(frozen=True)
class StepResult:
    """One step's samples, still on the device until they are read.

    Attributes:
      tokens: i32[max_num_seqs], the first `num_samples` live.
      logprobs: f32[num_rows], of the tokens; NaN where the logits are not finite.
      top: i32 and f32[num_rows, count] likeliest tokens and their log-probabilities, and how many
        of these are wanted at most; or None.
      beams: for each beam search of the step, what `sampling.beam_candidates`, or
        `processed_beam_candidates`, returned.
      num_samples: live samples.
      scores: f32[num_rows], log-probabilities of given tokens, and which of them are wanted; None
        where none are.
      modes: what `sampling.drawn_logprobs` returned, of which samples it is wanted, and how many
        likeliest tokens; None where of none.
      compile_s: seconds that compiling took before the step was on its way; 0 mostly.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top: tuple[jax.Array, jax.Array, int] | None
    beams: list[tuple[jax.Array, ...]]
    num_samples: int
    scores: tuple[jax.Array, Sequence[int]] | None = None
    modes: tuple[tuple[jax.Array, ...], Sequence[int], int] | None = None
    compile_s: float = 0.0

    def outcomes(self) -> list[Outcome]:
        """Waits for the step and returns what it found, as of each of a burst."""
        tokens = np.asarray(self.tokens)[: self.num_samples].tolist()
        logprobs = np.asarray(self.logprobs)[: self.num_samples].tolist()
        likeliest: list[dict[int, float]] | None = None
        if self.top is not None:
            slots = () if self.scores is None else self.scores[1]
            count = max((self.num_samples, *(slot + 1 for slot in slots)))
            *top, wanted = self.top
            ids, values = (np.asarray(part)[:count, :wanted].tolist() for part in top)
            pairs = zip(ids, values, strict=True)
            likeliest = [dict(zip(*pair, strict=True)) for pair in pairs]
        scores = []
        if self.scores is not None:
            found, slots = np.asarray(self.scores[0]).tolist(), self.scores[1]
            scores = [(found[slot], likeliest[slot] if likeliest else {}) for slot in slots]
        if likeliest is not None:
            likeliest = likeliest[: self.num_samples]
        reported: dict[int, float] = {}
        if self.modes is not None:
            (own, *top), slots, wanted = self.modes
            own = np.asarray(own).tolist()
            ids, values = (np.asarray(part)[:, :wanted].tolist() for part in top)
            likeliest = likeliest or [{} for _ in tokens]
            for slot in slots:
                reported[slot] = own[slot]
                pairs = zip(ids[slot], values[slot], strict=True)
                likeliest[slot] = {token: value for token, value in pairs if value > -math.inf}
        candidates = []
        for parts in self.beams:
            found = zip(*(np.asarray(part).tolist() for part in parts), strict=True)
            candidates.append([Candidate(*each) for each in found if each[0] > -math.inf])
        return [Outcome(tokens, logprobs, likeliest, candidates, scores, reported)]


@dataclasses.dataclass(frozen=True)
class BurstResult:
    """The samples of a burst, still on the device until they are read.

    Attributes:
      tokens, logprobs: i32 and f32[max_steps, num_rows], as in `StepResult`, of each step.
      samples: as in `jpaged.host.burst.Burst`.
      compile_s: as in `StepResult`.
    """

    tokens: jax.Array
    logprobs: jax.Array
    samples: tuple[tuple[int, ...], ...]
    compile_s: float = 0.0

    def outcomes(self) -> list[Outcome]:
        """Waits for the last step. Returns: what each has found."""
        tokens, logprobs = np.asarray(self.tokens), np.asarray(self.logprobs)
        found = ((step, list(rows)) for step, rows in enumerate(self.samples))
        return [Outcome(tokens[at].tolist(), logprobs[at].tolist(), None, []) for at in found]
