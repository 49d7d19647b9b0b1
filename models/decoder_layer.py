# SPDX-License-Identifier: Apache-2.0
"""One layer of a decoder, made of what its spec says."""

import flax.linen as nn
import jax

from jpaged.models.config import ExpertsSpec, LayerSpec, ModelConfig
from jpaged.models.experts import Experts
from jpaged.models.layers import Attend, Attention, GatedMlp, Multiply, RMSNorm, linear
from jpaged.pallas_kernels.rows import Rows

# Cosines and sines of the step's tokens, for each of `ModelConfig.ropes`.
Tables = tuple[tuple[jax.Array, jax.Array], ...]


class DecoderLayer(nn.Module):
    """Attention and MLP, each normed and added to the residual stream.

    Called on the carry `(x, kv_pages)` so that the layers can be unrolled or scanned over.
    """

    spec: LayerSpec
    config: ModelConfig
    attend: Attend
    multiply: Multiply = linear

    @nn.compact
    def __call__(self, carry, layer, tables: Tables, rows: Rows | None):
        rope = self.spec.attention.rope
        table = None if rope is None else tables[self.config.ropes.index(rope)]
        x, kv_pages = carry
        before, after = (self.spec.norms in (where, "around") for where in ("before", "after"))

        def norm(x: jax.Array, name: str, wanted: bool) -> jax.Array:
            return RMSNorm(self.config.norm, name=name)(x) if wanted else x

        attention = Attention(
            self.spec.attention, self.config.norm, self.attend, self.multiply, name="attention"
        )
        out, kv_pages = attention(norm(x, "attention_norm", before), table, kv_pages, layer, rows)
        x = x + norm(out, "attention_out_norm", after)
        spec, normed = self.spec.mlp, norm(x, "mlp_norm", before)
        if isinstance(spec, ExpertsSpec):
            out = Experts(spec, name="mlp")(normed)
        else:
            out = GatedMlp(spec, self.multiply, name="mlp")(normed)
        return (x + norm(out, "mlp_out_norm", after), kv_pages), None


class LayerPattern(nn.Module):
    """The layers of a pattern, one after the other: what is scanned over.

    Attributes:
      config: whose pattern.
      attend, multiply: as in `Attention`.
    """

    config: ModelConfig
    attend: Attend
    multiply: Multiply = linear

    @nn.compact
    def __call__(self, carry, repetition, tables: Tables, rows: Rows | None):
        pattern = self.config.pattern
        for index, spec in enumerate(pattern):
            layer = DecoderLayer(spec, self.config, self.attend, self.multiply, name=str(index))
            carry, _ = layer(carry, repetition * len(pattern) + index, tables, rows)
        return carry, None
