# SPDX-License-Identifier: Apache-2.0
"""Tile sizes as data; every row says how it was chosen."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class TpuTiles:
    """Tile sizes of the TPU attention kernel.

    Attributes:
      group_tokens: tokens of keys and values that are fetched and attended to together.
      q_tile: queries of a sequence that are computed together in prefill; a power of two.
    """

    group_tokens: int
    q_tile: int


@dataclasses.dataclass(frozen=True)
class TpuRow:
    """Tiles for the heads of a layer on one generation.

    Attributes:
      tiles: what was chosen.
      decode: bundles a KV token of the decode loop, by group_tokens; "s" where registers spill.
      prefill: bundles a query, KV head and token of the prefill loop, by q_tile; likewise.
    """

    tiles: TpuTiles
    decode: str
    prefill: str


def tpu_tiles(chip: str, *, num_q_heads: int, num_kv_heads: int, head_dim: int) -> TpuTiles:
    """The tiles for a layer: those of its row, or of the row most like it.

    That is one of the same generation, head_dim and query heads a KV head, with the number of KV
    heads closest: a device of a mesh has a share of a layer's heads, and so mostly no row.

    Args:
      chip: generation, as in `pallas_kernels.aot.TARGETS`.
      num_q_heads: query heads.
      num_kv_heads: KV heads.
      head_dim: lanes of a key.
    """
    group = num_q_heads // num_kv_heads
    alike = {
        kv_heads: row.tiles
        for (name, q_heads, kv_heads, dim), row in TPU_ROWS.items()
        if (name, q_heads // kv_heads, dim) == (chip, group, head_dim)
    }
    if alike:
        return alike[min(alike, key=lambda heads: abs(heads - num_kv_heads))]
    # As many queries as give a KV head 256 rows.
    q_tile = 256 // group
    return TpuTiles(256, min(128, max(8, 1 << (max(q_tile, 1).bit_length() - 1))))


# By generation, query heads, KV heads and head_dim: those of SmolLM2, Llama 3.x, Qwen3, Gemma 2 and
# 3, Phi 2 and 3, bfloat16, pages of 16. Made by scripts/kernels/tune_tpu.py, which says what it
# chooses by, with jax 0.10.2 and libtpu 0.0.42.1, November 2026. Nothing here was timed on a TPU.
TPU_ROWS: Mapping[tuple[str, int, int, int], TpuRow] = MappingProxyType(
    {
        ("v4", 4, 1, 256): TpuRow(
            TpuTiles(128, 64),
            "128: 1.91, 256: 1.75, 512: 1.7s",
            "16: 0.191s, 32: 0.123s, 64: 0.0807s",
        ),
        ("v4", 8, 4, 256): TpuRow(
            TpuTiles(256, 128),
            "128: 3.63s, 256: 3.23s, 512: 3.14s",
            "16: 0.0856s, 32: 0.0552s, 64: 0.0339s, 128: 0.0246s",
        ),
        ("v4", 9, 3, 64): TpuRow(
            TpuTiles(256, 64),
            "128: 2.12s, 256: 1.93s, 512: 1.78s",
            "16: 0.0743s, 32: 0.0449s, 64: 0.0307s",
        ),
        ("v4", 16, 8, 128): TpuRow(
            TpuTiles(256, 128),
            "128: 4.04s, 256: 3.51s, 512: 3.37s",
            "16: 0.0693s, 32: 0.0425s, 64: 0.0267s, 128: 0.0191s",
        ),
        ("v4", 16, 8, 256): TpuRow(
            TpuTiles(128, 128),
            "128: 5.58s, 256: 5.3s, 512: 5.14s",
            "16: 0.1s, 32: 0.0656s, 64: 0.0423s, 128: 0.0313s",
        ),
        ("v4", 24, 8, 128): TpuRow(
            TpuTiles(256, 64),
            "128: 4.04s, 256: 3.51s, 512: 3.37s",
            "16: 0.0802s, 32: 0.0475s, 64: 0.0321s",
        ),
        ("v4", 32, 8, 64): TpuRow(
            TpuTiles(256, 64),
            "128: 3.13s, 256: 2.85s, 512: 2.68s",
            "16: 0.0803s, 32: 0.0502s, 64: 0.0368s",
        ),
        ("v4", 32, 8, 128): TpuRow(
            TpuTiles(256, 64),
            "128: 4.04s, 256: 3.51s, 512: 3.37s",
            "16: 0.0851s, 32: 0.0533s, 64: 0.0381s",
        ),
        ("v4", 32, 16, 128): TpuRow(
            TpuTiles(256, 128),
            "128: 6.66s, 256: 5.86s, 512: 5.66s",
            "16: 0.0693s, 32: 0.0425s, 64: 0.0267s, 128: 0.0191s",
        ),
        ("v4", 32, 32, 80): TpuRow(
            TpuTiles(128, 128),
            "128: 15.2s, 256: 13.9s, 512: 13.9s",
            "16: 0.0789, 32: 0.0482s, 64: 0.0292s, 128: 0.0221s",
        ),
        ("v4", 32, 32, 96): TpuRow(
            TpuTiles(128, 128),
            "128: 15.2s, 256: 13.9s, 512: 13.9s",
            "16: 0.0789, 32: 0.0482s, 64: 0.0292s, 128: 0.0221s",
        ),
        ("v4", 40, 8, 128): TpuRow(
            TpuTiles(256, 32),
            "128: 4.04s, 256: 3.51s, 512: 3.37s",
            "16: 0.0903s, 32: 0.0585s",
        ),
        ("v4", 64, 8, 128): TpuRow(
            TpuTiles(256, 32),
            "128: 4.04s, 256: 3.51s, 512: 3.37s",
            "16: 0.107s, 32: 0.0763s",
        ),
        ("v5e", 4, 1, 256): TpuRow(
            TpuTiles(256, 64),
            "128: 1.91, 256: 1.7, 512: 1.66",
            "16: 0.141, 32: 0.0933, 64: 0.0566s",
        ),
        ("v5e", 8, 4, 256): TpuRow(
            TpuTiles(256, 128),
            "128: 3.23, 256: 2.71, 512: 2.51s",
            "16: 0.0798, 32: 0.0482s, 64: 0.0337s, 128: 0.0221s",
        ),
        ("v5e", 9, 3, 64): TpuRow(
            TpuTiles(128, 64),
            "128: 2.01, 256: 1.86, 512: 1.76s",
            "16: 0.084, 32: 0.0563, 64: 0.037s",
        ),
        ("v5e", 16, 8, 128): TpuRow(
            TpuTiles(256, 128),
            "128: 3.42, 256: 2.86, 512: 2.63s",
            "16: 0.063, 32: 0.0437s, 64: 0.0298s, 128: 0.0197s",
        ),
        ("v5e", 16, 8, 256): TpuRow(
            TpuTiles(128, 128),
            "128: 4.43, 256: 3.86s, 512: 3.6s",
            "16: 0.0901, 32: 0.0679, 64: 0.0496s, 128: 0.0352s",
        ),
        ("v5e", 24, 8, 128): TpuRow(
            TpuTiles(256, 64),
            "128: 3.42, 256: 2.86, 512: 2.63s",
            "16: 0.0773, 32: 0.0525s, 64: 0.0345s",
        ),
        ("v5e", 32, 8, 64): TpuRow(
            TpuTiles(256, 64),
            "128: 2.98s, 256: 2.53, 512: 2.53s",
            "16: 0.0853s, 32: 0.0588s, 64: 0.0391s",
        ),
        ("v5e", 32, 8, 128): TpuRow(
            TpuTiles(256, 64),
            "128: 3.42, 256: 2.86, 512: 2.63s",
            "16: 0.0874s, 32: 0.0597s, 64: 0.0394s",
        ),
        ("v5e", 32, 16, 128): TpuRow(
            TpuTiles(128, 128),
            "128: 5.26, 256: 4.25s, 512: 3.96s",
            "16: 0.0786, 32: 0.0509, 64: 0.0332s, 128: 0.0221s",
        ),
        ("v5e", 32, 32, 80): TpuRow(
            TpuTiles(256, 128),
            "128: 10s, 256: 8.52s, 512: 8.53s",
            "16: 0.0629s, 32: 0.0352, 64: 0.0237s, 128: 0.0145s",
        ),
        ("v5e", 32, 32, 96): TpuRow(
            TpuTiles(256, 128),
            "128: 10s, 256: 8.52s, 512: 8.53s",
            "16: 0.0629s, 32: 0.0352, 64: 0.0237s, 128: 0.0145s",
        ),
        ("v5e", 40, 8, 128): TpuRow(
            TpuTiles(256, 32),
            "128: 3.42, 256: 2.86, 512: 2.63s",
            "16: 0.095s, 32: 0.0641s",
        ),
        ("v5e", 64, 8, 128): TpuRow(
            TpuTiles(256, 32),
            "128: 3.42, 256: 2.86, 512: 2.63s",
            "16: 0.119s, 32: 0.0789s",
        ),
        ("v5p", 4, 1, 256): TpuRow(
            TpuTiles(256, 64),
            "128: 1.78, 256: 1.6, 512: 1.54",
            "16: 0.134, 32: 0.089, 64: 0.0557s",
        ),
        ("v5p", 8, 4, 256): TpuRow(
            TpuTiles(256, 128),
            "128: 3.05, 256: 2.62, 512: 2.4s",
            "16: 0.0769, 32: 0.0482s, 64: 0.0334s, 128: 0.0219s",
        ),
        ("v5p", 9, 3, 64): TpuRow(
            TpuTiles(128, 64),
            "128: 1.95, 256: 1.82, 512: 1.73s",
            "16: 0.0808, 32: 0.0549s, 64: 0.0364s",
        ),
        ("v5p", 16, 8, 128): TpuRow(
            TpuTiles(256, 128),
            "128: 3.34, 256: 2.72, 512: 2.52s",
            "16: 0.0598, 32: 0.0429s, 64: 0.0289s, 128: 0.0196s",
        ),
        ("v5p", 16, 8, 256): TpuRow(
            TpuTiles(128, 128),
            "128: 4.3, 256: 3.77s, 512: 3.49s",
            "16: 0.0862, 32: 0.0659, 64: 0.0477s, 128: 0.0344s",
        ),
        ("v5p", 24, 8, 128): TpuRow(
            TpuTiles(256, 64),
            "128: 3.34, 256: 2.72, 512: 2.52s",
            "16: 0.075, 32: 0.0513s, 64: 0.0345s",
        ),
        ("v5p", 32, 8, 64): TpuRow(
            TpuTiles(256, 64),
            "128: 2.88s, 256: 2.46, 512: 2.41s",
            "16: 0.0822s, 32: 0.0574s, 64: 0.0391s",
        ),
        ("v5p", 32, 8, 128): TpuRow(
            TpuTiles(256, 64),
            "128: 3.34, 256: 2.72, 512: 2.52s",
            "16: 0.0858s, 32: 0.0578s, 64: 0.0392s",
        ),
        ("v5p", 32, 16, 128): TpuRow(
            TpuTiles(128, 128),
            "128: 5.23, 256: 4.12s, 512: 3.84s",
            "16: 0.0747, 32: 0.0497, 64: 0.0333s, 128: 0.0215s",
        ),
        ("v5p", 32, 32, 80): TpuRow(
            TpuTiles(256, 128),
            "128: 10s, 256: 8.66s, 512: 8.44s",
            "16: 0.0601, 32: 0.0344, 64: 0.0227s, 128: 0.0142s",
        ),
        ("v5p", 32, 32, 96): TpuRow(
            TpuTiles(256, 128),
            "128: 10s, 256: 8.66s, 512: 8.44s",
            "16: 0.0601, 32: 0.0344, 64: 0.0227s, 128: 0.0142s",
        ),
        ("v5p", 40, 8, 128): TpuRow(
            TpuTiles(256, 32),
            "128: 3.34, 256: 2.72, 512: 2.52s",
            "16: 0.0933s, 32: 0.0641s",
        ),
        ("v5p", 64, 8, 128): TpuRow(
            TpuTiles(256, 32),
            "128: 3.34, 256: 2.72, 512: 2.52s",
            "16: 0.116s, 32: 0.0783s",
        ),
        ("v6e", 4, 1, 256): TpuRow(
            TpuTiles(256, 64),
            "128: 1.55, 256: 1.4, 512: 1.31",
            "16: 0.117, 32: 0.0754, 64: 0.0504s",
        ),
        ("v6e", 8, 4, 256): TpuRow(
            TpuTiles(256, 128),
            "128: 2.63, 256: 2.23, 512: 2.06",
            "16: 0.0598, 32: 0.0402, 64: 0.0277s, 128: 0.019s",
        ),
        ("v6e", 9, 3, 64): TpuRow(
            TpuTiles(512, 64),
            "128: 2.27, 256: 1.68s, 512: 1.59",
            "16: 0.053s, 32: 0.0318s, 64: 0.022s",
        ),
        ("v6e", 16, 8, 128): TpuRow(
            TpuTiles(256, 128),
            "128: 3.41, 256: 2.34, 512: 2.33s",
            "16: 0.0507, 32: 0.0358, 64: 0.0251s, 128: 0.0188s",
        ),
        ("v6e", 16, 8, 256): TpuRow(
            TpuTiles(256, 128),
            "128: 3.84, 256: 3.24, 512: 2.91s",
            "16: 0.0598, 32: 0.0402, 64: 0.0277s, 128: 0.019s",
        ),
        ("v6e", 24, 8, 128): TpuRow(
            TpuTiles(256, 64),
            "128: 3.41, 256: 2.34, 512: 2.33s",
            "16: 0.0648, 32: 0.0446s, 64: 0.0324s",
        ),
        ("v6e", 32, 8, 64): TpuRow(
            TpuTiles(256, 64),
            "128: 3.29s, 256: 2.29, 512: 2.29s",
            "16: 0.0736, 32: 0.0503s, 64: 0.0372s",
        ),
        ("v6e", 32, 8, 128): TpuRow(
            TpuTiles(256, 64),
            "128: 3.41, 256: 2.34, 512: 2.33s",
            "16: 0.0717, 32: 0.0502s, 64: 0.0375s",
        ),
        ("v6e", 32, 16, 128): TpuRow(
            TpuTiles(128, 128),
            "128: 6.02, 256: 3.82s, 512: 3.54s",
            "16: 0.0671, 32: 0.0461, 64: 0.0322s, 128: 0.0241s",
        ),
        ("v6e", 32, 32, 80): TpuRow(
            TpuTiles(256, 128),
            "128: 11.8s, 256: 7.27s, 512: 6.95s",
            "16: 0.0485, 32: 0.0267, 64: 0.0191s, 128: 0.0126s",
        ),
        ("v6e", 32, 32, 96): TpuRow(
            TpuTiles(256, 128),
            "128: 11.8s, 256: 7.27s, 512: 6.95s",
            "16: 0.0485, 32: 0.0267, 64: 0.0191s, 128: 0.0126s",
        ),
        ("v6e", 40, 8, 128): TpuRow(
            TpuTiles(256, 32),
            "128: 3.41, 256: 2.34, 512: 2.33s",
            "16: 0.0802s, 32: 0.0579s",
        ),
        ("v6e", 64, 8, 128): TpuRow(
            TpuTiles(256, 32),
            "128: 3.41, 256: 2.34, 512: 2.33s",
            "16: 0.1s, 32: 0.075s",
        ),
        ("7x", 4, 1, 256): TpuRow(
            TpuTiles(256, 64),
            "128: 1.24, 256: 1.11, 512: 1.02",
            "16: 0.094, 32: 0.0626, 64: 0.0438s",
        ),
        ("7x", 8, 4, 256): TpuRow(
            TpuTiles(256, 128),
            "128: 2.35, 256: 1.94, 512: 1.78",
            "16: 0.0505, 32: 0.0348s, 64: 0.0244s, 128: 0.0174s",
        ),
        ("7x", 9, 3, 64): TpuRow(
            TpuTiles(128, 64),
            "128: 2.33, 256: 1.78s, 512: 1.67s",
            "16: 0.0942, 32: 0.0559, 64: 0.0408s",
        ),
        ("7x", 16, 8, 128): TpuRow(
            TpuTiles(256, 128),
            "128: 3.2, 256: 2.12, 512: 2.06s",
            "16: 0.0408, 32: 0.0297s, 64: 0.0217s, 128: 0.0168s",
        ),
        ("7x", 16, 8, 256): TpuRow(
            TpuTiles(256, 128),
            "128: 3.62, 256: 2.93, 512: 2.62s",
            "16: 0.0505, 32: 0.0348s, 64: 0.0244s, 128: 0.0174s",
        ),
        ("7x", 24, 8, 128): TpuRow(
            TpuTiles(256, 64),
            "128: 3.2, 256: 2.12, 512: 2.06s",
            "16: 0.0527, 32: 0.037s, 64: 0.0288s",
        ),
        ("7x", 32, 8, 64): TpuRow(
            TpuTiles(256, 64),
            "128: 3.47s, 256: 2.49s, 512: 2.44s",
            "16: 0.0729, 32: 0.0493s, 64: 0.0366s",
        ),
        ("7x", 32, 8, 128): TpuRow(
            TpuTiles(256, 64),
            "128: 3.2, 256: 2.12, 512: 2.06s",
            "16: 0.0593s, 32: 0.0435s, 64: 0.0336s",
        ),
        ("7x", 32, 16, 128): TpuRow(
            TpuTiles(128, 128),
            "128: 5.96, 256: 3.52s, 512: 3.29s",
            "16: 0.0554, 32: 0.0389, 64: 0.0283s, 128: 0.0229s",
        ),
        ("7x", 32, 32, 80): TpuRow(
            TpuTiles(512, 128),
            "128: 11.6s, 256: 7.62s, 512: 6.79s",
            "16: 0.0394s, 32: 0.0215s, 64: 0.0127s, 128: 0.00806s",
        ),
        ("7x", 32, 32, 96): TpuRow(
            TpuTiles(512, 128),
            "128: 11.6s, 256: 7.62s, 512: 6.79s",
            "16: 0.0394s, 32: 0.0215s, 64: 0.0127s, 128: 0.00806s",
        ),
        ("7x", 40, 8, 128): TpuRow(
            TpuTiles(256, 32),
            "128: 3.2, 256: 2.12, 512: 2.06s",
            "16: 0.067s, 32: 0.0503s",
        ),
        ("7x", 64, 8, 128): TpuRow(
            TpuTiles(256, 32),
            "128: 3.2, 256: 2.12, 512: 2.06s",
            "16: 0.0869s, 32: 0.0673s",
        ),
    }
)
