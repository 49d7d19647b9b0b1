# SPDX-License-Identifier: Apache-2.0
"""How attention is laid out for thread blocks: tiles of queries, splits of keys, and their merging.

Query heads that share a KV head are laid side by side, head after head of a token and token after
token of the step: f[num_kv_heads, query_rows, head_dim], where query row `token * group + head` is
one query. A tile is a run of query rows of one sequence, and meets the sequence's keys in blocks of
`block_tokens`. These are cut into splits, which thread blocks of their own go through (flash
decoding); what each makes of its share is merged at the end. Where a tile's keys are cut depends on
its own sequence and on the shapes of the call, so that a result depends on no other sequence.

Source: Dao et al. 2023, "Flash-Decoding for long-context inference".
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.pallas_kernels.gpu.chip import Chip
from jpaged.pallas_kernels.reference import token_rows
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant
from jpaged.pallas_kernels.worklist import expand

FIELDS = (
    "seq",  # row of the page table
    "first",  # query row where the tile's box of `tile_rows` query rows starts
    "own_start",  # of the box's query rows, those that are the tile's own: [own_start, own_end)
    "own_end",
    "to_position",  # position of a token in its sequence less its place on the token axis
    "end_position",  # one past that of the tile's last query
    "first_block",  # of keys that any of the tile's queries sees
    "end_block",
    "split_blocks",  # blocks of a split
)
# What a split gives beside its results: the logarithm of its sum of weights, in each such lane.
# They are so many that each query row of results starts at a multiple of 16 bytes.
LSE_LANES = 8
# Thread blocks that fill a multiprocessor; it may have room for more.
_BLOCKS_PER_SM = 2
# In decode splitting aims at so many turns of all multiprocessors: more than one, as sequences are
# not equally long, and few, as what splits give must be merged.
_MIN_TURNS, _MAX_TURNS = 1.5, 4
# The share of thread blocks' places that the last turn must not leave empty, of all turns.
_FULL_TURNS = 0.9
# Blocks of keys that make a split worth a thread block of its own.
_MIN_SPLIT_BLOCKS = 4
_TINY = np.finfo(np.float32).tiny
# The logarithm of a sum of weights that has none: finite, so that two of them subtract to 0.
_NOTHING = -1e30
# Of more, the time to compile what joins them one by one grows to minutes.
_FEW_SPLITS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """The sizes of one attention kernel.

    Attributes:
      num_q_heads, num_kv_heads, head_dim, page_size, kv_dim: as in `paged_attention`.
      dtype: of the queries; what the tensor cores multiply.
      kv_dtype: of the pool.
      tile_rows: query rows of a tile; a multiple of 16, or `group` where a token is a tile.
      block_tokens: tokens that are fetched and attended to together.
      query_rows: query rows of the step, padded to hold a tile.
      max_tiles: tiles at most.
      num_splits: splits of a tile's keys at most.
      has_sinks: whether sinks are merged with what the splits give.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    kv_dim: int
    dtype: np.dtype
    kv_dtype: np.dtype
    tile_rows: int
    block_tokens: int
    query_rows: int
    max_tiles: int
    num_splits: int
    has_sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile, whose queries of one KV head fill `tile_rows` or nearly so."""
        return self.tile_rows // self.group

    @property
    def gives_lse(self) -> bool:
        """Whether a kernel gives the logarithms that `merge_splits` needs, and float32 results."""
        return self.num_splits > 1 or self.has_sinks

    @property
    def out_lanes(self) -> int:
        """Lanes of a query row of results."""
        return self.head_dim + (LSE_LANES if self.gives_lse else 0)

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        """What a kernel gives: [num_splits, num_kv_heads, query_rows, out_lanes].

        float32 with `LSE_LANES` where there is something to merge, finished results otherwise.
        """
        dtype = jnp.float32 if self.gives_lse else self.dtype
        shape = (self.num_splits, self.num_kv_heads, self.query_rows, self.out_lanes)
        return jax.ShapeDtypeStruct(shape, dtype)


def plan_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    rows: Rows,
    *,
    tile_rows: int,
    block_tokens: int,
    chip: Chip,
) -> AttentionPlan:
    """Works out the sizes of a call from the two that a lowering chooses.

    Args:
      q: as in `paged_attention`; only its shape and dtype matter, as those of the others.
      kv_pages: likewise.
      rows: likewise.
      tile_rows: see `AttentionPlan`.
      block_tokens: likewise.
      chip: what to fill.

    Raises:
      ValueError: if a KV head has more query heads than `tile_rows`.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, page_size, kv_dim = kv_pages.shape[2:]
    group = num_q_heads // num_kv_heads
    if group > tile_rows:
        raise ValueError(
            f"backend 'gpu' takes up to {tile_rows} query heads a KV head, not {num_q_heads} for "
            f"{num_kv_heads}"
        )
    tile_tokens = tile_rows // group
    if rows.is_decode(num_tokens):
        max_tiles = num_tokens
        wanted = _decode_splits(max_tiles * num_kv_heads, _BLOCKS_PER_SM * chip.num_sms)
    else:
        # As many as there is room for, and no more: what splits of many queries give is large.
        max_tiles = min(num_tokens, -(-num_tokens // tile_tokens) + rows.max_num_seqs)
        wanted = _BLOCKS_PER_SM * chip.num_sms // (max_tiles * num_kv_heads)
    max_blocks = -(-rows.pages_per_seq * page_size // block_tokens)
    return AttentionPlan(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        kv_dim=kv_dim,
        dtype=jnp.dtype(q.dtype),
        kv_dtype=jnp.dtype(kv_pages.dtype),
        tile_rows=tile_rows,
        block_tokens=block_tokens,
        query_rows=max(num_tokens * group, tile_rows),
        max_tiles=max_tiles,
        num_splits=max(1, min(wanted, max_blocks // _MIN_SPLIT_BLOCKS)),
    )


def _decode_splits(num_units: int, num_places: int) -> int:
    """Into how many thread blocks to split each unit of work, so that turns come out even.

    Args:
      num_units: tiles times KV heads.
      num_places: thread blocks that run at once.
    """
    least = max(1, math.ceil(_MIN_TURNS * num_places / num_units))
    most = max(least, math.ceil(_MAX_TURNS * num_places / num_units))

    def fullness(splits: int) -> float:
        turns = splits * num_units / num_places
        return turns / math.ceil(turns)

    full = (splits for splits in range(least, most + 1) if fullness(splits) >= _FULL_TURNS)
    return next(full, max(range(least, most + 1), key=fullness))


def to_query_rows(q: jax.Array, plan: AttentionPlan) -> jax.Array:
    """[num_kv_heads, query_rows, head_dim] of [num_tokens, num_q_heads, head_dim]."""
    q = q.reshape(q.shape[0], plan.num_kv_heads, plan.group, plan.head_dim).swapaxes(0, 1)
    q = q.reshape(plan.num_kv_heads, -1, plan.head_dim)
    return jnp.pad(q, ((0, 0), (0, plan.query_rows - q.shape[1]), (0, 0)))


def make_tiles(
    rows: Rows, num_tokens: int, *, plan: AttentionPlan, variant: AttentionVariant
) -> tuple[jax.Array, jax.Array]:
    """Cuts each sequence's queries into tiles, from its first one on.

    Args:
      rows: the step's.
      num_tokens: length of the token axis.
      plan: sizes.
      variant: of which the window matters.

    Returns:
      i32[max_tiles, len(FIELDS)], where those without a tile have no blocks, and how many splits
      the keys of each token's tile have, i32[num_tokens]; 0 for padding tokens.
    """
    cu_q_lens = rows.cu_q_lens
    tiles = (rows.q_lens() + plan.tile_tokens - 1) // plan.tile_tokens
    seq, place, count = expand(tiles, plan.max_tiles)
    start = cu_q_lens[seq] + place * plan.tile_tokens
    end = jnp.minimum(start + plan.tile_tokens, cu_q_lens[seq + 1])
    to_position = rows.kv_lens[seq] - cu_q_lens[seq + 1]
    end_position = end + to_position
    lowest = variant.lowest_key(start + to_position)
    # Padding rows hold anything: no block must come of them.
    live = jnp.arange(plan.max_tiles) < count
    first_block = jnp.where(live, lowest // plan.block_tokens, 0)
    end_block = (end_position + plan.block_tokens - 1) // plan.block_tokens
    end_block = jnp.where(live, end_block, 0)
    split_blocks = (end_block - first_block + plan.num_splits - 1) // plan.num_splits
    split_blocks = jnp.maximum(split_blocks, _MIN_SPLIT_BLOCKS if plan.num_splits > 1 else 1)
    first = jnp.minimum(start * plan.group, plan.query_rows - plan.tile_rows)
    fields = {
        "seq": seq,
        "first": jnp.maximum(first, 0),
        "own_start": start * plan.group - first,
        "own_end": end * plan.group - first,
        "to_position": to_position,
        "end_position": end_position,
        "first_block": first_block,
        "end_block": end_block,
        "split_blocks": split_blocks,
    }
    splits = (end_block - first_block + split_blocks - 1) // split_blocks
    row, token_live = token_rows(rows, num_tokens)
    first_tile = jnp.cumsum(tiles, dtype=jnp.int32) - tiles
    tile = first_tile[row] + (jnp.arange(num_tokens) - cu_q_lens[row]) // plan.tile_tokens
    splits = jnp.where(token_live, splits.at[tile].get(mode="clip"), 0)
    return jnp.stack([fields[name] for name in FIELDS], axis=1), splits


def merge_splits(
    out: jax.Array, splits: jax.Array, plan: AttentionPlan, sinks: jax.Array | None = None
) -> jax.Array:
    """What the splits gave, as results: zeros for padding tokens.

    Args:
      out: [num_splits, num_kv_heads, query_rows, out_lanes]; of query rows that no tile owns, and
        of splits that a tile does not have, anything.
      splits: i32[num_tokens], as `make_tiles` gives them.
      plan: sizes.
      sinks: f32[num_q_heads] if the plan has them: of each head, one more split without a result.

    Returns:
      dtype[num_tokens, num_q_heads, head_dim].
    """
    num_tokens = splits.shape[0]
    out = out[:, :, : num_tokens * plan.group]
    out = out.reshape(*out.shape[:2], num_tokens, plan.group, plan.out_lanes)
    if not plan.gives_lse:
        live = (splits > 0)[None, :, None, None]
        out = jnp.where(live, out[0], jnp.zeros((), out.dtype))
    else:
        live = jnp.arange(plan.num_splits)[:, None] < splits[None, :]
        live = live[:, None, :, None, None]
        results = jnp.where(live, out[..., : plan.head_dim], 0)
        lse = out[..., plan.head_dim : plan.head_dim + 1]
        join = _join_few if plan.num_splits <= _FEW_SPLITS else _join_many
        peak, total, joined = join(lse, live, results)
        if sinks is not None:
            # Infinite where it leaves the keys less than float32 can tell from nothing.
            total += jnp.exp(sinks.reshape(plan.num_kv_heads, 1, plan.group, 1) - peak)
        joined = (joined / jnp.maximum(total, _TINY)).astype(plan.dtype)
        # Else it is computed again for every feature of the product that follows.
        out = jax.lax.optimization_barrier(joined)
    return out.swapaxes(0, 1).reshape(num_tokens, plan.num_q_heads, plan.head_dim)


def _join_few(lse, live, results):
    """Joins splits one by one, every lane by itself, of which the compiler makes one kernel.

    Args:
      lse: f32[splits, ..., 1], logarithms of sums of weights.
      live: bool[splits, ..., 1], which splits are there.
      results: f32[splits, ..., lanes], divided by those sums; 0 of those that are not there.

    Returns:
      The largest of `lse`, and sums of weights and weighted results beside it, f32[..., lanes].
    """
    lse = jnp.where(live, jnp.broadcast_to(lse, results.shape), _NOTHING)
    peak = functools.reduce(jnp.maximum, lse)
    parts = zip(lse, live, results, strict=True)
    pairs = [(jnp.where(own, jnp.exp(each - peak), 0), part) for each, own, part in parts]
    return peak, sum(weight for weight, _ in pairs), sum(weight * part for weight, part in pairs)


def _join_many(lse, live, results):
    """As `_join_few`, in two or three kernels; the first two results are f32[..., 1]."""
    lse = jnp.where(live, lse, _NOTHING)
    peak = lse.max(axis=0, keepdims=True)
    weights = jnp.where(live, jnp.exp(lse - peak), 0)
    return peak[0], weights.sum(axis=0), (weights * results).sum(axis=0)
