# SPDX-License-Identifier: Apache-2.0
"""The lists of work of the TPU kernels, beside plain Python that goes query by query.

Attention's tiles are taken from `attention.paged_attention` itself, in place of its kernel, so that
the sizes that it gives the lists are what is tested.
"""

import functools
import itertools
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jpaged.pallas_kernels import tuning
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.tpu import attention, pages, spans
from jpaged.pallas_kernels.variant import AttentionVariant

ROWS = 6
PAGE_SIZE = 8
PAGES_PER_SEQ = 40
GARBAGE = st.integers(-(2**31), 2**31 - 1)
INT32_MAX = 2**31 - 1


def tiles_of(kv_lens, cu_q_lens, num_seqs, *, num_tokens, q_tile):
    """The tiles that attention makes of a step: [of decode] or [of decode, of prefill]."""
    taken = []

    def take(q_blocks, kv_pages, page_table, tiles, layer, scale, sinks, *, plan, **_):
        assert plan.q_tile in (1, q_tile)
        taken.append(tiles)
        return jnp.zeros((q_blocks.shape[0], 1, plan.block_rows, plan.head_dim))

    tiles = tuning.TpuTiles(group_tokens=256, q_tile=q_tile)
    page_table = jnp.zeros((kv_lens.shape[0], PAGES_PER_SEQ), jnp.int32)
    with (
        unittest.mock.patch.object(attention, "_attend_tiles", take),
        unittest.mock.patch.object(tuning, "tpu_tiles", lambda *_, **__: tiles),
    ):
        # Without its jit, which tiles must not be taken out of.
        attention.paged_attention.__wrapped__(
            jnp.zeros((num_tokens, 1, 128)),
            jnp.zeros((1, 2, 1, PAGE_SIZE, 256)),
            Rows(page_table, kv_lens, cu_q_lens, num_seqs),
            AttentionVariant(),
            layer=0,
            kv_scale=None,
        )
    return taken


tiles_of_jit = jax.jit(tiles_of, static_argnames=("num_tokens", "q_tile"))


def max_tiles(num_tokens, rows, q_tile):
    """How long attention makes the list of prefill's tiles."""
    shapes = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in (rows, rows + 1, 1)]
    take = functools.partial(tiles_of, num_tokens=num_tokens, q_tile=q_tile)
    _, prefill = jax.eval_shape(take, *shapes)
    return prefill.row.shape[0]


def index_arrays(lens, rows, garbage):
    """kv_lens, cu_q_lens and num_seqs of a step of `(q_len, kv_len)`; padding holds garbage."""
    cu = [0, *itertools.accumulate(q_len for q_len, _ in lens)]
    spare = rows - len(lens)
    kv_lens = [kv_len for _, kv_len in lens] + garbage[:spare]
    return (
        np.array(kv_lens, np.int32),
        np.array(cu + garbage[spare : 2 * spare], np.int32),
        np.array([len(lens)], np.int32),
    )


@st.composite
def steps(draw, num_tokens, capacity=PAGE_SIZE * PAGES_PER_SEQ):
    """Live rows' `(q_len, kv_len)`, of no more than `num_tokens` queries, and garbage."""
    lens, left = [], num_tokens
    for _ in range(draw(st.integers(0, ROWS))):
        q_len = min(left, draw(st.integers(0, 3) | st.integers(0, num_tokens)))
        left -= q_len
        lens.append((q_len, q_len + draw(st.integers(0, capacity - q_len))))
    return lens, draw(st.lists(GARBAGE, min_size=2 * ROWS, max_size=2 * ROWS))


def cut(lens, first_tokens, q_tile):
    """Tiles as tuples `(row, block, first_place, first_position, end_position)`."""
    tiles = []
    for row, (q_len, kv_len) in enumerate(lens):
        queries = [(first_tokens[row] + i, kv_len - q_len + i) for i in range(q_len)]
        for block, own in itertools.groupby(queries, lambda query: query[0] // q_tile):
            own = list(own)
            tiles.append((row, block, own[0][0] % q_tile, own[0][1], own[-1][1] + 1))
    return tiles


def live(tiles):
    count = int(tiles.count)
    assert 0 <= count <= tiles.row.shape[0]
    names = ("row", "block", "first_place", "first_position", "end_position")
    fields = (np.asarray(getattr(tiles, name))[:count].tolist() for name in names)
    return list(zip(*fields, strict=True))


@pytest.mark.parametrize(("num_tokens", "q_tile"), [(7, 8), (24, 2), (45, 8), (70, 16)])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_query_is_in_one_tile(num_tokens, q_tile, data):
    """Rows of one query are decode's, which has them on an axis of their own; others prefill's."""
    lens, garbage = data.draw(steps(num_tokens))
    index = index_arrays(lens, ROWS, garbage)
    decode, prefill = tiles_of_jit(*index, num_tokens=num_tokens, q_tile=q_tile)
    single = [(q_len if q_len == 1 else 0, kv_len) for q_len, kv_len in lens]
    assert live(decode) == cut(single, range(ROWS), 1)
    several = [(0 if q_len == 1 else q_len, kv_len) for q_len, kv_len in lens]
    assert live(prefill) == cut(several, index[1].tolist(), q_tile)


@pytest.mark.parametrize("num_tokens", [1, ROWS])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_step_with_no_more_tokens_than_rows_is_decode(num_tokens, data):
    """Its tiles have one query each, those of rows with several queries too."""
    lens, garbage = data.draw(steps(num_tokens))
    index = index_arrays(lens, ROWS, garbage)
    (decode,) = tiles_of_jit(*index, num_tokens=num_tokens, q_tile=8)
    assert live(decode) == cut(lens, index[1].tolist(), 1)


@functools.cache
def worst_rows(num_tokens, rows, q_tile, start=0):
    """Most tiles that prefill can have on tokens from `start`, with the q_lens that make them."""
    best = (0, ())
    for q_len in range(1, num_tokens - start + 1) if rows else ():
        own = (start + q_len - 1) // q_tile - start // q_tile + 1 if q_len > 1 else 0
        count, rest = worst_rows(num_tokens, rows - 1, q_tile, start + q_len)
        best = max(best, (own + count, (q_len, *rest)), key=lambda option: option[0])
    return best


@pytest.mark.parametrize("q_tile", [2, 4, 8, 16])
def test_no_step_has_more_tiles_than_the_list(q_tile):
    """Dynamic programming over all ways of dealing tokens to rows; the list wastes little."""
    for num_tokens in (3, 9, 16, 17, 31, 40):
        for rows in (1, 2, 5, 13, 30):
            if rows >= num_tokens:  # decode, whose tiles are its tokens
                continue
            count, _ = worst_rows(num_tokens, rows, q_tile)
            size = max_tiles(num_tokens, rows, q_tile)
            assert count <= size <= count + 2 + num_tokens // q_tile, (num_tokens, rows)


@pytest.mark.parametrize(
    ("q_lens", "q_tile"),
    [
        (worst_rows(40, 20, 8)[1], 8),
        ([7, *[2, 6] * 8], 8),  # every second row has two queries, in two blocks
        ([15, *[2, 14] * 6, 2], 16),
        ([1, *[2] * 24], 2),
    ],
    ids=["worst-8", "straddle-8", "straddle-16", "offset-2"],
)
def test_the_last_of_many_tiles_is_in_the_list(q_lens, q_tile):
    lens = [(q_len, q_len + 5) for q_len in q_lens]
    kv_lens, cu, num_seqs = index_arrays(lens, len(lens), [])
    _, prefill = tiles_of_jit(kv_lens, cu, num_seqs, num_tokens=sum(q_lens), q_tile=q_tile)
    several = [(0 if q_len == 1 else q_len, kv_len) for q_len, kv_len in lens]
    assert live(prefill) == cut(several, cu.tolist(), q_tile)


def columns(table, count):
    """The first columns of a table as tuples."""
    return list(zip(*np.asarray(table)[:, : int(count)].tolist(), strict=True))


def seen_pages(first, end, window, page_size):
    """Pages that hold a token that one of the queries at `[first, end)` sees."""
    lowest = 0 if window is None else max(0, first - window + 1)
    return sorted({position // page_size for position in range(lowest, end)})


make_spans = jax.jit(
    spans.make_spans,
    static_argnames=("page_size", "table_part", "num_rows", "num_parts", "variant"),
)


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("table_part", [4, 64])
@settings(deadline=None, max_examples=40)
@given(step=steps(24))
def test_every_page_that_a_tile_sees_is_in_one_span(table_part, window, step):
    lens, garbage = step
    index = index_arrays(lens, ROWS, garbage)
    num_parts = -(-PAGES_PER_SEQ // table_part)
    for tiles in tiles_of_jit(*index, num_tokens=24, q_tile=8):
        table, count = make_spans(
            tiles,
            page_size=PAGE_SIZE,
            table_part=table_part,
            num_rows=ROWS,
            num_parts=num_parts,
            variant=AttentionVariant(sliding_window=window),
        )
        assert table.shape == (len(spans.FIELDS), tiles.row.shape[0] * num_parts + 1)
        assert count < table.shape[1]
        want = []
        for tile, (row, block, first_place, first, end) in enumerate(live(tiles)):
            seen = seen_pages(first, end, window, PAGE_SIZE)
            for part, own in itertools.groupby(seen, lambda page: page // table_part):
                first_page, *_, last_page = [*own] * 2
                place = row * num_parts + part
                own_pages = (first_page, last_page + 1)
                want.append((block, tile, place, first_place, first, end, *own_pages))
        assert columns(table, count) == want


@settings(deadline=None, max_examples=60)
@given(garbage=st.lists(GARBAGE, min_size=2 * ROWS, max_size=2 * ROWS), no_queries=st.booleans())
@example(garbage=[INT32_MAX] * 2 * ROWS, no_queries=False)
@example(garbage=[-INT32_MAX] * 2 * ROWS, no_queries=True)
def test_the_first_span_can_be_fetched_though_none_is_live(garbage, no_queries):
    """Its blocks are copied to the chip whatever `count` says."""
    lens = [(0, 9)] * (3 if no_queries else 0)
    taken = tiles_of_jit(*index_arrays(lens, ROWS, garbage), num_tokens=24, q_tile=8)
    for tiles, num_blocks in zip(taken, (ROWS, 3), strict=True):
        table, count = make_spans(
            tiles,
            page_size=PAGE_SIZE,
            table_part=16,
            num_rows=ROWS,
            num_parts=3,
            variant=AttentionVariant(sliding_window=20),
        )
        first = dict(zip(spans.FIELDS, np.asarray(table)[:, 0].tolist(), strict=True))
        assert count == 0
        assert 0 <= first["part"] < ROWS * 3
        assert 0 <= first["block"] < num_blocks


make_strips = jax.jit(
    pages._make_strips, static_argnames=("num_tokens", "page_size", "strip_slots")
)


def strips_of(lens, garbage, num_tokens, page_size, strip_slots):
    """Strips as tuples in the order of their fields, and the page table that they index."""
    rng = np.random.default_rng(len(lens))
    table = rng.permutation(ROWS * PAGES_PER_SEQ).astype(np.int32).reshape(ROWS, PAGES_PER_SEQ)
    strips, count = make_strips(
        Rows(table, *index_arrays(lens, ROWS, garbage)),
        num_tokens=num_tokens,
        page_size=page_size,
        strip_slots=strip_slots,
    )
    assert 0 <= count <= strips.shape[1]
    return columns(strips, count), table


@pytest.mark.parametrize(
    ("num_tokens", "page_size", "strip_slots"),
    [(5, 8, 8), (40, 64, 8), (40, 16, 16), (40, 96, 32)],
)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_new_token_is_in_one_strip(num_tokens, page_size, strip_slots, data):
    lens, garbage = data.draw(steps(num_tokens, page_size * PAGES_PER_SEQ))
    strips, table = strips_of(lens, garbage, num_tokens, page_size, strip_slots)
    written, token = {}, 0
    for row, (q_len, kv_len) in enumerate(lens):
        for position in range(kv_len - q_len, kv_len):
            written[token] = (int(table[row, position // page_size]), position % page_size)
            token += 1
    got = [
        (token + i, (page, slot + first + i))
        for page, slot, first, end, token in strips
        for i in range(end - first)
    ]
    assert got == list(written.items())
    assert len({strip[:2] for strip in strips}) == len(strips)
    for _, slot, first, end, _ in strips:
        assert slot % strip_slots == 0 and 0 <= first < end <= strip_slots


@pytest.mark.parametrize("strip_slots", [8, 16, 32])
def test_no_step_has_more_strips_than_the_list(strip_slots):
    """Each row starts where it meets most strips, at the last slot of one."""
    for q_lens in ([2] * ROWS, [strip_slots + 2] * ROWS):
        lens = [(q_len, strip_slots - 1 + q_len) for q_len in q_lens]
        strips, _ = strips_of(lens, [], sum(q_lens), 64, strip_slots)
        want = sum(1 + -(-(q_len - 1) // strip_slots) for q_len in q_lens)
        assert len(strips) == want
