# SPDX-License-Identifier: Apache-2.0
"""How long prompts and outputs are: distributions, and their names."""

import dataclasses
import math
from typing import Protocol

import numpy as np

SPEC_HELP = "a number, uniform:LOW,HIGH, lognormal:mean=M,sigma=S, sharegpt or alpaca"


class Lengths(Protocol):
    """A distribution of lengths in tokens."""

    @property
    def least(self) -> int:
        """The shortest length that can be drawn."""
        ...

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draws i64[count], each at least 1."""
        ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Every length from `low` to `high`, both included, is as likely."""

    low: int
    high: int

    def __post_init__(self):
        if not 1 <= self.low <= self.high:
            raise ValueError(f"lengths from {self.low} to {self.high}: need 1 <= LOW <= HIGH")

    @property
    def least(self) -> int:
        """The shortest length that can be drawn."""
        return self.low

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draws i64[count]."""
        return rng.integers(self.low, self.high, size=count, endpoint=True)


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """The logarithm of the length is normal; few lengths are far above the mean, most are below.

    Attributes:
      mean: of the lengths, not of their logarithms.
      sigma: standard deviation of the logarithms.
    """

    mean: float
    sigma: float
    least = 1

    def __post_init__(self):
        if not (1 <= self.mean < math.inf and 0 <= self.sigma < math.inf):
            raise ValueError(
                f"mean={self.mean:g}, sigma={self.sigma:g}: need mean >= 1, sigma >= 0"
            )

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draws i64[count], rounded, at least 1."""
        mu = math.log(self.mean) - self.sigma**2 / 2
        return np.maximum(np.rint(rng.lognormal(mu, self.sigma, count)), 1).astype(np.int64)


# The means are those of ShareGPT and Alpaca in Kwon et al. 2023 (figure 11); the paper gives no
# variance, so the sigmas are a choice made here: people paste all sorts of things into a chat.
SHAREGPT = {"prompt": LogNormal(161.31, 1.2), "output": LogNormal(337.99, 0.9)}
ALPACA = {"prompt": LogNormal(19.31, 0.5), "output": LogNormal(58.45, 0.9)}
_NAMED = {"sharegpt": SHAREGPT, "alpaca": ALPACA}


def parse_lengths(spec: str, role: str) -> Lengths:
    """Reads a distribution of lengths.

    Args:
      spec: "64", "uniform:32,96", "lognormal:mean=161,sigma=1.2", "sharegpt" or "alpaca".
      role: "prompt" or "output", which of the two lengths of ShareGPT or Alpaca.

    Returns:
      The distribution.

    Raises:
      ValueError: if the spec is none of these, or its numbers are out of range.
    """
    name, _, rest = spec.strip().partition(":")
    try:
        if name in _NAMED and not rest:
            return _NAMED[name][role]
        if name == "uniform":
            low, high = map(int, rest.split(","))
            return Uniform(low, high)
        if name == "lognormal":
            fields = dict(part.strip().split("=") for part in rest.split(","))
            return LogNormal(float(fields.pop("mean")), float(fields.pop("sigma")), **fields)
        return Uniform(int(spec), int(spec))
    except (KeyError, TypeError, ValueError) as e:
        reason = f" ({e})" if "need" in str(e) else ""
        raise ValueError(f"{role} lengths {spec!r}{reason}: give {SPEC_HELP}") from e
