# SPDX-License-Identifier: Apache-2.0
"""What a thread block of the Mosaic GPU lowering does: one tile, one KV head, one split of keys."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.pallas_kernels import versions
from jpaged.pallas_kernels.gpu import work
from jpaged.pallas_kernels.gpu.tensor_core import Blackwell, Hopper

# Tokens of a block of keys: the rows of a register tile, which dead values are cleared in.
BLOCK_TOKENS = 64
# Lanes of cells that are converted or cleared at once, in registers.
_CELL_LANES = 128
# A row of results in shared memory, whose boxes TMA takes from multiples of 128 bytes alone.
OUT_ROW_BYTES = 128
# Finite, so that rows that have seen no key yet subtract to 0 and not to NaN.
_MASKED = -1e30
_LOG2_E = math.log2(math.e)


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
    sliding_window: int | None,
    soft_cap: float | None,
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
        if sliding_window is not None:
            lowest_key = jnp.maximum(lowest_query - sliding_window + 1, 0)
        find = functools.partial(
            _find_pages,
            page_table_ref,
            plan=plan,
            seq=field("seq"),
            pages=(lowest_key // plan.page_size, (field("end_position") - 1) // plan.page_size),
        )
        fetch = functools.partial(
            _fetch_block,
            cells_ref,
            scratch,
            plan=plan,
            head=head,
            first_page=layer_ref[0] * num_pages,
            first_block=first_block,
        )
        _attend_blocks(
            field,
            find,
            fetch,
            q_ref,
            scale_ref,
            out_ref,
            scratch,
            plan=plan,
            cores=cores,
            head=head,
            split=split,
            first_block=first_block,
            end_block=end_block,
            lowest_query=lowest_query,
            lowest_key=lowest_key,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
        )


def _find_pages(page_table_ref, block, *, plan, seq, pages):
    """Ids of the pages that a block lies in; for any block, as others than `pages` give way."""
    tokens = [block * BLOCK_TOKENS + start for start, _ in _runs(plan)]
    return [page_table_ref[seq, jnp.clip(token // plan.page_size, *pages)] for token in tokens]


def _fetch_block(cells_ref, scratch, block, page_ids, *, plan, head, first_page, first_block):
    """Starts the copies of a block's pages to the stage that it takes its turn in."""
    stage = jax.lax.rem(block - first_block, scratch["kv"].shape[0])
    for (start, size), page_id in zip(_runs(plan), page_ids, strict=True):
        cell = ((first_page + page_id) * plan.num_kv_heads + head) * plan.page_size
        cell += jax.lax.rem(block * BLOCK_TOKENS + start, plan.page_size)
        plgpu.copy_gmem_to_smem(
            cells_ref.at[pl.ds(cell, size), pl.ds(0, 2 * plan.head_dim)],
            scratch["kv"].at[stage, pl.ds(start, size)],
            scratch["kv_ready"].at[stage],
        )


def _runs(plan: work.AttentionPlan) -> list[tuple[int, int]]:
    """Start and size of the parts of a block that lie in one page each."""
    size = BLOCK_TOKENS // block_pages(plan)
    return [(start, size) for start in range(0, BLOCK_TOKENS, size)]


def _attend_blocks(
    field,
    find,
    fetch,
    q_ref,
    scale_ref,
    out_ref,
    scratch,
    *,
    plan: work.AttentionPlan,
    cores: Hopper | Blackwell,
    head,
    split,
    first_block,
    end_block,
    lowest_query,
    lowest_key,
    sliding_window,
    soft_cap,
):
    """A warpgroup's rows of the tile meet blocks `[first_block, end_block)`."""
    wg = jax.lax.axis_index("wg")
    num_wgs, rows, head_dim = scratch["q"].shape
    num_stages = scratch["kv"].shape[0]
    first_row, end_position = field("first") + wg * rows, field("end_position")
    value_pieces = pieces(head_dim, cores.max_value_lanes)

    def when_first_wg(act):
        act() if num_wgs == 1 else pl.when(wg == 0)(act)

    def iota(shape, axis):
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=cores.layout)

    def multiply(a_ref, b_ref, name):
        return cores.multiply(a_ref, b_ref, name, scratch)

    def start_fetches():
        for i in range(num_stages - 1):
            block = first_block + i
            pl.when(block < end_block)(functools.partial(fetch, block, find(block)))

    when_first_wg(start_fetches)
    # Not by TMA, which copies tiles of 8 rows, from multiples of 8 alone: others come as zeros.
    queries = versions.mosaic_load(q_ref.at[head, pl.ds(first_row, rows)], cores.layout)
    scratch["q"][wg] = queries
    plgpu.commit_smem()

    def fetch_ahead(block, page_ids):
        """Refills the stage that the block before had, with pages of known ids."""
        done = scratch["kv_done"].at[jax.lax.rem(block - first_block - 1 + num_stages, num_stages)]

        @pl.when(block > first_block)
        def _():
            plgpu.barrier_wait(done)

        ahead = block + num_stages - 1
        pl.when(ahead < end_block)(functools.partial(fetch, ahead, page_ids))

    def cleared(cells, block):
        """`cells` without the dead ones, which may be NaN: a weight of 0 would not help."""
        token = plgpu.broadcasted_iota(jnp.int32, cells.shape, 0, layout=plgpu.Layout.WGMMA)
        token = token + block * BLOCK_TOKENS
        live = token < end_position
        if sliding_window is not None:
            # Instead of pages below the window others come, whose dead cells lie there then.
            live &= token >= lowest_key
        return jnp.where(live, cells, jnp.zeros_like(cells))

    def put_cleared(source_ref, target_ref, first_lane, block):
        """Puts keys or values, which start at `first_lane`, where they are multiplied."""
        for lane, width in pieces(head_dim, _CELL_LANES):
            at = (slice(None), pl.ds(first_lane + lane, width))
            target_ref[at] = cleared(_convert(source_ref[at], plan.dtype), block)

    def operands(block, stage):
        """Keys and values [block, head_dim] as the tensor cores take them, dead ones cleared."""
        kv_ref = scratch["kv"].at[stage]

        def clear_values():
            put_cleared(kv_ref, kv_ref, head_dim, block)
            plgpu.commit_smem()

        if plan.kv_dtype != plan.dtype:
            for first_lane in (0, head_dim):
                put_cleared(kv_ref, scratch["converted"], first_lane, block)
            plgpu.commit_smem()
            kv_ref = scratch["converted"]
        else:

            @pl.when((block + 1) * BLOCK_TOKENS > end_position)
            def _():
                when_first_wg(clear_values)
                if num_wgs > 1:
                    plgpu.barrier_arrive(scratch["cleared"])
                    plgpu.barrier_wait(scratch["cleared"])

        return kv_ref.at[:, pl.ds(0, head_dim)], kv_ref.at[:, pl.ds(head_dim, head_dim)]

    def masked(scores, block):
        row, key = iota(scores.shape, 0), iota(scores.shape, 1)
        position = (row + first_row) // plan.group + field("to_position")
        key = key + block * BLOCK_TOKENS
        visible = key <= position
        if sliding_window is not None:
            visible &= key > position - sliding_window
        return jnp.where(visible, scores, _MASKED)

    def attend(block, carry, *, edge):
        """`edge` is where some rows do not see some of the block's keys."""
        page_ids, peak, total, *accs = carry
        stage = jax.lax.rem(block - first_block, num_stages)
        when_first_wg(functools.partial(fetch_ahead, block, page_ids))
        # For the next block; they come while this one is multiplied.
        page_ids = find(block + num_stages)
        plgpu.barrier_wait(scratch["kv_ready"].at[stage])
        keys, values = operands(block, stage)
        scores = multiply(scratch["q"].at[wg], keys.transpose((1, 0)), "scores")
        if soft_cap is None:
            scores = scores * (scale_ref[0] * _LOG2_E)
        else:
            # tanh(x) = 1 - 2 / (1 + exp(2 x)): the hardware's own tanh is off by 2**-11.
            power = jnp.exp2(scores * (scale_ref[0] * (2 * _LOG2_E / soft_cap)))
            scores = (soft_cap * _LOG2_E) * (1 - 2 / (1 + power))
        if edge:
            scores = masked(scores, block)
        new_peak = jnp.maximum(peak, scores.max(axis=1))
        shrink = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(scores - _over_lanes(new_peak, scores.shape))
        total = total * shrink + weights.sum(axis=1)
        scratch["weights"][wg] = weights.astype(plan.dtype)
        plgpu.commit_smem()
        for i, (lane, width) in enumerate(value_pieces):
            added = multiply(
                scratch["weights"].at[wg], values.at[:, pl.ds(lane, width)], f"values{lane}"
            )
            accs[i] = accs[i] * _over_lanes(shrink, accs[i].shape) + added
        plgpu.barrier_arrive(scratch["kv_done"].at[stage])
        return page_ids, new_peak, total, *accs

    def full(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    carry = (
        find(first_block + num_stages - 1),
        full((rows,), _MASKED, cores.layout.reduce(1)),
        full((rows,), 0, cores.layout.reduce(1)),
        *(full((rows, width), 0, cores.layout) for _, width in value_pieces),
    )
    attend_edge = functools.partial(attend, edge=True)
    # Blocks of which every row sees every key need no mask: [plain_start, plain_end).
    plain_start = first_block
    if sliding_window is not None:
        lowest = jnp.maximum(end_position - sliding_window, 0)
        plain_start = jnp.clip(pl.cdiv(lowest, BLOCK_TOKENS), first_block, end_block)
        carry = jax.lax.fori_loop(first_block, plain_start, attend_edge, carry)
    plain_end = jnp.clip((lowest_query + 1) // BLOCK_TOKENS, plain_start, end_block)
    carry = jax.lax.fori_loop(plain_start, plain_end, functools.partial(attend, edge=False), carry)
    _, peak, total, *accs = jax.lax.fori_loop(plain_end, end_block, attend_edge, carry)
    # The stages' last turns, of which only the last one nobody has waited for.
    when_first_wg(
        lambda: plgpu.barrier_wait(
            scratch["kv_done"].at[jax.lax.rem(end_block - 1 - first_block, num_stages)]
        )
    )

    box = (
        jnp.maximum(field("own_start") - wg * rows, 0),
        jnp.minimum(field("own_end") - wg * rows, rows),
        out_ref.at[split, head, pl.ds(first_row, rows)],
    )
    store = functools.partial(_store_rows, scratch["out"].at[wg], *box)
    for (lane, width), acc in zip(value_pieces, accs, strict=True):
        results = acc * _over_lanes(scale_ref[1] / total, acc.shape)
        for start, count in pieces(width, scratch["out"].shape[2]):
            piece = results[:, start : start + count].astype(plan.out_type.dtype)
            store(piece, lane + start)
    if plan.num_splits > 1:
        lse = peak / _LOG2_E + jnp.log(total)
        store(_over_lanes(lse, (rows, work.LSE_LANES)), head_dim)


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


def block_pages(plan: work.AttentionPlan) -> int:
    """Pages that a block of keys lies in."""
    return max(1, BLOCK_TOKENS // plan.page_size)
