# SPDX-License-Identifier: Apache-2.0
"""Which attention a layer computes, as the one static value that every kernel takes."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class AttentionVariant:
    """What one attention differs in from another; a program is compiled for each.

    Attributes:
      sm_scale: multiplies the scores; None is 1 / sqrt(head_dim).
      sliding_window: a query sees itself and the `sliding_window - 1` tokens before it; with None,
        all before it.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`; None leaves them as they are.
    """

    sm_scale: float | None = None
    sliding_window: int | None = None
    soft_cap: float | None = None

    def scale(self, head_dim: int) -> float:
        """What scores of keys of so many lanes are multiplied by."""
        return head_dim**-0.5 if self.sm_scale is None else self.sm_scale

    def capped(self, scores: jax.Array) -> jax.Array:
        """Scaled scores of any shape, with the cap where there is one."""
        if self.soft_cap is None:
            return scores
        return self.soft_cap * jnp.tanh(scores / self.soft_cap)

    def sees(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Whether queries at these positions see keys at those; shapes broadcast."""
        seen = keys <= queries
        if self.sliding_window is not None:
            seen &= keys > queries - self.sliding_window
        return seen

    def lowest_key(self, queries: jax.Array) -> jax.Array:
        """The first position that queries at these positions see."""
        if self.sliding_window is None:
            return jnp.zeros_like(queries)
        return jnp.maximum(queries - self.sliding_window + 1, 0)
