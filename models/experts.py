# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts: each token goes through the few MLPs that a router chooses for it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpaged.models import layers
from jpaged.models.config import ExpertsSpec

# rhs [experts, features, in], as checkpoints have weights: contracted over its last axis.
_PER_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


class Experts(nn.Module):
    """`ExpertsSpec`, computed by sorting tokens by expert and one ragged product a weight.

    Sources: Shazeer et al. 2017; Gale et al. 2022 (no token is dropped).
    """

    spec: ExpertsSpec

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s = self.spec
        num_tokens, hidden_size = x.shape
        logits = layers.Linear(s.num_experts, s.bias, name="router")(x)
        experts, weights = route(s, logits)
        flat = experts.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        tokens = order // s.num_experts_per_token
        sorted_experts = flat[order]
        sizes = jnp.bincount(flat, length=s.num_experts).astype(jnp.int32)

        def product(name: str, features: int, rows: jax.Array) -> jax.Array:
            projection = _Projections(s.num_experts, features, s.bias, name=name)
            return projection(rows, sizes, sorted_experts)

        rows = x[tokens]
        gate = product("gate_proj", s.intermediate_size, rows)
        up = product("up_proj", s.intermediate_size, rows)
        out = product("down_proj", hidden_size, self._gated(gate, up))
        out = out * weights.reshape(-1)[order][:, None].astype(out.dtype)
        unsorted = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
        return unsorted.reshape(num_tokens, s.num_experts_per_token, hidden_size).sum(axis=1)

    def _gated(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        if self.spec.activation != "swiglu_oai":
            return layers.gated(self.spec.activation, gate, up)
        gate = jnp.minimum(gate, self.spec.limit)
        up = jnp.clip(up, -self.spec.limit, self.spec.limit)
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


def route(spec: ExpertsSpec, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Chooses the experts of each token.

    Args:
      spec: how many, and what their outputs are multiplied by.
      logits: [num_tokens, num_experts], of any float dtype.

    Returns:
      i32[num_tokens, num_experts_per_token], largest logit first, the first of equals; and their
      weights, f32 of the same shape.
    """
    logits = logits.astype(jnp.float32)
    if spec.weights == "softmax_of_chosen":
        chosen, experts = jax.lax.top_k(logits, spec.num_experts_per_token)
        return experts, jax.nn.softmax(chosen, axis=-1)
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), spec.num_experts_per_token)
    if spec.weights == "renormalized":
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return experts, weights


class _Projections(nn.Module):
    """A linear layer of each expert."""

    num_experts: int
    features: int
    bias: bool

    @nn.compact
    def __call__(self, rows: jax.Array, sizes: jax.Array, experts: jax.Array) -> jax.Array:
        shape = (self.num_experts, self.features, rows.shape[-1])
        weight = self.param("weight", nn.initializers.normal(0.02), shape, rows.dtype)
        out = jax.lax.ragged_dot_general(
            rows, weight, sizes, _PER_EXPERT, preferred_element_type=rows.dtype
        )
        if self.bias:
            bias = self.param(
                "bias", nn.initializers.zeros, (self.num_experts, self.features), rows.dtype
            )
            out = out + bias[experts]
        return out
