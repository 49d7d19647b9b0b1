# SPDX-License-Identifier: Apache-2.0
"""The list of work that the attention kernel walks over, made of the step's index arrays.

The token axis is cut into blocks. A row's queries in a block are a tile, and the pages that a tile
sees are cut into spans: a span's page ids are those that the kernel has in scalar memory at once.
Spans of a tile follow each other and carry its sums, tiles of a block follow each other and share
its output.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jpaged.pallas_kernels.variant import AttentionVariant
from jpaged.pallas_kernels.worklist import expand

FIELDS = (
    "block",  # of the token axis
    "tile",
    "part",  # of the page table, which has the span's page ids
    "first_place",  # of the tile's first query in its block
    "first_position",  # of that query in its sequence
    "end_position",  # one past that of the tile's last query
    "first_page",  # of the sequence, that the span covers
    "end_page",
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Queries that lie in one block and belong to one row; of which `count` are live.

    Attributes:
      row: i32[max_tiles].
      block: i32[max_tiles].
      first_place, first_position, end_position: i32[max_tiles], as in `FIELDS`.
      count: i32[].
    """

    row: jax.Array
    block: jax.Array
    first_place: jax.Array
    first_position: jax.Array
    end_position: jax.Array
    count: jax.Array


def make_tiles(
    kv_lens: jax.Array,
    first_tokens: jax.Array,
    q_lens: jax.Array,
    *,
    q_tile: int,
    num_blocks: int,
    max_tiles: int,
) -> Tiles:
    """Cuts each row's queries where blocks of the token axis meet.

    Args:
      kv_lens: i32[rows].
      first_tokens: i32[rows], where each row's queries start on the token axis.
      q_lens: i32[rows]; 0 leaves a row out.
      q_tile: tokens of a block.
      num_blocks: blocks of the token axis.
      max_tiles: as many tiles as there can be.

    Returns:
      The tiles, in the order of rows. What they hold past `count` is arbitrary.
    """
    first_block = first_tokens // q_tile
    end_tokens = first_tokens + q_lens
    blocks = jnp.where(q_lens > 0, (end_tokens - 1) // q_tile + 1 - first_block, 0)
    row, offset, count = expand(blocks, max_tiles)
    block = first_block[row] + offset
    first = jnp.maximum(first_tokens[row], block * q_tile)
    end = jnp.minimum(end_tokens[row], (block + 1) * q_tile)
    to_position = kv_lens[row] - end_tokens[row]
    return Tiles(
        row=row,
        # In range also where no tile is live: the first span is always fetched.
        block=jnp.clip(block, 0, num_blocks - 1),
        first_place=first - block * q_tile,
        first_position=first + to_position,
        end_position=end + to_position,
        count=count,
    )


def make_spans(
    tiles: Tiles,
    *,
    page_size: int,
    table_part: int,
    num_rows: int,
    num_parts: int,
    variant: AttentionVariant,
) -> tuple[jax.Array, jax.Array]:
    """Cuts the pages that each tile sees where parts of the page table meet.

    Args:
      tiles: what to cut.
      page_size: tokens a page holds.
      table_part: pages of a part.
      num_rows: rows of the table.
      num_parts: parts of a row of the table.
      variant: of which the window matters.

    Returns:
      i32[len(FIELDS), max_tiles * num_parts + 1] and how many of them are live, i32[].
    """
    max_tiles = tiles.row.shape[0]
    lowest = variant.lowest_key(tiles.first_position)
    first_page, end_page = lowest // page_size, (tiles.end_position + page_size - 1) // page_size
    first_part = first_page // table_part
    parts = jnp.where(
        jnp.arange(max_tiles) < tiles.count, (end_page - 1) // table_part + 1 - first_part, 0
    )
    tile, offset, count = expand(parts, max_tiles * num_parts)
    part = first_part[tile] + offset
    fields = {
        "block": tiles.block[tile],
        "tile": tile,
        "part": jnp.clip(tiles.row[tile] * num_parts + part, 0, num_rows * num_parts - 1),
        "first_place": tiles.first_place[tile],
        "first_position": tiles.first_position[tile],
        "end_position": tiles.end_position[tile],
        "first_page": jnp.maximum(first_page[tile], part * table_part),
        "end_page": jnp.minimum(end_page[tile], (part + 1) * table_part),
    }
    # One more column, so that the span after the last can be read.
    return jnp.pad(jnp.stack([fields[name] for name in FIELDS]), ((0, 0), (0, 1))), count
