# SPDX-License-Identifier: Apache-2.0
"""Batches worked out by hand, and the promise that warm-up knows every shape."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.host.batch import ShapeBuckets, StepShape, build_batch, empty_batch
from jpaged.host.page_pool import NULL_PAGE, PagePool
from jpaged.host.page_table import PageTable
from jpaged.host.params import SamplingParams
from jpaged.host.sequence import Request
from jpaged.host.step import Rows, Samples, StepPlan

PAGES_PER_SEQ = 5


def make_table():
    return PageTable(PagePool(32), page_size=2, pages_per_seq=PAGES_PER_SEQ)


def make_seq(table, tokens, num_prompt_tokens, num_computed, *, seed=0, **params):
    """A sequence as it is just after it was scheduled."""
    params = SamplingParams(**({"max_tokens": 8, "temperature": 0.0} | params)).resolve()
    request = Request("r", tokens[:num_prompt_tokens], params, seed=seed, max_model_len=10)
    (seq,) = request.sequences
    seq.token_ids = list(tokens)
    seq.num_computed_tokens = num_computed
    seq.table_id = table.add()
    table.append(seq.table_id, num_computed)
    return seq


def plan_of(seqs, counts, sources, samples=(), rows=()):
    """The plan of sequences as `make_seq` makes them."""
    starts = [seq.num_computed_tokens - count for seq, count in zip(seqs, counts, strict=True)]
    return StepPlan(
        rows=Rows(
            keys=tuple(seq.key for seq in seqs),
            table_ids=tuple(seq.table_id for seq in seqs),
            starts=tuple(starts),
            num_tokens=tuple(counts),
            token_ids=tuple(
                () if source >= 0 else seq.token_ids[start : start + count]
                for seq, start, count, source in zip(seqs, starts, counts, sources, strict=True)
            ),
            sources=tuple(sources),
        ),
        samples=Samples(
            rows=tuple(rows),
            offsets=tuple(counts[row] - 1 for row in rows),
            draws=tuple(seq.draw for seq in samples),
            processing=(None,) * len(rows),
        ),
    )


@pytest.fixture
def mixed():
    """Four rows, 1 + 1 + 3 + 2 tokens, and four samples."""
    table = make_table()
    known = make_seq(table, [10, 11, 12, 13], 3, 4, seed=7, temperature=0.5, top_k=3)
    on_device = make_seq(table, [20, 21], 2, 3, seed=8, top_p=0.25, logprobs=2)
    on_device.num_inflight_tokens = 2
    chunk = make_seq(table, [30, 31, 32, 33, 34, 35, 36], 7, 5)
    parent = make_seq(table, [40, 41], 2, 2, seed=2**32 - 1, n=2, min_p=0.125, logprobs=3)
    child = parent.request.fork_sequence(parent)
    child.table_id = table.fork(parent.table_id)
    step = plan_of(
        [known, on_device, chunk, parent],
        [1, 1, 3, 2],
        [-1, 6, -1, -1],
        [known, on_device, parent, child],
        [0, 1, 3, 3],
    )
    return step, table


def test_a_mixed_step_by_hand(mixed):
    step, table = mixed
    batch = build_batch(step, table, ShapeBuckets(64, 8))
    assert batch.shape == StepShape(16, 4)
    assert batch.num_seqs.tolist() == [4]
    assert batch.cu_q_lens.tolist() == [0, 1, 2, 5, 7]
    assert batch.kv_lens.tolist() == [4, 3, 5, 2]
    assert batch.positions[:7].tolist() == [3, 2, 2, 3, 4, 0, 1]
    assert batch.previous_slots.tolist() == [-1, 6] + [-1] * 14
    tokens = batch.token_ids.tolist()
    assert tokens[:1] + tokens[2:7] == [13, 32, 33, 34, 40, 41]  # token 1 is on the device
    assert batch.logits_indices.tolist() == [0, 1, 6, 6]
    for table_id, row in zip(step.rows.table_ids, batch.page_table, strict=True):
        pages = table.pages(table_id)
        assert row.tolist() == [*pages, *[NULL_PAGE] * (PAGES_PER_SEQ - len(pages))]


def test_the_parameters_are_those_of_the_samples_not_of_the_rows(mixed):
    batch = build_batch(*mixed, ShapeBuckets(64, 8))
    assert batch.num_samples == 4
    assert batch.sampling.temperature.tolist() == [0.5, 0, 0, 0]
    assert batch.sampling.top_k.tolist() == [3, 0, 0, 0]
    assert batch.sampling.top_p.tolist() == [1, 0.25, 1, 1]
    assert batch.sampling.min_p.tolist() == [0, 0, 0.125, 0.125]
    assert batch.sampling.seeds.tolist() == [7, 8, 2**32 - 1, 2**32 - 1]
    assert batch.sampling.sample_indices.tolist() == [0, 0, 0, 1]
    # The sampled token's position: as many tokens stand before it.
    assert batch.sampling.positions.tolist() == [4, 3, 2, 2]
    assert batch.num_logprobs == 3


def test_padding_cannot_reach_a_live_row():
    table = make_table()
    first = make_seq(table, [10, 11, 12], 3, 3)
    second = make_seq(table, [20, 21], 2, 2)
    step = plan_of([first, second], [3, 2], [-1, -1], [second], [1])
    batch = build_batch(step, table, ShapeBuckets(64, 4))
    assert batch.shape == StepShape(16, 4)
    assert batch.num_seqs.tolist() == [2]
    assert batch.cu_q_lens.tolist() == [0, 3, 5, 5, 5]
    assert batch.kv_lens.tolist() == [3, 2, 0, 0]
    assert (batch.page_table[2:] == NULL_PAGE).all()
    assert batch.logits_indices[0] == 4
    assert batch.num_samples == 1
    assert batch.num_logprobs == 0
    # Padded samples are greedy, which draws nothing, and index what is there.
    assert batch.sampling.temperature[1:].tolist() == [0, 0, 0]
    assert ((0 <= batch.logits_indices) & (batch.logits_indices < 16)).all()
    assert (batch.previous_slots[5:] == -1).all()
    assert (batch.positions[5:] < 10).all() and (batch.positions >= 0).all()


def test_a_step_without_samples():
    table = make_table()
    seq = make_seq(table, [10, 11, 12, 13], 4, 3)
    step = plan_of([seq], [3], [-1])
    batch = build_batch(step, table, ShapeBuckets(16, 4))
    assert batch.num_samples == 0
    assert batch.token_ids[:3].tolist() == [10, 11, 12]


def test_a_chunk_of_one_token_in_the_middle_of_a_prompt():
    table = make_table()
    seq = make_seq(table, [10, 11, 12, 13], 4, 2)
    step = plan_of([seq], [1], [-1])
    batch = build_batch(step, table, ShapeBuckets(16, 4))
    assert batch.token_ids[0] == 11
    assert (batch.positions[0], batch.kv_lens[0]) == (1, 2)


def test_a_decode_step_has_one_token_a_row():
    table = make_table()
    seqs = [make_seq(table, [i, i + 1], 1, 2) for i in range(3)]
    step = plan_of(seqs, [1, 1, 1], [2, -1, 0], seqs, [0, 1, 2])
    batch = build_batch(step, table, ShapeBuckets(64, 8))
    assert batch.shape == StepShape(4, 4)
    assert batch.cu_q_lens.tolist() == [0, 1, 2, 3, 3]
    assert batch.previous_slots.tolist() == [2, -1, 0, -1]
    assert batch.token_ids[1] == 2
    assert batch.positions[:3].tolist() == [1, 1, 1]
    assert batch.logits_indices[:3].tolist() == [0, 1, 2]


def test_one_shape_holds_every_step(mixed):
    batch = build_batch(*mixed, ShapeBuckets(24, 9, single=True))
    assert batch.shape == StepShape(24, 9)
    assert batch.token_ids.shape == (24,)
    assert batch.page_table.shape == (9, PAGES_PER_SEQ)
    assert batch.cu_q_lens.tolist() == [0, 1, 2, 5, 7, 7, 7, 7, 7, 7]
    assert batch.kv_lens.tolist() == [4, 3, 5, 2, 0, 0, 0, 0, 0]


def test_later_changes_of_the_table_do_not_reach_a_batch(mixed):
    step, table = mixed
    batch = build_batch(step, table, ShapeBuckets(64, 8))
    before = batch.page_table.copy()
    table.append(step.rows.table_ids[0], 3)
    table.free(step.rows.table_ids[1])
    np.testing.assert_array_equal(batch.page_table, before)


def test_an_empty_batch_compiles_what_a_real_one_runs(mixed):
    """Warm-up is for nothing if its arrays differ in shape or dtype from those of a real step."""
    real = build_batch(*mixed, ShapeBuckets(64, 8))
    empty = empty_batch(real.shape, PAGES_PER_SEQ, num_logprobs=3)
    assert empty.num_seqs.tolist() == [0]
    assert empty.num_samples == 0
    assert empty.num_logprobs == real.num_logprobs
    assert not empty.kv_lens.any() and not empty.cu_q_lens.any()
    assert (empty.page_table == NULL_PAGE).all()
    assert (empty.previous_slots == -1).all()
    for field in dataclasses.fields(real):
        array, other = getattr(real, field.name), getattr(empty, field.name)
        if isinstance(array, np.ndarray):
            assert (array.shape, array.dtype) == (other.shape, other.dtype), field.name


def test_arrays_have_the_dtypes_of_the_device(mixed):
    batch = build_batch(*mixed, ShapeBuckets(64, 8))
    arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    arrays |= batch.sampling._asdict()
    dtypes = {
        name: array.dtype.name for name, array in arrays.items() if isinstance(array, np.ndarray)
    }
    floats, unsigned = {"temperature", "top_p", "min_p"}, {"seeds", "sample_indices"}
    assert {name for name, dtype in dtypes.items() if dtype == "float32"} == floats
    assert {name for name, dtype in dtypes.items() if dtype == "uint32"} == unsigned
    assert set(dtypes.values()) == {"float32", "uint32", "int32"}


# Shapes.


def reachable_steps(max_num_tokens, max_num_rows):
    """Every (tokens, rows, samples) of a step.

    A row computes a token or more, the last one alone may end without a sample, for want of budget,
    and a prompt's forks sample without rows of their own.
    """
    for rows in range(1, min(max_num_rows, max_num_tokens) + 1):
        for tokens in range(rows, max_num_tokens + 1):
            for samples in range(rows - 1, max_num_rows + 1):
                yield tokens, rows, samples


def check_step(buckets, tokens, rows, samples):
    shape = buckets.shape(tokens, rows, samples)
    assert shape in buckets.all_shapes(), f"{shape} of {tokens, rows, samples} is not warmed up"
    assert shape.num_tokens >= tokens
    assert shape.num_rows >= max(rows, samples)
    assert shape.num_rows <= buckets.max_num_rows


@st.composite
def steps(draw, budgets, single):
    max_num_tokens, max_num_rows = draw(budgets)
    tokens = draw(st.integers(1, max_num_tokens))
    rows = min(draw(st.just(tokens) | st.integers(1, tokens)), max_num_rows)
    samples = draw(st.integers(rows - 1, max_num_rows))
    return ShapeBuckets(max_num_tokens, max_num_rows, draw(single)), tokens, rows, samples


@settings(deadline=None, max_examples=300)
@given(
    steps(
        st.integers(1, 100).flatmap(lambda r: st.tuples(st.integers(r, 600), st.just(r))),
        single=st.booleans(),
    )
)
def test_every_step_has_a_shape_that_holds_it_and_is_warmed_up(step):
    buckets, tokens, rows, samples = step
    check_step(buckets, tokens, rows, samples)
    assert buckets.shape(tokens, rows, samples).num_tokens <= buckets.max_num_tokens


@settings(deadline=None, max_examples=300)
@given(
    steps(
        st.integers(2, 100).flatmap(lambda r: st.tuples(st.integers(1, r - 1), st.just(r))),
        single=st.just(False),  # EngineConfig refuses `deterministic` here
    )
)
def test_so_it_has_where_a_step_has_fewer_tokens_than_places(step):
    check_step(*step)


@pytest.mark.parametrize(
    ("max_num_tokens", "max_num_rows"),
    [
        (tokens, rows)
        for tokens in (1, 2, 3, 7, 16, 17, 20, 32, 33, 48)
        for rows in (1, 2, 3, 4, 5, 6, 8, 9, 16, 17)
        if rows <= tokens
    ],
)
def test_no_shape_is_warmed_up_in_vain(max_num_tokens, max_num_rows):
    buckets = ShapeBuckets(max_num_tokens, max_num_rows)
    reached = {buckets.shape(*step) for step in reachable_steps(max_num_tokens, max_num_rows)}
    assert buckets.all_shapes() == sorted(reached)


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        ((1, 1, 1), (1, 1)),
        ((3, 3, 3), (4, 4)),
        ((9, 9, 9), (16, 16)),
        ((2, 1, 1), (16, 4)),
        ((17, 1, 0), (32, 4)),
        ((17, 4, 5), (32, 16)),
        # Tokens are more than the padded rows, or else it would pass for a decode step.
        ((12, 9, 9), (32, 16)),
        ((33, 9, 9), (64, 16)),
        ((64, 2, 1), (64, 4)),
    ],
)
def test_the_shape_of_a_step_by_hand(step, shape):
    assert ShapeBuckets(64, 16).shape(*step) == StepShape(*shape)


def test_the_shapes_by_hand():
    decode = [(1, 1), (2, 2), (4, 4), (8, 8)]
    other = [(16, 4), (16, 8), (32, 4), (32, 8), (64, 4), (64, 8)]
    assert ShapeBuckets(64, 8).all_shapes() == [StepShape(*shape) for shape in decode + other]


def test_the_shapes_by_hand_where_the_budgets_are_no_powers_of_two():
    shapes = [(1, 1), (2, 2), (4, 4), (6, 6), (16, 4), (16, 6), (20, 4), (20, 6)]
    assert ShapeBuckets(20, 6).all_shapes() == [StepShape(*shape) for shape in shapes]


def test_the_single_shape_is_the_largest():
    buckets = ShapeBuckets(48, 6, single=True)
    assert buckets.all_shapes() == [StepShape(48, 6)]
    assert buckets.shape(1, 1, 1) == buckets.shape(48, 6, 6) == StepShape(48, 6)


def test_the_default_budgets_have_few_shapes():
    assert len(ShapeBuckets(512, 64).all_shapes()) <= 25


@pytest.mark.parametrize("rows", range(1, 65))
def test_a_decode_step_is_padded_to_less_than_twice_its_rows(rows):
    shape = ShapeBuckets(512, 64).shape(rows, rows, rows)
    assert shape.num_tokens == shape.num_rows < 2 * rows
