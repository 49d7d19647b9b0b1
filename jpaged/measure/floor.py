# SPDX-License-Identifier: Apache-2.0
"""What a step cannot be faster than: bytes over the copy rate, operations over the product rate."""

import dataclasses

import numpy as np

from jpaged.models.config import ExpertsSpec, ModelConfig
from jpaged.models.decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """The floor of a step.

    Attributes:
      weight_bytes: of the weights that it multiplies by, each once; of experts as many as its
        tokens can choose at most.
      page_bytes: of the pages that hold its sequences, each once.
      flops: multiplications and additions with weights; those of attention are not counted.
      copy_bytes_per_s: of a large copy, read and written.
      product_flops_per_s: of a large matrix product.
    """

    weight_bytes: float
    page_bytes: float
    flops: float
    copy_bytes_per_s: float
    product_flops_per_s: float

    @property
    def bytes_s(self) -> float:
        """Seconds that reading weights and pages takes."""
        return (self.weight_bytes + self.page_bytes) / self.copy_bytes_per_s

    @property
    def flops_s(self) -> float:
        """Seconds that the products take."""
        return self.flops / self.product_flops_per_s

    @property
    def s(self) -> float:
        """Seconds: the larger of both, as they can be done at once."""
        return max(self.bytes_s, self.flops_s)


def floor_of(
    config: ModelConfig,
    dtype: np.dtype,
    *,
    tokens: float,
    samples: float,
    page_bytes: float,
    copy_bytes_per_s: float,
    product_flops_per_s: float,
) -> Floor:
    """The floor of a step.

    Args:
      config: the model.
      dtype: of its weights.
      tokens: that the step computes.
      samples: tokens after which it computes logits.
      page_bytes: bytes of the pages in use.
      copy_bytes_per_s: as measured on the device; see `rates`.
      product_flops_per_s: likewise.
    """
    head = config.vocab_size * config.hidden_size
    all_weights = Decoder(config).num_params
    # Without a head of its own, the embedding is read as one; else only rows of it.
    in_layers = all_weights - head * (1 if config.tie_word_embeddings else 2)
    experts, chosen = _expert_weights(config)
    unused = experts - min(experts, chosen * max(tokens, 1))
    return Floor(
        weight_bytes=(in_layers - unused + head) * np.dtype(dtype).itemsize,
        page_bytes=page_bytes,
        flops=2 * ((in_layers - experts + chosen) * tokens + head * samples),
        copy_bytes_per_s=copy_bytes_per_s,
        product_flops_per_s=product_flops_per_s,
    )


def _expert_weights(config: ModelConfig) -> tuple[int, int]:
    """Weights of all experts, and of those that one token goes through."""
    every = chosen = 0
    for index in range(config.num_layers):
        mlp = config.layer(index).mlp
        if isinstance(mlp, ExpertsSpec):
            one = 3 * mlp.intermediate_size * config.hidden_size
            every += mlp.num_experts * one
            chosen += mlp.num_experts_per_token * one
    return every, chosen
