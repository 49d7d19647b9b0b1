# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings: by how much a position turns each pair of lanes.

Sources: Su et al. 2021 (plain), Chen et al. 2023 (linear), Meta's Llama 3.1 reference code
(llama3), Peng et al. 2023 (yarn), Ding et al. 2024 (longrope). All as transformers 5 computes them,
but that longrope's factors are those of the longest sequence that is served, whatever has been
written so far: what a token is must not depend on the tokens that come later.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.models.json_fields import ModelConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Divides every frequency.

    Attributes:
      factor: by this, >= 1.
    """

    factor: float

    def __post_init__(self):
        _check_factor(self.factor)

    def scaled(self, rope: "Rope", frequencies: np.ndarray, length: int | None) -> np.ndarray:
        """The frequencies, f32[dim / 2]."""
        return (frequencies / self.factor).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Divides the frequencies of long wavelengths, and blends in between.

    Attributes:
      factor: by this, >= 1.
      low_freq_factor: wavelengths above `original_max_position / low_freq_factor` tokens are
        stretched fully.
      high_freq_factor: those below `original_max_position / high_freq_factor` are left alone.
      original_max_position: the context, in tokens, before stretching.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self):
        _check_factor(self.factor)
        _check_original(self.original_max_position)
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ModelConfigError(
                f"rope low_freq_factor={self.low_freq_factor} must be above 0 and below "
                f"high_freq_factor={self.high_freq_factor}"
            )

    def scaled(self, rope: "Rope", frequencies: np.ndarray, length: int | None) -> np.ndarray:
        """The frequencies, f32[dim / 2]."""
        low, high = self.low_freq_factor, self.high_freq_factor
        turns = self.original_max_position * frequencies / (2 * math.pi)
        # 0 below `low` turns over the original context (stretched), 1 above `high` (left alone).
        blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return ((1 - blend) * frequencies / self.factor + blend * frequencies).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Divides the frequencies that turn little over the original context, and blends by lane.

    Attributes:
      factor: by this, >= 1.
      original_max_position: the context, in tokens, before stretching.
      attention_factor: cosines and sines are multiplied by it.
      beta_fast: lanes that turn more often than this over the original context are left alone.
      beta_slow: lanes that turn less often are stretched fully.
      truncate: whether the lanes between which is blended are whole numbers.
    """

    factor: float
    original_max_position: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        _check_factor(self.factor)
        _check_original(self.original_max_position)
        _check_attention_factor(self.attention_factor)
        if not 0 < self.beta_slow <= self.beta_fast < math.inf:
            raise ModelConfigError(
                f"rope beta_slow={self.beta_slow} must be above 0 and at most beta_fast="
                f"{self.beta_fast}"
            )

    def scaled(self, rope: "Rope", frequencies: np.ndarray, length: int | None) -> np.ndarray:
        """The frequencies, f32[dim / 2]."""

        def lane(turns: float) -> float:
            longest = self.original_max_position / (turns * 2 * math.pi)
            return rope.dim * math.log(longest) / (2 * math.log(rope.theta))

        low, high = lane(self.beta_fast), lane(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.dim - 1)
        high += 0.001 * (low == high)
        lanes = np.arange(rope.dim // 2, dtype=np.float32)
        stretched = np.clip((lanes - low) / (high - low), 0, 1).astype(np.float32)
        return (frequencies / self.factor * stretched + frequencies * (1 - stretched)).astype(
            np.float32
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """Divides each frequency by a factor of its own, of one list or of another.

    Attributes:
      short_factor: for contexts up to `original_max_position`, one a pair of lanes.
      long_factor: for longer ones.
      original_max_position: the context, in tokens, before stretching.
      attention_factor: cosines and sines are multiplied by it.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position: int
    attention_factor: float

    def __post_init__(self):
        _check_original(self.original_max_position)
        _check_attention_factor(self.attention_factor)
        for name in ("short_factor", "long_factor"):
            if not all(0 < factor < math.inf for factor in getattr(self, name)):
                raise ModelConfigError(f"rope {name} must hold finite numbers above 0")

    def scaled(self, rope: "Rope", frequencies: np.ndarray, length: int | None) -> np.ndarray:
        """The frequencies, f32[dim / 2]."""
        is_long = length is not None and length > self.original_max_position
        factors = self.long_factor if is_long else self.short_factor
        return (frequencies / np.array(factors, np.float32)).astype(np.float32)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How one layer turns its queries and keys.

    Attributes:
      theta: base of the frequencies.
      dim: lanes of a head that are turned, the first ones; even.
      scaling: None leaves the frequencies as they are.
    """

    theta: float
    dim: int
    scaling: RopeScaling | None = None

    def __post_init__(self):
        if not 0 < self.theta < math.inf:
            raise ModelConfigError(f"rope_theta={self.theta} must be finite and above 0")
        if self.dim < 2 or self.dim % 2:
            raise ModelConfigError(
                f"rotary lanes of a head, {self.dim}, must be even and at least 2: rotary "
                "embeddings turn pairs of lanes"
            )
        if isinstance(self.scaling, LongRopeScaling):
            for name in ("short_factor", "long_factor"):
                if len(getattr(self.scaling, name)) != self.dim // 2:
                    raise ModelConfigError(
                        f"rope {name} has {len(getattr(self.scaling, name))} entries for "
                        f"{self.dim // 2} pairs of lanes"
                    )

    def frequencies(self, length: int | None = None) -> np.ndarray:
        """f32[dim / 2]: radians a position turns each pair of lanes by.

        Args:
          length: longest sequence that is served, in tokens; None is no longer than the original
            context.
        """
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        plain = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        return plain if self.scaling is None else self.scaling.scaled(self, plain, length)

    def table(self, positions: jax.Array, length: int | None = None) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines of every position's rotation angles.

        Args:
          positions: i32[num_tokens].
          length: as in `frequencies`.

        Returns:
          Two f32[num_tokens, 1, dim / 2]; the middle axis broadcasts over heads.
        """
        frequencies = self.frequencies(length)
        angles = positions.astype(jnp.float32)[:, None, None] * frequencies[None, None, :]
        factor = getattr(self.scaling, "attention_factor", 1.0)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns lane i and lane i + dim / 2 of `[num_tokens, heads, head_dim]` by their angle.

    Lanes beyond the table's are left as they are.
    """
    cos, sin = table
    half = cos.shape[-1]
    x32 = x.astype(jnp.float32)
    a, b = x32[..., :half], x32[..., half : 2 * half]
    turned = [a * cos - b * sin, b * cos + a * sin]
    if 2 * half < x.shape[-1]:
        turned.append(x32[..., 2 * half :])
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _check_factor(factor: float) -> None:
    if not 1 <= factor < math.inf:
        raise ModelConfigError(f"rope factor={factor} must be finite and at least 1")


def _check_original(original: int) -> None:
    if original < 1:
        raise ModelConfigError(f"rope original_max_position={original} must be at least 1")


def _check_attention_factor(factor: float) -> None:
    if not 0 < factor < math.inf:
        raise ModelConfigError(f"rope attention_factor={factor} must be finite and above 0")
