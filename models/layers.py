# SPDX-License-Identifier: Apache-2.0
"""The building blocks of a dense decoder, as Flax Linen modules over a flat axis of tokens."""

import functools
import math
from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jpaged.models.config import ModelConfig, RopeScaling
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant


class Attend(Protocol):
    """How queries meet keys and values: over pages, or over whole sequences without a cache."""

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        kv_pages: jax.Array | None,
        layer: int | jax.Array,
        rows: Rows | None,
        variant: AttentionVariant,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Attends in one layer.

        Args:
          q: [num_tokens, num_q_heads, head_dim].
          k: [num_tokens, num_kv_heads, head_dim].
          v: likewise.
          kv_pages: the pool, without these keys and values; None without a cache.
          layer: which layer of the pool.
          rows: whose the tokens are; None without a cache.
          variant: which attention.

        Returns:
          [num_tokens, num_q_heads, head_dim], and the pool with these keys and values.
        """
        ...


# Up to this many tokens a CPU multiplies weights by activations, and not the other way round.
_WEIGHTS_FIRST_TOKENS = 256


@functools.partial(jax.jit, static_argnames="dtype")  # traced and lowered once for all layers
def linear(x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """`x @ weight.T` for the weight as Hugging Face stores it.

    The CPU's matrix library packs its right operand anew at every call. With few tokens that is
    most of the work when the weights are on the right: weights first take as long, or down to a
    quarter (float32, docs/decisions.md). The compiler would turn the product round again, but for
    the barrier.

    Args:
      x: [tokens, in].
      weight: [features, in], of the same dtype.
      dtype: of the result; None takes that of x.

    Returns:
      [tokens, features].
    """
    contracted = (((1,), (1,)), ((), ()))

    def tokens_first(x, weight):
        return jax.lax.dot_general(x, weight, contracted, preferred_element_type=dtype)

    def weights_first(x, weight):
        product = jax.lax.dot_general(weight, x, contracted, preferred_element_type=dtype)
        return jax.lax.optimization_barrier(product).T

    if x.shape[0] > _WEIGHTS_FIRST_TOKENS:
        return tokens_first(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=weights_first, default=tokens_first)


class Linear(nn.Module):
    """`linear` with a weight of its own."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param(
            "weight", nn.initializers.normal(0.02), (self.features, x.shape[-1]), x.dtype
        )
        return linear(x, weight)


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis, in float32, and scales.

    Source: Zhang & Sennrich 2019.
    """

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), x.dtype)
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(scale, range(x.ndim - 1))
        return scale * (x32 * inverse).astype(x.dtype)


class Attention(nn.Module):
    """Projections, optional per-head norms and rotation around an `Attend`."""

    config: ModelConfig
    attend: Attend

    @nn.compact
    def __call__(self, x, rope, kv_pages, layer, rows: Rows | None):
        c = self.config
        q = Linear(c.num_q_heads * c.head_dim, name="q_proj")(x)
        k = Linear(c.num_kv_heads * c.head_dim, name="k_proj")(x)
        v = Linear(c.num_kv_heads * c.head_dim, name="v_proj")(x)
        q = q.reshape(-1, c.num_q_heads, c.head_dim)
        k = k.reshape(-1, c.num_kv_heads, c.head_dim)
        v = v.reshape(-1, c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, name="k_norm")(k)
        q, k = rotate(q, rope), rotate(k, rope)
        out, kv_pages = self.attend(q, k, v, kv_pages, layer, rows, AttentionVariant())
        out = out.reshape(-1, c.num_q_heads * c.head_dim)
        return Linear(c.hidden_size, name="o_proj")(out), kv_pages


class GatedMlp(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`. Source: Shazeer 2020."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = Linear(self.config.intermediate_size, name="gate_proj")(x)
        up = Linear(self.config.intermediate_size, name="up_proj")(x)
        return Linear(self.config.hidden_size, name="down_proj")(nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and MLP, each normed before and added to the residual stream.

    Called on the carry `(x, kv_pages)` so that the layers can be unrolled or scanned over.
    """

    config: ModelConfig
    attend: Attend

    @nn.compact
    def __call__(self, carry, layer, rope, rows: Rows | None):
        x, kv_pages = carry
        eps = self.config.rms_norm_eps
        attention = Attention(self.config, self.attend, name="attention")
        out, kv_pages = attention(
            RMSNorm(eps, name="attention_norm")(x), rope, kv_pages, layer, rows
        )
        x = x + out
        x = x + GatedMlp(self.config, name="mlp")(RMSNorm(eps, name="mlp_norm")(x))
        return (x, kv_pages), None


def rope_table(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every position's rotation angles.

    Args:
      config: gives head_dim, rope_theta and rope_scaling.
      positions: i32[num_tokens].

    Returns:
      Two f32[num_tokens, 1, head_dim / 2]; the middle axis broadcasts over heads.
    """
    angles = positions.astype(jnp.float32)[:, None, None] * rope_frequencies(config)[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """f32[head_dim / 2]: radians a position turns each pair of lanes by.

    Source: Su et al. 2021; the llama3 scaling is that of Meta's Llama 3.1 reference code.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    # 0 below `low` turns over the original context (stretched), 1 above `high` (left alone).
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - blend) * frequencies / scaling.factor + blend * frequencies).astype(np.float32)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns lane i and lane i + head_dim / 2 of `[num_tokens, heads, head_dim]` by their angle."""
    cos, sin = rope
    half = x.shape[-1] // 2
    x32 = x.astype(jnp.float32)
    a, b = x32[..., :half], x32[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
