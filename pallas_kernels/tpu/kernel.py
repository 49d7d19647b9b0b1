# SPDX-License-Identifier: Apache-2.0
"""What the attention kernel does with one span of its list of work."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jpaged.pallas_kernels.tpu.plan import LANES, AttentionPlan
from jpaged.pallas_kernels.tpu.spans import FIELDS
from jpaged.pallas_kernels.variant import AttentionVariant

# Finite, so that rows that have seen no key yet subtract to 0 and not to NaN.
_MASKED = -1e30


def attention_kernel(
    # Prefetch
    spans_ref,  # i32[fields, max_spans + 1]
    scalars_ref,  # i32[2]: live spans, layer
    # Input
    ids_ref,  # SMEM i32[1, 1, table_part], the span's page ids
    next_ids_ref,  # SMEM i32[1, 1, table_part], those of the next span
    q_ref,  # [1, num_kv_heads, block_rows, key_lanes]
    kv_pages_ref,  # HBM [num_layers, num_pages, num_kv_heads, page_size, kv_dim]
    scale_ref,  # SMEM f32[2], what scores and results are multiplied by
    sinks_ref,  # SMEM f32[num_q_heads], or None without sinks
    # Output
    out_ref,  # [1, num_kv_heads, block_rows, head_dim]
    # Scratch
    pages_ref,  # [2, group_pages, num_kv_heads, page_size, kv_dim]
    scores_ref,  # f32[softmax_heads * score_rows, group_tokens]
    peak_ref,  # f32[num_kv_heads * score_rows, 128], largest score so far, the same in all lanes
    total_ref,  # f32[num_kv_heads * score_rows, 128], sum of weights, the same in all lanes
    acc_ref,  # f32[num_kv_heads * score_rows, acc_lanes], sum of weighted values
    slot_ref,  # SMEM i32[1], which half of pages_ref the span's first group is in
    sems,  # DMA[2], one a half of pages_ref
    *,
    plan: AttentionPlan,
    variant: AttentionVariant,
):
    """One span of a tile: all of its groups of pages, and the start of the next span's first."""
    span, num_spans, layer = pl.program_id(0), scalars_ref[0], scalars_ref[1]

    def field(name, of=span):
        return spans_ref[FIELDS.index(name), of]

    def copy_page(page_id, slot, place):
        return pltpu.make_async_copy(
            kv_pages_ref.at[layer, page_id], pages_ref.at[slot, place], sems.at[slot]
        )

    def own_pages(group, of):
        first, end = group * plan.group_pages, (group + 1) * plan.group_pages
        return jnp.maximum(first, field("first_page", of)), jnp.minimum(end, field("end_page", of))

    def start_group(ids_ref, group, of, slot):
        def start(page, _):
            page_id = ids_ref[0, 0, page % plan.table_part]
            copy_page(page_id, slot, page - group * plan.group_pages).start()

        jax.lax.fori_loop(*own_pages(group, of), start, None)

    def wait_group(group, slot):
        # Every page of a half counts into one semaphore, so any page's copy can be awaited.
        jax.lax.fori_loop(*own_pages(group, span), lambda *_: copy_page(0, slot, 0).wait(), None)

    def start_whole_group(group, slot):
        place = group * plan.group_pages % plan.table_part
        for i in range(plan.group_pages):
            copy_page(ids_ref[0, 0, place + i], slot, i).start()

    def wait_whole_group(slot):
        # Only the size counts; the pool, as a source, may have fewer pages than a group.
        half = pages_ref.at[slot]
        pltpu.make_async_copy(half, half, sems.at[slot]).wait()

    attend = functools.partial(
        _attend_group,
        q_ref,
        pages_ref,
        scores_ref,
        peak_ref,
        total_ref,
        acc_ref,
        scale=scale_ref[0],
        plan=plan,
        variant=variant,
    )
    first_group = field("first_page") // plan.group_pages
    end_group = pl.cdiv(field("end_page"), plan.group_pages)
    first_position, end_position = field("first_position"), field("end_position")

    def plain_step(group, slot):
        start_whole_group(group + 1, 1 - slot)
        wait_whole_group(slot)
        attend(group, slot)
        return 1 - slot

    def edge_step(group, slot):
        last = group + 1 == end_group

        @pl.when(jnp.logical_not(last))
        def _():
            start_group(ids_ref, group + 1, span, 1 - slot)

        @pl.when(last & (span + 1 < num_spans))
        def _():
            next_group = field("first_page", span + 1) // plan.group_pages
            start_group(next_ids_ref, next_group, span + 1, 1 - slot)

        wait_group(group, slot)
        attend(group, slot, edge=(first_position, end_position, field("first_place")))
        return 1 - slot

    @pl.when((span == 0) & (num_spans > 0))
    def _():
        slot_ref[0] = 0
        start_group(ids_ref, first_group, span, 0)

    def differs(name, span, other):
        return field(name, span) != field(name, other)

    before = jnp.maximum(span - 1, 0)

    @pl.when((span == 0) | differs("block", span, before))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when((span == 0) | differs("tile", span, before))
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, _MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(span < num_spans)
    def _():
        # Groups of which every query sees every token, and after which comes another whole group,
        # need no mask and no condition: [plain_start, plain_end).
        plain_start = first_group
        if variant.sliding_window is not None:
            lowest = jnp.maximum(end_position - variant.sliding_window, 0)
            plain_start = jnp.clip(pl.cdiv(lowest, plan.group_tokens), first_group, end_group)
        plain_end = jnp.minimum(
            (first_position + 1) // plan.group_tokens, field("end_page") // plan.group_pages - 1
        )
        plain_end = jnp.maximum(plain_start, plain_end)
        slot = slot_ref[0]
        if variant.sliding_window is not None:
            slot = jax.lax.fori_loop(first_group, plain_start, edge_step, slot)
        slot = jax.lax.fori_loop(plain_start, plain_end, plain_step, slot)
        slot_ref[0] = jax.lax.fori_loop(plain_end, end_group, edge_step, slot)

    @pl.when((span + 1 == num_spans) | differs("tile", span, span + 1))
    def _():
        # Other rows' tokens of the block, before and after, keep what they have.
        place = jax.lax.broadcasted_iota(jnp.int32, (plan.score_rows, plan.head_dim), 0)
        place = place % plan.q_tile - field("first_place")
        own = (place >= 0) & (place < end_position - first_position)
        lane = plan.head_dim - plan.value_lanes[0]
        for head in range(plan.num_kv_heads):
            at = pl.ds(head * plan.score_rows, plan.score_rows)
            total = total_ref[at, :]
            if sinks_ref is not None:
                # Infinite where it leaves the keys less than float32 can tell from nothing.
                total += jnp.exp(_sinks_of(head, sinks_ref, plan) - peak_ref[at, :])
            total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
            out = acc_ref[at, :] * _lanes(scale_ref[1] / total, plan.acc_lanes)
            out = out[:, lane : lane + plan.head_dim].astype(out_ref.dtype)
            at = (0, head, pl.ds(0, plan.score_rows), slice(None))
            out_ref[at] = jnp.where(own, out, out_ref[at])


def _attend_group(
    q_ref,
    pages_ref,
    scores_ref,
    peak_ref,
    total_ref,
    acc_ref,
    group,
    slot,
    *,
    edge=None,
    scale,
    plan: AttentionPlan,
    variant: AttentionVariant,
):
    """Adds a group of pages, which is in half `slot` of `pages_ref`, to the running sums.

    `edge` is given where some queries do not see some of the group's tokens, or the group has cells
    that hold no token or were not fetched: first_position, end_position, first_place of the tile.
    """
    tokens, rows = plan.group_tokens, plan.score_rows
    precision = jax.lax.Precision.HIGHEST if plan.dtype == jnp.float32 else None
    multiply = functools.partial(
        jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32
    )

    def cells(head, start, end):
        cells = pages_ref[slot, :, head, :, start:end].reshape(tokens, end - start)
        # Lanes past the values hold anything; keys reach them where head_dim is below 64.
        return cells.astype(plan.dtype)

    visible = live = None
    if edge is not None:
        first, end, first_place = edge
        place = jax.lax.broadcasted_iota(jnp.int32, (rows, tokens), 0) % plan.q_tile
        queries = first - first_place + place
        keys = group * tokens + jax.lax.broadcasted_iota(jnp.int32, (rows, tokens), 1)
        cell = group * tokens + jax.lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)
        visible, live = variant.sees(queries, keys), cell < end
        if variant.sliding_window is not None:
            live &= cell > first - variant.sliding_window
        visible = jnp.concatenate([visible] * plan.softmax_heads, axis=0)

    for first_head in range(0, plan.num_kv_heads, plan.softmax_heads):
        heads = range(first_head, min(first_head + plan.softmax_heads, plan.num_kv_heads))
        places = [pl.ds(i * rows, rows) for i in range(len(heads))]
        for head, place in zip(heads, places, strict=True):
            keys = cells(head, 0, plan.key_lanes)
            if plan.key_lanes > 2 * plan.head_dim:
                lane = jax.lax.broadcasted_iota(jnp.int32, keys.shape, 1)
                keys = jnp.where(lane < 2 * plan.head_dim, keys, 0)
            scores = multiply(q_ref[0, head], keys, (((1,), (1,)), ((), ())))
            scores_ref[place, :] = scores[:rows]
        all_rows = len(heads) * rows
        scores = variant.capped(scores_ref[:all_rows, :] * scale)
        if visible is not None:
            scores = jnp.where(visible[:all_rows], scores, _MASKED)
        at = pl.ds(first_head * rows, all_rows)
        peak = peak_ref[at, :]
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1, keepdims=True))
        shrink = jnp.exp(peak - new_peak)
        # A query that has seen no key yet gives weight to masked ones; the first key that it sees
        # shrinks that to 0.
        weights = jnp.exp(scores - _lanes(new_peak, tokens))
        total_ref[at, :] = total_ref[at, :] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        peak_ref[at, :] = new_peak
        shrink = _lanes(shrink, plan.acc_lanes)
        for i, head in enumerate(heads):
            values = cells(head, *plan.value_lanes)
            if live is not None:
                values = jnp.where(live, values.astype(jnp.float32), 0).astype(plan.dtype)
            own = slice(i * rows, (i + 1) * rows)
            added = multiply(weights[own].astype(plan.dtype), values, (((1,), (0,)), ((), ())))
            at = pl.ds(head * rows, rows)
            acc_ref[at, :] = acc_ref[at, :] * shrink[own] + added


def _sinks_of(head, sinks_ref, plan: AttentionPlan):
    """f32[score_rows, 128]: the sink of each row of a KV head, the same in all lanes."""
    shape = (plan.score_rows, LANES)
    group = plan.num_q_heads // plan.num_kv_heads
    of_group = jax.lax.broadcasted_iota(jnp.int32, shape, 0) // plan.q_tile
    sinks = jnp.full(shape, sinks_ref[head * group])
    for i in range(1, group):
        sinks = jnp.where(of_group == i, sinks_ref[head * group + i], sinks)
    return sinks


def _lanes(x, lanes: int):
    """`[rows, lanes]` of `[rows, 128]` whose lanes are equal, or `[rows, 1]` to broadcast."""
    if lanes % LANES:
        return x[:, :1]
    return jnp.concatenate([x] * (lanes // LANES), axis=1)
