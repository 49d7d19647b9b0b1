# SPDX-License-Identifier: Apache-2.0
"""The attention contract, for the specification and for each backend, against dense float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged import pallas_kernels
from jpaged.pallas_kernels.conformance import dense_attention, make_case
from tests import tolerances
from tests.pallas_kernels import specification

IMPLEMENTATIONS = {
    "reference": specification.paged_attention,
    "xla": functools.partial(pallas_kernels.paged_attention, backend="xla"),
}

DECODE = [(1, 1), (1, 4), (1, 5), (1, 130), (1, 257), (1, 3)]
PREFILL = [(1, 1), (4, 4), (7, 7), (40, 40), (33, 65), (2, 130)]
MIXED = [(1, 9), (5, 5), (1, 140), (70, 133), (0, 6), (3, 8), (1, 1)]


def run(implementation, case, dtype=jnp.float32, **kwargs):
    attend = jax.jit(functools.partial(IMPLEMENTATIONS[implementation], **kwargs))
    out = attend(
        jnp.asarray(case.q, dtype),
        jnp.asarray(case.kv_pages, dtype),
        *case.index,
        layer=jnp.int32(case.layer),
    )
    assert out.dtype == dtype
    return np.asarray(out, np.float64)


def check(implementation, case, dtype=jnp.float32, **kwargs):
    out, want = run(implementation, case, dtype, **kwargs), dense_attention(case, **kwargs)[0]
    np.testing.assert_allclose(out, want, atol=tolerances.ATTENTION[np.dtype(dtype)], rtol=0)


def nightly(*values):
    """What the conformance suite has most of by default."""
    marks = (pytest.mark.nightly, pytest.mark.slow)
    return [pytest.param(value, marks=marks) for value in values]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestContract:
    @pytest.mark.parametrize("lens", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])
    @pytest.mark.parametrize("page_size", [1, 48, *nightly(4, 16, 256)])
    def test_equals_dense_attention(self, implementation, lens, page_size):
        pad_tokens = 0 if lens is DECODE else 3
        check(implementation, make_case(lens, page_size=page_size, pad_tokens=pad_tokens))

    @pytest.mark.parametrize("heads", [(1, 1), (5, 1), (9, 3), (8, 8), (32, 2)])
    @pytest.mark.parametrize("head_dim", [48, *nightly(80)])
    def test_head_counts(self, implementation, heads, head_dim):
        num_q_heads, num_kv_heads = heads
        case = make_case(
            [(1, 20), (9, 9)],
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
        )
        check(implementation, case)

    @pytest.mark.parametrize("window", [1, 4, 129, *nightly(3, 5, 100)])
    def test_sliding_window(self, implementation, window):
        check(implementation, make_case(MIXED), sliding_window=window)
        check(implementation, make_case(DECODE, pad_tokens=0), sliding_window=window)

    def test_scores_are_scaled_and_capped(self, implementation):
        check(implementation, make_case(MIXED), sm_scale=0.7, soft_cap=1.5)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, implementation, dtype):
        check(implementation, make_case(MIXED, dtype=dtype), dtype)

    def test_lanes_past_the_values_are_ignored(self, implementation):
        check(implementation, make_case(MIXED, lane_padding=96))
        check(implementation, make_case(DECODE, lane_padding=96, pad_tokens=0))

    def test_no_live_row_gives_zeros(self, implementation):
        case = make_case([(1, 3), (2, 5)])
        case.rows.num_seqs[0] = 0
        assert not run(implementation, case).any()

    def test_hand_worked(self, implementation):
        """Two keys with scores 0 and ln 3 weigh their values 1/4 and 3/4."""
        case = make_case(
            [(1, 2)], num_q_heads=1, num_kv_heads=1, head_dim=2, page_size=1, pad_tokens=0
        )
        first, second = case.rows.page_table[0, :2]
        case.q[0, 0] = [1.0, 0.0]
        case.kv_pages[1, first, 0, 0] = [0.0, 5.0, 8.0, 0.0]
        case.kv_pages[1, second, 0, 0] = [np.log(3.0), 7.0, 0.0, 4.0]
        np.testing.assert_allclose(
            run(implementation, case, sm_scale=1.0)[0, 0], [2.0, 3.0], atol=1e-6
        )


@given(
    lens=st.lists(
        st.integers(1, 300).flatmap(
            lambda kv: st.tuples(st.one_of(st.just(1), st.integers(0, kv)), st.just(kv))
        ),
        min_size=1,
        max_size=5,
    ),
    page_size=st.sampled_from([1, 2, 16, 24, 128]),
    group=st.integers(1, 3),
    window=st.one_of(st.none(), st.integers(1, 200)),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_xla_equals_dense_attention_on_any_lengths(lens, page_size, group, window, seed):
    case = make_case(
        lens,
        page_size=page_size,
        num_q_heads=2 * group,
        head_dim=4,
        seed=seed,
        num_layers=1,
        layer=0,
    )
    check("xla", case, sliding_window=window)


def test_chunks_of_a_prompt_give_the_same_bits():
    """A query's result does not depend on which other queries share its step."""
    case = make_case([(200, 200), (1, 77)], head_dim=32, pad_tokens=55)
    whole = run("xla", case)
    for first in (1, 15, 16, 17, 32, 90, 199):
        chunk = make_case([(200, 200), (1, 77)], head_dim=32, pad_tokens=55)
        chunk.q[: 200 - first] = case.q[first:200]
        chunk.q[200 - first] = case.q[200]
        chunk.rows.cu_q_lens[1:] -= first
        np.testing.assert_array_equal(run("xla", chunk)[: 201 - first], whole[first:201])


@pytest.mark.parametrize("pad_tokens", [0, 3], ids=["decode", "mixed"])
def test_page_sizes_give_the_same_bits(pad_tokens):
    def attend(page_size):
        lens = [(1, 1), (1, 130), (1, 257), (1, 96)]
        case = make_case(lens, page_size=page_size, head_dim=32, pad_tokens=pad_tokens)
        for row, (keys, values) in enumerate(case.dense):  # contents depend on the draws before
            rng = np.random.default_rng(row)
            keys[:], values[:] = rng.standard_normal((2, *keys.shape))
            for position in range(len(keys)):
                page = case.rows.page_table[row, position // page_size]
                cell = case.kv_pages[case.layer, page, :, position % page_size]
                cell[:, :32], cell[:, 32:64] = keys[position], values[position]
        case.q[:4] = np.random.default_rng(9).standard_normal(case.q[:4].shape)
        return run("xla", case)[:4]

    want = attend(16)
    for page_size in (4, 8, 128):
        np.testing.assert_array_equal(attend(page_size), want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pool_dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_quantised_pages(implementation, pool_dtype):
    """What is read is the stored number times its scale, and that is near what was written."""
    case = make_case([(q_len, q_len) for q_len, _ in MIXED if q_len], written=False)
    scale = np.array([0.04, 0.05], np.float32)
    write = {"reference": specification.write_kv, "xla": pallas_kernels.write_kv}[implementation]
    pool = write(
        jnp.zeros(case.kv_pages.shape, pool_dtype),
        jnp.asarray(case.k),
        jnp.asarray(case.v),
        *case.index,
        layer=1,
        kv_scale=jnp.asarray(scale),
    )
    cells = np.asarray(pool.astype(jnp.float32))[1].swapaxes(1, 2) * np.repeat(scale, 16)
    for row, written in enumerate(case.dense):
        kv_len = int(case.rows.kv_lens[row])
        stored = cells[case.rows.page_table[row]].reshape(-1, 2, 32)[:kv_len]
        case.dense[row] = stored[..., :16], stored[..., 16:]
        for part, want, step in zip(case.dense[row], written, scale, strict=True):
            # Half a step for integers; float8_e4m3 has 3 bits of mantissa.
            limit = 0.5001 * step if pool_dtype == jnp.int8 else 2**-4 * np.abs(want).max()
            assert np.abs(part - want).max() <= limit
    case.kv_pages = pool
    read = jax.jit(functools.partial(IMPLEMENTATIONS[implementation], layer=1))
    out = read(jnp.asarray(case.q), pool, *case.index, kv_scale=jnp.asarray(scale))
    np.testing.assert_allclose(
        np.asarray(out), dense_attention(case)[0], atol=tolerances.ATTENTION[np.dtype(np.float32)]
    )


def test_cost_follows_live_pages_not_capacity():
    """The compiled step holds no temporary that grows with the table, and none the pool's size."""

    def temp_bytes(pages_per_seq):
        table = jax.ShapeDtypeStruct((8, pages_per_seq), jnp.int32)
        ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        pool = jax.ShapeDtypeStruct((4, 1000, 2, 16, 64), jnp.float32)
        q = jax.ShapeDtypeStruct((8, 4, 32), jnp.float32)
        attend = functools.partial(pallas_kernels.paged_attention, backend="xla")
        lowered = jax.jit(attend).lower(q, pool, table, ints((8,)), ints((9,)), ints((1,)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, large = temp_bytes(8), temp_bytes(4096)
    table_growth = 8 * (4096 - 8) * 4
    assert large - small <= 2 * table_growth  # the padded table itself
    assert small < 4 * 1000 * 2 * 16 * 64 * 4 / 20
