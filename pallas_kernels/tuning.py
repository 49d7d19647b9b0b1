# SPDX-License-Identifier: Apache-2.0
"""Tile sizes as data; every row says how it was chosen."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TpuTiles:
    """Tile sizes of the TPU attention kernel.

    Attributes:
      group_tokens: tokens of keys and values that are fetched and attended to together.
      q_tile: queries of a sequence that are computed together in prefill.
    """

    group_tokens: int
    q_tile: int


def tpu_tiles(chip: str, *, num_q_heads: int, num_kv_heads: int, head_dim: int) -> TpuTiles:
    """Tiles for a chip and the heads of a model."""
    del chip, head_dim
    group = num_q_heads // num_kv_heads
    return TpuTiles(256, max(8, 1 << (max(1, 128 // group).bit_length() - 1)))
