# SPDX-License-Identifier: Apache-2.0
"""How a request wants its tokens chosen and when it wants to stop."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's sampling parameters, checked when made.

    Filters apply in the order temperature, top_k, top_p, min_p; a tie at a filter's edge is kept
    whole.

    Attributes:
      max_tokens: most tokens to generate, >= 1.
      temperature: divides the logits; 0 is greedy.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the smallest set of likeliest tokens whose probability reaches this, in (0, 1].
      min_p: keep tokens at least this fraction as likely as the likeliest, in [0, 1].
      n: samples to draw from the prompt, >= 1, or best beams to return; they share its pages. Fewer
        beams come back where there are not so many continuations, or after an abort.
      best_of: draws so many samples and returns the `n` of them whose tokens have the highest
        log-probability on average; None draws `n`.
      beam_width: searches with so many beams instead of sampling, as transformers' `num_beams`;
        tokens are scored as the model has them, so temperature, filters and stop strings must be
        left alone. All beams are computed in one step, and wait for one with room. None samples.
      length_penalty: beams are compared by the sum of their log-probabilities divided by their
        length to this power; above 0 favours long ones.
      early_stopping: when beam search ends: True as soon as `beam_width` beams have ended; False
        when none that runs looks better now than those; "never" when none could ever be better.
      seed: makes the request reproducible, in [0, 2**32); None draws one.
      stop: strings that end a sample; they are cut from its text.
      stop_token_ids: tokens that end a sample beside the model's own; they are kept in token_ids.
      ignore_eos: whether to go on after the model's end-of-sequence tokens.
      logprobs: how many likeliest tokens to report with each token; None reports none.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    n: int = 1
    best_of: int | None = None
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    seed: int | None = None
    stop: tuple[str, ...] | str = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.early_stopping != "never" and self.early_stopping in (0, 1):
            object.__setattr__(self, "early_stopping", bool(self.early_stopping))
        for holds, name, rule in (
            (self.max_tokens >= 1, "max_tokens", "at least 1"),
            (
                0 <= self.temperature < math.inf,
                "temperature",
                "finite and at least 0 (0 is greedy)",
            ),
            (self.top_k >= 0, "top_k", "at least 0 (0 keeps every token)"),
            (self.top_k < 2**31, "top_k", "below 2**31"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1 (1 keeps every token)"),
            (0 <= self.min_p <= 1, "min_p", "between 0 and 1 (0 keeps every token)"),
            (self.n >= 1, "n", "at least 1"),
            (self.seed is None or 0 <= self.seed < 2**32, "seed", "in [0, 2**32), or None"),
            (all(self.stop), "stop", "free of empty strings"),
            (self.logprobs is None or self.logprobs >= 0, "logprobs", "at least 0, or None"),
            (
                self.best_of is None or self.best_of >= self.n,
                "best_of",
                f"at least n={self.n}, or None",
            ),
            (
                self.beam_width is None or self.beam_width >= self.n,
                "beam_width",
                f"at least n={self.n}, or None",
            ),
            (math.isfinite(self.length_penalty), "length_penalty", "finite"),
            (
                self.early_stopping in (False, True, "never"),
                "early_stopping",
                "False, True or 'never'",
            ),
        ):
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")
        if self.beam_width is None:
            return
        for name, neutral in (
            ("temperature", 1.0),
            ("top_k", 0),
            ("top_p", 1.0),
            ("min_p", 0.0),
            ("best_of", None),
            ("stop", ()),
        ):
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning in beam search: leave it at "
                    f"{neutral!r}, or beam_width at None"
                )

    @property
    def num_samples(self) -> int:
        """Sequences that grow from the prompt one by one; 1 for the beams of a beam search."""
        return 1 if self.beam_width is not None else self.best_of or self.n
