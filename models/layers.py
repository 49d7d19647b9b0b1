# SPDX-License-Identifier: Apache-2.0
"""The building blocks of a decoder, as Flax Linen modules over a flat axis of tokens."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jpaged.models.config import AttentionSpec, MlpSpec, NormSpec
from jpaged.models.merged import MERGED
from jpaged.models.rope import rotate
from jpaged.pallas_kernels import dispatch
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
        sinks: jax.Array | None,
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
          sinks: [num_q_heads], as in `pallas_kernels.paged_attention`.

        Returns:
          [num_tokens, num_q_heads, head_dim], and the pool with these keys and values.
        """
        ...


# Up to this many tokens a CPU multiplies weights by activations, and not the other way round.
_WEIGHTS_FIRST_TOKENS = 256
# To so many a GPU's are padded where the result is wider than the weights.
_GPU_TOKENS = 8


class Multiply(Protocol):
    """How tokens meet weights: `linear`, by which kernels ever."""

    def __call__(
        self, x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None = None
    ) -> jax.Array:
        """`linear`, but for `backend`."""
        ...


# Traced and lowered once for all layers.
@functools.partial(jax.jit, static_argnames=("dtype", "backend"))
def linear(
    x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None = None, *, backend: str = "xla"
) -> jax.Array:
    """`x @ weight.T` for the weight as Hugging Face stores it.

    XLA's matrix library for CPUs packs its right operand anew at every call. With few tokens that
    is most of the work when the weights are on the right: weights first take as long, or down to a
    quarter (float32, docs/decisions.md). The compiler would turn the product round again, but for
    the barrier. For GPUs it makes a product of one token one of a matrix and a vector, which has no
    result wider than its operands: it would copy a head, as float32, in every step.

    Args:
      x: [tokens, in].
      weight: [features, in], of the same dtype.
      dtype: of the result; None takes that of x.
      backend: whose kernel, where it has one for such arrays; XLA's product takes all.

    Returns:
      [tokens, features].
    """
    if (product := dispatch.product_of(backend, x, weight)) is not None:
        return product(x, weight).astype(dtype or x.dtype)
    contracted = (((1,), (1,)), ((), ()))

    def tokens_first(x, weight):
        return jax.lax.dot_general(x, weight, contracted, preferred_element_type=dtype)

    def weights_first(x, weight):
        product = jax.lax.dot_general(weight, x, contracted, preferred_element_type=dtype)
        return jax.lax.optimization_barrier(product).T

    def padded(x, weight):
        tokens = jnp.pad(x, ((0, _GPU_TOKENS - x.shape[0]), (0, 0)))
        return tokens_first(tokens, weight)[: x.shape[0]]

    if x.shape[0] > _WEIGHTS_FIRST_TOKENS:
        return tokens_first(x, weight)
    widens = dtype is not None and dtype != weight.dtype
    on_gpu = padded if widens and x.shape[0] < _GPU_TOKENS else tokens_first
    return jax.lax.platform_dependent(
        x, weight, cpu=weights_first, cuda=on_gpu, default=tokens_first
    )


class Linear(nn.Module):
    """`linear` with a weight, and maybe a bias, of its own."""

    features: int
    bias: bool = False
    multiply: Multiply = linear

    @nn.compact
    def __call__(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        weight = self.param(
            "weight", nn.initializers.normal(0.02), (self.features, x.shape[-1]), x.dtype
        )
        y = self.multiply(x, weight, dtype)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), x.dtype)
            y = y + bias.astype(y.dtype)[None]
        return y


def project(
    module: nn.Module,
    name: str,
    sizes: Sequence[int],
    bias: bool,
    multiply: Multiply,
    x: jax.Array,
) -> list[jax.Array]:
    """What a module's projections make of the same tokens, by one product if they are merged.

    Args:
      module: whose parameters they are.
      name: of the merged one, in `merged.MERGED`.
      sizes: features of each.
      bias: whether they have biases.
      multiply: by what.
      x: [tokens, in].
    """
    if module.has_variable("params", name):
        merged = Linear(sum(sizes), bias, multiply, name=name)(x)
        return jnp.split(merged, np.cumsum(sizes)[:-1], axis=-1)
    parts = zip(MERGED[name], sizes, strict=True)
    return [Linear(size, bias, multiply, name=part)(x) for part, size in parts]


@jax.jit
def _apart(q: jax.Array) -> jax.Array:
    """Keeps a TPU's compiler from having the product give heads.

    For that it copies the weights of a scanned layer, head by head: in 70B's step 134 MB a layer.
    """
    return jax.lax.platform_dependent(q, tpu=jax.lax.optimization_barrier, default=lambda q: q)


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis, in float32, and scales.

    Source: Zhang & Sennrich 2019.
    """

    spec: NormSpec

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), x.dtype)
        scale = jnp.expand_dims(scale, range(x.ndim - 1))
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.spec.eps)
        if self.spec.scales_float32:
            scale32 = scale.astype(jnp.float32) + self.spec.offset
            return (scale32 * (x32 * inverse)).astype(x.dtype)
        return scale * (x32 * inverse).astype(x.dtype)


class Attention(nn.Module):
    """Projections, norms and rotation around an `Attend`."""

    spec: AttentionSpec
    norm: NormSpec
    attend: Attend
    multiply: Multiply = linear

    @nn.compact
    def __call__(self, x, table, kv_pages, layer, rows: Rows | None):
        s = self.spec
        sizes = [heads * s.head_dim for heads in (s.num_q_heads, s.num_kv_heads, s.num_kv_heads)]
        q, k, v = project(self, "qkv_proj", sizes, s.qkv_bias, self.multiply, x)
        q = _apart(q)
        if s.qk_norm == "all":
            q = RMSNorm(self.norm, name="q_norm")(q)
            k = RMSNorm(self.norm, name="k_norm")(k)
        q = q.reshape(-1, s.num_q_heads, s.head_dim)
        k = k.reshape(-1, s.num_kv_heads, s.head_dim)
        v = v.reshape(-1, s.num_kv_heads, s.head_dim)
        if s.qk_norm == "head":
            q = RMSNorm(self.norm, name="q_norm")(q)
            k = RMSNorm(self.norm, name="k_norm")(k)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        sinks = None
        if s.sinks:
            sinks = self.param("sinks", nn.initializers.normal(1.0), (s.num_q_heads,), x.dtype)
        out, kv_pages = self.attend(q, k, v, kv_pages, layer, rows, s.variant, sinks)
        out = out.reshape(-1, s.num_q_heads * s.head_dim)
        return Linear(x.shape[-1], s.out_bias, self.multiply, name="o_proj")(out), kv_pages


_ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {"silu": nn.silu, "gelu_tanh": functools.partial(nn.gelu, approximate=True)}
)


def gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """What a gated MLP makes of its two halves. Source: Shazeer 2020."""
    return _ACTIVATIONS[activation](gate) * up


class GatedMlp(nn.Module):
    """`down(activation(gate(x)) * up(x))`."""

    spec: MlpSpec
    multiply: Multiply = linear

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s = self.spec
        sizes = 2 * [s.intermediate_size]
        gate, up = project(self, "gate_up_proj", sizes, s.bias, self.multiply, x)
        hidden = gated(s.activation, gate, up)
        return Linear(x.shape[-1], s.bias, self.multiply, name="down_proj")(hidden)
