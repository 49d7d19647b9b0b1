# SPDX-License-Identifier: Apache-2.0
"""A decoder as data: what each layer computes, independent of where its description came from."""

import dataclasses
import math
from collections.abc import Sequence

from jpaged.models.json_fields import ModelConfigError
from jpaged.models.rope import Rope, RopeScaling
from jpaged.pallas_kernels.variant import AttentionVariant

ACTIVATIONS = ("silu", "gelu_tanh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """A layer's attention.

    Attributes:
      num_q_heads: query heads.
      num_kv_heads: key-value heads; divides `num_q_heads`.
      head_dim: width of one head.
      rope: how queries and keys are turned; None leaves them.
      variant: scale, window and soft cap.
      qk_norm: "head" norms queries and keys a head, "all" their heads together, before they are
        turned; None does not.
      qkv_bias: whether the projections to queries, keys and values add one.
      out_bias: likewise the one back.
      sinks: whether a learned logit a head takes part in the softmax.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    variant: AttentionVariant = dataclasses.field(default_factory=AttentionVariant)
    qk_norm: str | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False

    def __post_init__(self):
        _check_counts(self, "num_q_heads", "num_kv_heads", "head_dim")
        if self.num_q_heads % self.num_kv_heads:
            raise ModelConfigError(
                f"num_q_heads={self.num_q_heads} must be a multiple of num_kv_heads="
                f"{self.num_kv_heads}: every KV head serves the same number of query heads"
            )
        if self.rope is not None and self.rope.dim > self.head_dim:
            raise ModelConfigError(
                f"{self.rope.dim} rotary lanes are more than head_dim={self.head_dim}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpSpec:
    """A gated MLP: `down(activation(gate(x)) * up(x))`.

    Attributes:
      intermediate_size: width of gate and up.
      activation: of `ACTIVATIONS`.
      bias: whether the three add one.
    """

    intermediate_size: int
    activation: str = "silu"
    bias: bool = False

    def __post_init__(self):
        _check_counts(self, "intermediate_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """A mixture of experts, each a gated MLP; a router chooses some for each token.

    Attributes:
      num_experts: how many.
      num_experts_per_token: how many of them a token goes through, those with the largest logits.
      intermediate_size: width of one.
      weights: what their outputs are multiplied by. "softmax" of all logits; "renormalized" is that
        divided by the sum over the chosen; "softmax_of_chosen" of theirs alone, which is the same
        but for rounding, and how transformers computes it.
      activation: of `ACTIVATIONS`, or "swiglu_oai": `clip(gate) * sigmoid(1.702 * clip(gate)) *
        (clip(up) + 1)`, clipped at `limit`.
      limit: of "swiglu_oai".
      bias: whether router and experts add one.
    """

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    weights: str = "softmax"
    activation: str = "silu"
    limit: float = math.inf
    bias: bool = False

    def __post_init__(self):
        _check_counts(self, "num_experts", "num_experts_per_token", "intermediate_size")
        if self.num_experts_per_token > self.num_experts:
            raise ModelConfigError(
                f"num_experts_per_token={self.num_experts_per_token} must be at most num_experts="
                f"{self.num_experts}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer.

    Attributes:
      attention: its attention.
      mlp: what follows.
      norms: where the residual stream is normed: "before" each of the two, "after" each, on what it
        adds, or "around", both.
    """

    attention: AttentionSpec
    mlp: MlpSpec | ExpertsSpec
    norms: str = "before"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormSpec:
    """A root mean square norm.

    Attributes:
      eps: added to the mean square.
      offset: added to the weights, which a family may store less 1.
      scales_float32: whether the weights are multiplied before the result is rounded, not after.
    """

    eps: float
    offset: float = 0.0
    scales_float32: bool = False

    def __post_init__(self):
        if not 0 <= self.eps < math.inf:
            raise ModelConfigError(f"rms_norm_eps={self.eps} must be finite and at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything `models.decoder` needs to know about a decoder.

    Attributes:
      family: architecture name as Hugging Face writes it, a key of `models.families.FAMILIES`;
        nothing is computed by it.
      vocab_size: rows of the embedding table.
      hidden_size: width of the residual stream.
      num_layers: layers.
      pattern: what the layers are: layer i is `pattern[i % len(pattern)]`.
      norm: of all norms.
      embedding_scale: multiplies the embedding, rounded to its dtype; None does not.
      logit_soft_cap: logits become `cap * tanh(logit / cap)`; None leaves them.
      tie_word_embeddings: whether the output head is the embedding table.
      max_position_embeddings: longest context, in tokens, that the model was made for.
      bos_token_id: first token of a document, or None.
      eos_token_ids: tokens that end a generation; may be empty.
      packing: how a checkpoint of Hugging Face's stores some weights, "mxfp4"; None as they are.
      source: the config.json that this was read from, as text; None where it was made otherwise.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    pattern: tuple[LayerSpec, ...]
    norm: NormSpec
    embedding_scale: float | None = None
    logit_soft_cap: float | None = None
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    packing: str | None = dataclasses.field(default=None, compare=False)
    source: str | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self):
        _check_counts(self, "vocab_size", "hidden_size", "num_layers", "max_position_embeddings")
        shapes = {(a.num_kv_heads, a.head_dim) for a in self.attentions}
        if len(shapes) != 1:
            raise ModelConfigError(
                f"layers with {sorted(shapes)} KV heads and lanes differ: the pages of one pool "
                "must have one shape"
            )

    def layer(self, index: int) -> LayerSpec:
        """What one layer computes."""
        return self.pattern[index % len(self.pattern)]

    @property
    def attentions(self) -> Sequence[AttentionSpec]:
        """Of the layers of the pattern."""
        return [layer.attention for layer in self.pattern]

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """How layers turn queries and keys, each way once."""
        return tuple(dict.fromkeys(a.rope for a in self.attentions if a.rope is not None))

    @property
    def num_q_heads(self) -> int:
        """Query heads of a layer."""
        return self.pattern[0].attention.num_q_heads

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads of a layer."""
        return self.pattern[0].attention.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.pattern[0].attention.head_dim

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of one token's keys and values over all layers, `itemsize` bytes a number."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


def dense_config(
    *,
    intermediate_size: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rms_norm_eps: float,
    rope_theta: float,
    rope_scaling: RopeScaling | None = None,
    qk_norm: bool = False,
    **shared,
) -> ModelConfig:
    """A decoder whose layers are all Llama's, or Qwen3's.

    Args:
      intermediate_size: width of the gated MLP.
      num_q_heads: query heads.
      num_kv_heads: key-value heads.
      head_dim: width of one head.
      rms_norm_eps: of every norm.
      rope_theta: base of the rotary frequencies, all lanes.
      rope_scaling: None for plain rotary embeddings.
      qk_norm: whether queries and keys are normed per head before they are turned (Qwen3).
      **shared: the attributes of `ModelConfig` that are left.
    """
    layer = LayerSpec(
        attention=AttentionSpec(
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=Rope(theta=rope_theta, dim=head_dim, scaling=rope_scaling),
            qk_norm="head" if qk_norm else None,
        ),
        mlp=MlpSpec(intermediate_size=intermediate_size),
    )
    return ModelConfig(pattern=(layer,), norm=NormSpec(eps=rms_norm_eps), **shared)


def _check_counts(spec: object, *names: str) -> None:
    for name in names:
        if getattr(spec, name) < 1:
            raise ModelConfigError(f"{name}={getattr(spec, name)} must be at least 1")
