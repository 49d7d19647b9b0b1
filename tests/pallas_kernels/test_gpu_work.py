# SPDX-License-Identifier: Apache-2.0
"""How attention is cut into tiles and splits for GPUs, and put together again."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.pallas_kernels.gpu import work
from jpaged.pallas_kernels.gpu.chip import Chip
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant

ROWS, CAPACITY = 6, 40
GARBAGE = st.sampled_from([0, 1, -1, 7, 10**6, 2**31 - 1, -(2**31)])


def plan_of(
    num_tokens,
    *,
    num_rows=ROWS,
    heads=(6, 2),
    tile_rows=16,
    block_tokens=4,
    num_sms=1,
    capacity=CAPACITY,
):
    rows = ((num_rows, capacity // 8), (num_rows,), (num_rows + 1,), (1,))
    return work.plan_attention(
        jax.ShapeDtypeStruct((num_tokens, heads[0], 32), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 99, heads[1], 8, 64), jnp.bfloat16),
        Rows(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in rows)),
        tile_rows=tile_rows,
        block_tokens=block_tokens,
        chip=Chip("some", (9, 0), num_sms, 2**17),
    )


@st.composite
def steps(draw, num_tokens):
    """Live rows' `(q_len, kv_len)`, and rows whose padding holds garbage."""
    lens, left = [], num_tokens
    for _ in range(draw(st.integers(0, ROWS))):
        q_len = min(left, draw(st.integers(0, 3) | st.integers(0, CAPACITY)))
        left -= q_len
        lens.append((q_len, q_len + draw(st.integers(0, CAPACITY - q_len))))
    garbage = draw(st.lists(GARBAGE, min_size=2 * ROWS, max_size=2 * ROWS))
    spare = ROWS - len(lens)
    cu = [0, *itertools.accumulate(q_len for q_len, _ in lens)]
    kv_lens = [kv_len for _, kv_len in lens] + garbage[:spare]
    arrays = (kv_lens, cu + garbage[spare : 2 * spare], [len(lens)])
    return lens, rows_of(*arrays)


def rows_of(kv_lens, cu_q_lens, num_seqs):
    """Rows of which the page table does not matter."""
    arrays = (np.array(array, np.int32) for array in (kv_lens, cu_q_lens, num_seqs))
    return Rows(np.zeros((len(kv_lens), 1), np.int32), *arrays)


make_tiles = jax.jit(work.make_tiles, static_argnums=1, static_argnames=("plan", "variant"))


@pytest.mark.parametrize("num_sms", [1, 40], ids=["few splits", "many splits"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("num_tokens", "heads"), [(5, (6, 2)), (33, (6, 2)), (33, (16, 1))])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_every_query_is_in_one_tile_and_every_key_it_sees_in_one_split(
    num_tokens, heads, window, num_sms, data
):
    plan = plan_of(num_tokens, heads=heads, num_sms=num_sms)
    lens, rows = data.draw(steps(num_tokens))
    variant = AttentionVariant(sliding_window=window)
    tiles, splits = make_tiles(rows, num_tokens, plan=plan, variant=variant)
    owners, token_splits = {}, {}
    for row in np.asarray(tiles).tolist():
        tile = dict(zip(work.FIELDS, row, strict=True))
        # As the kernels do it, in 32 bits.
        cut = [
            (start, min(start + tile["split_blocks"], tile["end_block"]))
            for i in range(plan.num_splits)
            if (start := tile["first_block"] + i * tile["split_blocks"])
            < min(start + tile["split_blocks"], tile["end_block"])
        ]
        if not cut:
            assert tile["first_block"] == tile["end_block"] == 0
            continue
        assert 0 <= tile["first"] <= plan.query_rows - plan.tile_rows
        assert 0 <= tile["own_start"] < tile["own_end"] <= plan.tile_rows
        seen = [block for start, end in cut for block in range(start, end)]
        first, last = (tile["first"] + tile[name] for name in ("own_start", "own_end"))
        for query_row in range(first, last):
            token = query_row // plan.group
            position = token + tile["to_position"]
            lowest = 0 if window is None else max(0, position - window + 1)
            wanted = range(lowest // plan.block_tokens, position // plan.block_tokens + 1)
            assert [block for block in seen if block in wanted] == list(wanted)
            assert query_row not in owners
            owners[query_row] = (tile["seq"], position)
            token_splits[token] = len(cut)
        assert tile["end_position"] == owners[last - 1][1] + 1
    queries = [(s, kv - q + i) for s, (q, kv) in enumerate(lens) for i in range(q)]
    want = {
        token * plan.group + head: query
        for token, query in enumerate(queries)
        for head in range(plan.group)
    }
    assert owners == want
    want_splits = [token_splits.get(token, 0) for token in range(num_tokens)]
    assert np.asarray(splits).tolist() == want_splits


def test_where_keys_are_cut_depends_on_no_other_sequence():
    plan = plan_of(3, num_sms=40)
    cu_q_lens = [0, 1, 2, 3, 3, 3, 3]
    alone = rows_of([40, 0, 0, 0, 0, 0], cu_q_lens, [1])
    among = rows_of([40, 9, 30, 0, 0, 0], cu_q_lens, [3])
    for rows in (alone, among):
        tiles, splits = make_tiles(rows, 3, plan=plan, variant=AttentionVariant())
        assert (splits[0], tiles[0, work.FIELDS.index("split_blocks")]) == (2, 5)


@pytest.mark.parametrize("num_tokens", [3, 21])
def test_query_rows_are_merged_back(num_tokens):
    """One split, whose results are the queries themselves."""
    plan = plan_of(num_tokens)
    assert plan.num_splits == 1
    q = jax.random.normal(jax.random.key(0), (num_tokens, 6, 32), jnp.bfloat16)
    rows = work.to_query_rows(q, plan)
    assert rows.shape == plan.out_type.shape[1:] and rows.dtype == plan.out_type.dtype
    splits = jnp.where(jnp.arange(num_tokens) == 1, 0, 1)
    merged = work.merge_splits(rows[None], splits, plan)
    np.testing.assert_array_equal(merged, q.at[1].set(0))


@pytest.mark.parametrize("join", [work._join_few, work._join_many])
def test_splits_are_weighted_by_their_sums(join, monkeypatch):
    """Against one softmax over all keys, in float64; what no split gave is NaN."""
    monkeypatch.setattr(work, "_join_few", join)
    plan = plan_of(4, num_sms=40)
    assert plan.num_splits == 2
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(2, 2, 12, 5)) * 9, rng.normal(size=(2, 2, 12, 5, 32))
    weights = np.exp(scores)
    parts = (weights[..., None] * values).sum(3) / weights.sum(3)[..., None]
    out = np.full(plan.out_type.shape, np.nan, np.float32)
    out[:, :, :12, :32] = parts
    out[:, :, :12, 32:] = np.log(weights.sum(3))[..., None]
    splits = np.array([2, 1, 0, 2], np.int32)
    out[1, :, 3:6] = np.nan  # token 1 has one split
    out[:, :, 6:9] = np.nan  # token 2 is padding
    merged = np.asarray(work.merge_splits(out, splits, plan), np.float64)
    both = (weights[..., None] * values).sum((0, 3)) / weights.sum((0, 3))[..., None]
    want = both.reshape(2, 4, 3, 32).swapaxes(0, 1)
    want[1] = parts[0].reshape(2, 4, 3, 32)[:, 1]
    want[2] = 0
    np.testing.assert_allclose(merged, want.reshape(4, 6, 32), rtol=2**-7, atol=2**-9)


class TestPlan:
    @pytest.mark.parametrize(
        ("num_rows", "num_splits"),
        # Thread blocks, 264 at a time: 480, 512, 512, 512, 960, 512, 4096.
        [(1, 60), (8, 8), (16, 4), (32, 2), (40, 3), (64, 1), (512, 1)],
    )
    def test_splits_of_decode_fill_the_chip(self, num_rows, num_splits):
        sizes = {"heads": (32, 8), "num_sms": 132, "capacity": 32768, "block_tokens": 64}
        assert plan_of(num_rows, num_rows=num_rows, **sizes).num_splits == num_splits

    def test_a_long_prompt_is_not_split_and_a_short_chunk_is(self):
        sizes = {"num_rows": 16, "heads": (32, 8), "num_sms": 132, "tile_rows": 128}
        sizes |= {"capacity": 8192, "block_tokens": 64}
        assert plan_of(2048, **sizes).num_splits == 1
        assert plan_of(64, **sizes).num_splits == 1
        assert plan_of(17, **sizes | {"num_rows": 1}).num_splits == 16

    def test_short_contexts_are_not_split(self):
        plan = plan_of(1, num_rows=1, num_sms=132, capacity=256, block_tokens=64)
        assert plan.num_splits == 1

    def test_more_query_heads_than_a_tile_has_rows(self):
        message = "^backend 'gpu' takes up to 16 query heads a KV head, not 34 for 2$"
        with pytest.raises(ValueError, match=message):
            plan_of(5, heads=(34, 2))
