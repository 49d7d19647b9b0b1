# SPDX-License-Identifier: Apache-2.0
"""What a thread block of the Mosaic GPU lowering does: one tile, one KV head, one split of keys."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.pallas_kernels import versions
from jpaged.pallas_kernels.gpu import work
from jpaged.pallas_kernels.gpu.mosaic_pages import BLOCK_TOKENS, KeyBlocks
from jpaged.pallas_kernels.gpu.tensor_core import Blackwell, Hopper
from jpaged.pallas_kernels.variant import AttentionVariant

# Lanes of cells that are converted or cleared at once, in registers.
_CELL_LANES = 128
# A row of results in shared memory, whose boxes TMA takes from multiples of 128 bytes alone.
OUT_ROW_BYTES = 128
# Finite, so that rows that have seen no key yet subtract to 0 and not to NaN.
MASKED = -1e30
LOG2_E = math.log2(math.e)


def attend_tile(
    # Input
    tiles_ref,  # i32[max_tiles, len(FIELDS)]
    page_table_ref,  # i32[max_num_seqs, pages_per_seq]
    layer_ref,  # i32[1]
    scale_ref,  # f32[2]
    q_ref,  # [num_kv_heads, query_rows, head_dim]
    cells_ref,  # [num_layers * num_pages * num_kv_heads * page_size, kv_dim]
    # Output
    out_ref,  # [num_splits, num_kv_heads, query_rows, out_lanes]
    # Scratch
    scratch,  # by name:
    # q [num_wgs, rows, head_dim], kv [num_stages, block, 2 * head_dim] as in the pool,
    # converted [block, 2 * head_dim] of the queries' dtype where the pool has another,
    # weights [num_wgs, rows, block], out [num_wgs, rows, OUT_ROW_BYTES of results]
    *,
    plan: work.AttentionPlan,
    cores: Hopper | Blackwell,
    num_pages: int,
    variant: AttentionVariant,
    warpgroup_type: "type[Warpgroup]",
):
    """A warpgroup's part in one split of a tile's keys, for one KV head."""
    head, tile, split = (jax.lax.axis_index(name) for name in ("head", "tile", "split"))

    def field(name):
        return tiles_ref[tile, work.FIELDS.index(name)]

    first_block = field("first_block") + split * field("split_blocks")
    end_block = jnp.minimum(first_block + field("split_blocks"), field("end_block"))

    @pl.when(first_block < end_block)
    def _():
        lowest_query = (field("first") + field("own_start")) // plan.group + field("to_position")
        lowest_key = jnp.int32(0)
        if variant.sliding_window is not None:
            lowest_key = variant.lowest_key(lowest_query)
        blocks = KeyBlocks(
            plan=plan,
            page_table_ref=page_table_ref,
            cells_ref=cells_ref,
            scratch=scratch,
            head=head,
            seq=field("seq"),
            pages=(lowest_key // plan.page_size, (field("end_position") - 1) // plan.page_size),
            layer_page=layer_ref[0] * num_pages,
            first=first_block,
            end=end_block,
        )
        wg = jax.lax.axis_index("wg")
        warpgroup = warpgroup_type(
            plan=plan,
            cores=cores,
            variant=variant,
            blocks=blocks,
            scale_ref=scale_ref,
            scratch=scratch,
            field=field,
            index=wg,
            first_row=field("first") + wg * scratch["q"].shape[1],
            end_position=field("end_position"),
            lowest_query=lowest_query,
            lowest_key=lowest_key,
        )
        warpgroup.start(q_ref)
        sums = warpgroup.attend()
        warpgroup.when_first(blocks.finish)
        warpgroup.store(out_ref, split, *sums)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warpgroup:
    """A warpgroup's rows of a tile, which meet the blocks of a split.

    Attributes:
      plan, cores, variant, scale_ref, scratch: as in `attend_tile`.
      blocks: of keys and values.
      field: reads a field of the tile by its name.
      index: i32[], which of the thread block's warpgroups it is.
      first_row: i32[], query row of its first row.
      end_position: i32[], one past that of the tile's last query.
      lowest_query: i32[], position of the tile's first query.
      lowest_key: i32[], that of the first key that any of its queries sees.
    """

    plan: work.AttentionPlan
    cores: Hopper | Blackwell
    variant: AttentionVariant
    blocks: KeyBlocks
    scale_ref: Any
    scratch: dict[str, Any]
    field: Callable[[str], jax.Array]
    index: jax.Array
    first_row: jax.Array
    end_position: jax.Array
    lowest_query: jax.Array
    lowest_key: jax.Array

    @property
    def _num_wgs(self) -> int:
        return self.scratch["q"].shape[0]

    @property
    def _rows(self) -> int:
        return self.scratch["q"].shape[1]

    @property
    def _value_pieces(self) -> list[tuple[int, int]]:
        return pieces(self.plan.head_dim, self.cores.max_value_lanes)

    def when_first(self, act: Callable[[], None]) -> None:
        """Acts in one of the thread block's warpgroups."""
        act() if self._num_wgs == 1 else pl.when(self.index == 0)(act)

    def start(self, q_ref) -> None:
        """Puts its rows of [num_kv_heads, query_rows, head_dim] where they are multiplied.

        Before that the first blocks are on their way.
        """
        self.when_first(lambda: self.blocks.start(self.blocks.find_first()))
        # Not by TMA, which copies tiles of 8 rows, from multiples of 8 alone: others come as zeros.
        home = q_ref.at[self.blocks.head, pl.ds(self.first_row, self._rows)]
        self.scratch["q"][self.index] = versions.mosaic_load(home, self.cores.layout)
        plgpu.commit_smem()

    def attend(self) -> tuple[jax.Array, ...]:
        """The sums over all blocks: largest score and sum of weights, each f32[rows], and values.

        Values are weighted sums, f32[rows, width] for each of the pieces.
        """
        rows, layout, blocks = self._rows, self.cores.layout, self.blocks

        def full(shape, value, layout):
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        carry = (
            blocks.find(blocks.first + blocks.num_stages - 1),
            full((rows,), MASKED, layout.reduce(1)),
            full((rows,), 0, layout.reduce(1)),
            *(full((rows, width), 0, layout) for _, width in self._value_pieces),
        )
        attend_edge = functools.partial(self._attend_block, edge=True)
        attend_plain = functools.partial(self._attend_block, edge=False)
        # Blocks of which every row sees every key need no mask: [plain_start, plain_end).
        plain_start = blocks.first
        if self.variant.sliding_window is not None:
            lowest = jnp.maximum(self.end_position - self.variant.sliding_window, 0)
            plain_start = jnp.clip(pl.cdiv(lowest, BLOCK_TOKENS), blocks.first, blocks.end)
            carry = jax.lax.fori_loop(blocks.first, plain_start, attend_edge, carry)
        plain_end = jnp.clip((self.lowest_query + 1) // BLOCK_TOKENS, plain_start, blocks.end)
        carry = jax.lax.fori_loop(plain_start, plain_end, attend_plain, carry)
        _, *sums = jax.lax.fori_loop(plain_end, blocks.end, attend_edge, carry)
        return tuple(sums)

    def _attend_block(self, block, carry, *, edge: bool):
        """Adds a block to the sums; `edge` is where some rows do not see some of its keys."""
        page_ids, peak, total, *accs = carry
        blocks, scratch = self.blocks, self.scratch
        stage = blocks.stage(block)
        self.when_first(functools.partial(blocks.fetch_ahead, block, page_ids))
        # For the next block; they come while this one is multiplied.
        page_ids = blocks.find(block + blocks.num_stages)
        plgpu.barrier_wait(scratch["kv_ready"].at[stage])
        keys, values = self._operands(block, stage)
        scores = self._scaled(self._multiply(scratch["q"], keys.transpose((1, 0)), "scores"))
        if edge:
            scores = self._masked(scores, block)
        new_peak = jnp.maximum(peak, scores.max(axis=1))
        shrink = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(scores - _over_lanes(new_peak, scores.shape))
        total = total * shrink + weights.sum(axis=1)
        scratch["weights"][self.index] = weights.astype(self.plan.dtype)
        plgpu.commit_smem()
        for i, (lane, width) in enumerate(self._value_pieces):
            piece = values.at[:, pl.ds(lane, width)]
            added = self._multiply(scratch["weights"], piece, f"values{lane}")
            accs[i] = accs[i] * _over_lanes(shrink, accs[i].shape) + added
        plgpu.barrier_arrive(scratch["kv_done"].at[stage])
        return page_ids, new_peak, total, *accs

    def _multiply(self, a_ref, b_ref, name: str):
        """The product of its own of `a_ref`, [num_wgs, rows, ...], with `b_ref`."""
        return self.cores.multiply(a_ref.at[self.index], b_ref, name, self.scratch)

    def _operands(self, block, stage):
        """Keys and values [block, head_dim] as the tensor cores take them, dead ones cleared."""
        head_dim, kv_ref = self.plan.head_dim, self.scratch["kv"].at[stage]

        def clear_values():
            self._put_cleared(kv_ref, kv_ref, head_dim, block)
            plgpu.commit_smem()

        if self.plan.kv_dtype != self.plan.dtype:
            for first_lane in (0, head_dim):
                self._put_cleared(kv_ref, self.scratch["converted"], first_lane, block)
            plgpu.commit_smem()
            kv_ref = self.scratch["converted"]
        else:

            @pl.when((block + 1) * BLOCK_TOKENS > self.end_position)
            def _():
                self.when_first(clear_values)
                if self._num_wgs > 1:
                    plgpu.barrier_arrive(self.scratch["cleared"])
                    plgpu.barrier_wait(self.scratch["cleared"])

        return kv_ref.at[:, pl.ds(0, head_dim)], kv_ref.at[:, pl.ds(head_dim, head_dim)]

    def _put_cleared(self, source_ref, target_ref, first_lane: int, block) -> None:
        """Puts keys or values, which start at `first_lane`, where they are multiplied."""
        for lane, width in pieces(self.plan.head_dim, _CELL_LANES):
            at = (slice(None), pl.ds(first_lane + lane, width))
            target_ref[at] = self._cleared(_convert(source_ref[at], self.plan.dtype), block)

    def _cleared(self, cells, block):
        """`cells` without the dead ones, which may be NaN: a weight of 0 would not help."""
        token = plgpu.broadcasted_iota(jnp.int32, cells.shape, 0, layout=plgpu.Layout.WGMMA)
        token = token + block * BLOCK_TOKENS
        live = token < self.end_position
        if self.variant.sliding_window is not None:
            # Instead of pages below the window others come, whose dead cells lie there then.
            live &= token >= self.lowest_key
        return jnp.where(live, cells, jnp.zeros_like(cells))

    def _scaled(self, scores):
        """Scores, scaled and capped, in units of log 2."""
        cap = self.variant.soft_cap
        if cap is None:
            return scores * (self.scale_ref[0] * LOG2_E)
        # tanh(x) = 1 - 2 / (1 + exp(2 x)): the hardware's own tanh is off by 2**-11.
        power = jnp.exp2(scores * (self.scale_ref[0] * (2 * LOG2_E / cap)))
        return (cap * LOG2_E) * (1 - 2 / (1 + power))

    def _masked(self, scores, block):
        """Scores without those of keys that a row does not see."""
        row, key = (
            plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=self.cores.layout)
            for axis in (0, 1)
        )
        position = (row + self.first_row) // self.plan.group + self.field("to_position")
        key = key + block * BLOCK_TOKENS
        return jnp.where(self.variant.sees(position, key), scores, MASKED)

    def store(self, out_ref, split, peak, total, *accs) -> None:
        """Brings home what becomes of the sums of `attend`.

        Args:
          out_ref: [num_splits, num_kv_heads, query_rows, out_lanes].
          split: i32[], which.
          peak: the first of the sums.
          total: the second.
          *accs: the others.
        """
        out_smem_ref, rows = self.scratch["out"], self._rows
        store = functools.partial(
            _store_rows,
            out_smem_ref.at[self.index],
            jnp.maximum(self.field("own_start") - self.index * rows, 0),
            jnp.minimum(self.field("own_end") - self.index * rows, rows),
            out_ref.at[split, self.blocks.head, pl.ds(self.first_row, rows)],
        )
        for (lane, width), acc in zip(self._value_pieces, accs, strict=True):
            results = acc * _over_lanes(self.scale_ref[1] / total, acc.shape)
            for start, count in pieces(width, out_smem_ref.shape[2]):
                piece = results[:, start : start + count].astype(self.plan.out_type.dtype)
                store(piece, lane + start)
        if self.plan.gives_lse:
            lse = peak / LOG2_E + jnp.log(total)
            store(_over_lanes(lse, (rows, work.LSE_LANES)), self.plan.head_dim)


def _store_rows(smem_ref, own_start, own_end, home_ref, numbers, lane):
    """Brings a warpgroup's own rows home, by way of shared memory.

    Args:
      smem_ref: [rows, OUT_ROW_BYTES of numbers].
      own_start: the first of the rows that belong to the tile; others belong to other tiles.
      own_end: one past the last.
      home_ref: GMEM [rows, out_lanes].
      numbers: [rows, lanes], at most as many as a row of `smem_ref` holds.
      lane: of a row of `home_ref`, where they go.
    """
    rows, width = numbers.shape
    versions.mosaic_store(smem_ref.at[:, :width], numbers)
    plgpu.commit_smem()

    def store_box():
        plgpu.copy_smem_to_gmem(smem_ref, home_ref.at[:, pl.ds(lane, width)])

    def store_each():
        def store_row(row, _):
            home = home_ref.at[row, pl.ds(lane, width)]
            plgpu.copy_smem_to_gmem(smem_ref.at[row, pl.ds(0, width)], home)

        jax.lax.fori_loop(own_start, own_end, store_row, None)

    if width == smem_ref.shape[1]:
        whole = (own_start == 0) & (own_end == rows)
        pl.when(whole)(store_box)
        pl.when(jnp.logical_not(whole))(store_each)
    else:
        store_each()
    # Until they have left shared memory, which the next ones need.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _convert(cells, dtype):
    if cells.dtype == jnp.float8_e4m3fn and dtype == jnp.bfloat16:
        # The hardware converts to float16 alone; every step is exact.
        cells = cells.astype(jnp.float16).astype(jnp.float32)
    return cells.astype(dtype)


def _over_lanes(x, shape):
    return jax.lax.broadcast_in_dim(x, shape, (0,))


def pieces(lanes: int, limit: int) -> list[tuple[int, int]]:
    """Start and width of pieces of at most `limit` lanes, all as wide, which tiles split into."""
    width = lanes
    if lanes > limit:
        width = next(width for width in (128, 64, 32, 16) if width <= limit and lanes % width == 0)
    return [(lane, width) for lane in range(0, lanes, width)]
