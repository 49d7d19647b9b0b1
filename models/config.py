# SPDX-License-Identifier: Apache-2.0
"""The shape of a decoder, independent of where its description came from."""

import dataclasses
import math

from jpaged.models.json_fields import ModelConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was first trained on.

    Attributes:
      kind: "linear" divides every frequency by `factor`; "llama3" divides the long wavelengths only
        and blends in between.
      factor: the stretch, >= 1.
      low_freq_factor: llama3 only; wavelengths above `original_max_position / low_freq_factor`
        tokens are stretched fully.
      high_freq_factor: llama3 only; wavelengths below `original_max_position / high_freq_factor`
        tokens are left alone.
      original_max_position: llama3 only; the context, in tokens, before stretching.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ModelConfigError(f"rope kind={self.kind!r} must be 'linear' or 'llama3'")
        if not 1 <= self.factor < math.inf:
            raise ModelConfigError(f"rope factor={self.factor} must be finite and at least 1")
        if self.original_max_position < 1:
            raise ModelConfigError(
                f"rope original_max_position={self.original_max_position} must be at least 1"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ModelConfigError(
                f"rope low_freq_factor={self.low_freq_factor} must be above 0 and below "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything `models.decoder` needs to know about a dense decoder.

    Attributes:
      family: architecture name as Hugging Face writes it, a key of `models.families.FAMILIES`.
      vocab_size: rows of the embedding table.
      hidden_size: width of the residual stream.
      intermediate_size: width of the gated MLP.
      num_layers: decoder layers.
      num_q_heads: query heads.
      num_kv_heads: key-value heads; divides `num_q_heads`.
      head_dim: width of one head; need not be hidden_size / num_q_heads.
      rms_norm_eps: added to the mean square in every norm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None for plain rotary embeddings.
      qk_norm: whether queries and keys are normed per head before rotation (Qwen3).
      tie_word_embeddings: whether the output head is the embedding table.
      max_position_embeddings: longest context, in tokens, that the model was made for.
      bos_token_id: first token of a document, or None.
      eos_token_ids: tokens that end a generation; may be empty.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_q_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ModelConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_q_heads % self.num_kv_heads:
            raise ModelConfigError(
                f"num_q_heads={self.num_q_heads} must be a multiple of num_kv_heads="
                f"{self.num_kv_heads}: every KV head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ModelConfigError(
                f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs of lanes"
            )
        if not 0 < self.rope_theta < math.inf:
            raise ModelConfigError(f"rope_theta={self.rope_theta} must be finite and above 0")
        if not 0 <= self.rms_norm_eps < math.inf:
            raise ModelConfigError(
                f"rms_norm_eps={self.rms_norm_eps} must be finite and at least 0"
            )

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of one token's keys and values over all layers, `itemsize` bytes a number."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize
