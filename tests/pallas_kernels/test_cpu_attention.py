# SPDX-License-Identifier: Apache-2.0
"""Attention by the kernel for CPUs, for this processor and for others with shorter vectors."""

import ctypes
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged import pallas_kernels
from jpaged.pallas_kernels import dispatch
from jpaged.pallas_kernels.conformance import dense_attention, make_case
from tests import tolerances

pytest.importorskip("llvmlite")

from llvmlite import ir

from jpaged.pallas_kernels.cpu import attention, vectors
from jpaged.pallas_kernels.cpu.chip import Chip, host_chip
from jpaged.pallas_kernels.cpu.compiled import Compiled
from jpaged.pallas_kernels.cpu.emitter import F32, I64, PTR, Emitter, function, i64

HOST = host_chip()
if HOST is None:
    pytest.skip("no kernels for this processor", allow_module_level=True)
# Of the same processor, with shorter vectors: LLVM lets a machine of wide ones have short ones too.
CHIPS = {lanes: Chip(lanes, 3, 3, HOST.cpu, HOST.features) for lanes in (4, 8)}
CHIPS[HOST.lanes] = HOST
KERNEL = "jpaged_attention_"

DECODE = [(1, 1), (1, 16), (1, 17), (1, 130), (1, 257), (1, 3)]
PREFILL = [(1, 1), (4, 4), (16, 16), (40, 40), (33, 65), (2, 130)]
MIXED = [(1, 9), (5, 5), (1, 140), (70, 133), (0, 6), (3, 8), (1, 1)]


@pytest.fixture(params=CHIPS)
def chip(request, monkeypatch):
    """A processor, for which kernels are made meanwhile."""
    monkeypatch.setattr(attention, "host_chip", lambda: CHIPS[request.param])
    return CHIPS[request.param]


def attend_with(case, **kwargs):
    """What attends, and its arguments."""
    call = functools.partial(pallas_kernels.paged_attention, backend="cpu", **kwargs)
    arrays = jnp.asarray(case.q, case.dtype), jnp.asarray(case.kv_pages, case.dtype)
    named = {"layer": jnp.int32(case.layer)}
    if case.sinks is not None:
        named["sinks"] = jnp.asarray(case.sinks)
    return jax.jit(call), (*arrays, *map(jnp.asarray, case.index)), named


def run(case, **kwargs):
    attend, arguments, named = attend_with(case, **kwargs)
    assert KERNEL in attend.lower(*arguments, **named).as_text(), "XLA computes it"
    return np.asarray(attend(*arguments, **named), np.float64)


def check(case, **kwargs):
    want = dense_attention(case, **kwargs)[0]
    np.testing.assert_allclose(
        run(case, **kwargs), want, atol=tolerances.ATTENTION[np.dtype(np.float32)], rtol=0
    )


@pytest.mark.parametrize("lens", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])
@pytest.mark.parametrize("page_size", [1, 4, 16, 24, 48, 256])
def test_equals_dense_attention(chip, lens, page_size):
    check(make_case(lens, page_size=page_size, head_dim=64, pad_tokens=0 if lens is DECODE else 3))


@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (9, 3), (8, 8), (40, 1)])
@pytest.mark.parametrize("head_dim", [16, 80, 128, 256])
def test_heads(chip, heads, head_dim):
    """40 queries of a KV head are more than a piece of several tokens has; 256 lanes are chunks."""
    num_q_heads, num_kv_heads = heads
    case = make_case(
        [(1, 20), (9, 9), (37, 40)],
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=16,
    )
    check(case)


@pytest.mark.parametrize("window", [1, 4, 16, 17, 129])
def test_sliding_window(chip, window):
    check(make_case(MIXED, head_dim=32, page_size=16), sliding_window=window)
    check(
        make_case(MIXED, head_dim=32, page_size=4, released=True, sliding_window=window),
        sliding_window=window,
    )
    check(make_case(DECODE, head_dim=32, page_size=16, pad_tokens=0), sliding_window=window)


def test_scale_and_lanes_past_the_values(chip):
    check(make_case(MIXED, head_dim=32, page_size=16, lane_padding=96), sm_scale=0.7)


def test_no_live_row_gives_zeros():
    case = make_case([(1, 3), (2, 5)], head_dim=16, page_size=16)
    case.rows.num_seqs[0] = 0
    assert not run(case).any()


def test_hand_worked(chip):
    """Two keys with scores 0 and ln 3 weigh their values 1/4 and 3/4."""
    lanes = 16
    case = make_case(
        [(1, 2)], num_q_heads=1, num_kv_heads=1, head_dim=lanes, page_size=16, pad_tokens=0
    )
    page = case.rows.page_table[0, 0]
    case.q[0, 0] = np.eye(1, lanes)
    case.kv_pages[1, page, 0, 0] = [0.0, *[5.0] * (lanes - 1), 8.0, *[0.0] * (lanes - 1)]
    case.kv_pages[1, page, 0, 1] = [np.log(3.0), *[7.0] * (lanes - 1), 0.0, *[4.0] * (lanes - 1)]
    assert case.layer == 1
    want = [2.0, *[3.0] * (lanes - 1)]
    np.testing.assert_allclose(run(case, sm_scale=1.0)[0, 0], want, atol=1e-6)


@pytest.mark.parametrize("sink", [-np.inf, -3.0, 0.5, 30.0, 200.0])
def test_sinks(sink):
    """200 leaves the keys nothing that float32 can tell."""
    check(make_case(MIXED, head_dim=32, page_size=16, sinks=[sink, 1.0]))


def test_scores_of_any_size():
    """Weights from 1 down to nothing, and scores that float32 just holds."""
    for factor in (1e-20, 30.0, 1e15):
        case = make_case(MIXED, head_dim=32, page_size=16)
        case.q *= factor
        out = run(case)
        assert np.isfinite(out).all()
        if factor < 1e10:
            want = dense_attention(case)[0]
            np.testing.assert_allclose(out, want, atol=2e-4, rtol=0)


@given(
    lens=st.lists(
        st.integers(1, 300).flatmap(
            lambda kv: st.tuples(st.one_of(st.just(1), st.integers(0, kv)), st.just(kv))
        ),
        min_size=1,
        max_size=5,
    ),
    page_size=st.sampled_from([1, 2, 3, 8, 16, 24, 48, 128]),
    group=st.integers(1, 3),
    window=st.sampled_from([None, 1, 5, 16, 100]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_any_lengths(lens, page_size, group, window, seed):
    case = make_case(
        lens,
        page_size=page_size,
        num_q_heads=2 * group,
        head_dim=16,
        seed=seed,
        num_layers=1,
        layer=0,
    )
    check(case, sliding_window=window)


wide_case = functools.partial(make_case, num_q_heads=6, num_kv_heads=2, head_dim=64)


class TestBits:
    """A query's bits depend on its own keys and values, and on nothing else."""

    @pytest.mark.parametrize("window", [None, 40])
    def test_chunks_and_company(self, chip, window):
        """A prompt at once, in chunks, its last token alone, and beside other rows."""
        case = wide_case([(200, 200)], page_size=16, pad_tokens=0, pad_rows=0)
        attend, arguments, named = attend_with(case, sliding_window=window)
        whole = np.asarray(attend(*arguments, **named))
        q, pool, table, *_ = arguments
        for first, last in ((0, 1), (0, 33), (33, 65), (65, 199), (199, 200)):
            index = np.array([last]), np.array([0, last - first]), np.array([1])
            lens = [jnp.asarray(each, jnp.int32) for each in index]
            own = np.asarray(attend(q[first:last], pool, table, *lens, **named))
            np.testing.assert_array_equal(own, whole[first:last])

    @pytest.mark.parametrize("page_size", [1, 4, 6, 16])
    def test_page_sizes(self, page_size):
        """Pages of some size and of 64, with the same keys and values."""
        small = wide_case([(7, 130), (1, 90)], page_size=page_size)
        large = wide_case([(7, 130), (1, 90)], page_size=64)
        for row, length in enumerate((130, 90)):
            for position in range(length):
                cell = small.kv_pages[
                    :, small.rows.page_table[row, position // page_size], :, position % page_size
                ]
                page = large.rows.page_table[row, position // 64]
                large.kv_pages[:, page, :, position % 64] = cell
        large.q[:] = small.q
        np.testing.assert_array_equal(run(small)[:8], run(large)[:8])

    def test_another_row_has_no_numbers(self):
        case = wide_case([(1, 50), (3, 40)], page_size=16)
        before = run(case)
        pages = case.rows.page_table[1, :3]
        case.kv_pages[:, pages] = np.nan
        after = run(case)
        np.testing.assert_array_equal(after[0], before[0])
        assert np.isnan(after[1:4]).all()

    @pytest.mark.parametrize("what", ["a query", "a key", "a query that is too large"])
    def test_what_is_no_number_stays_none(self, chip, what):
        """Of the token that has it, and of what sees it; as XLA has it."""
        case = wide_case([(4, 40)], page_size=16)
        if what == "a key":
            case.kv_pages[1, case.rows.page_table[0, 2], 1, 7 - 1, :64] = np.nan  # position 38
        else:
            case.q[2, 3:] = np.nan if what == "a query" else 3e38
        got, (_, arguments, named) = run(case), attend_with(case)
        xla = functools.partial(pallas_kernels.paged_attention, backend="xla")
        want = np.asarray(jax.jit(xla)(*arguments, **named))
        assert np.isnan(want).any() and not np.isnan(want[:2]).any()
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))

    def test_released_pages_are_not_read(self, chip):
        """What the table has of them may be anything."""
        case = wide_case([(1, 50), (3, 40)], page_size=4)
        want = run(case, sliding_window=10)
        case.rows.page_table[0, :10] = 2**31 - 1  # positions 0 to 39 of which 40 are seen
        case.rows.page_table[1, :7] = 2**31 - 1
        np.testing.assert_array_equal(run(case, sliding_window=10), want)

    def test_many_threads_at_once(self):
        case = wide_case([(1, 2000)] * 8, page_size=16, pad_tokens=0)
        attend, arguments, named = attend_with(case)
        want, different = np.asarray(attend(*arguments, **named)), []

        def again():
            for _ in range(20):
                different.append((np.asarray(attend(*arguments, **named)) != want).any())

        threads = [threading.Thread(target=again) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(different) == 80 and not any(different)


@pytest.mark.parametrize(
    ("shape", "kwargs"),
    [
        ({"head_dim": 20}, {}),
        ({}, {"soft_cap": 2.0}),
        ({"dtype": jnp.bfloat16}, {}),
    ],
    ids=["lanes that are no vectors", "capped", "bfloat16"],
)
def test_xla_computes_the_rest(shape, kwargs):
    case = make_case(MIXED, **({"head_dim": 32, "page_size": 16} | shape))
    attend, arguments, named = attend_with(case, **kwargs)
    assert KERNEL not in attend.lower(*arguments, **named).as_text()
    xla = functools.partial(pallas_kernels.paged_attention, backend="xla", **kwargs)
    want = jax.jit(xla)(*arguments, **named)
    np.testing.assert_array_equal(attend(*arguments, **named), want)


class TestTransformations:
    @pytest.mark.parametrize("sinks", [None, [0.5, -1.0]])
    def test_derivatives(self, sinks):
        case = make_case(MIXED, head_dim=16, page_size=16, sinks=sinks)
        _, (q, pool, *index), named = attend_with(case)
        tangents = jnp.sin(jnp.arange(q.size, dtype=q.dtype)).reshape(q.shape), jnp.zeros_like(pool)

        def of(backend):
            call = functools.partial(pallas_kernels.paged_attention, backend=backend)
            return jax.jvp(lambda q, pool: call(q, pool, *index, **named), (q, pool), tangents)

        for ours, theirs in zip(of("cpu"), of("xla"), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)

    def test_maps(self):
        case = make_case(MIXED, head_dim=16, page_size=16)
        attend, (q, *others), named = attend_with(case)
        both = jax.vmap(lambda q: attend(q, *others, **named))(jnp.stack([q, 2 * q]))
        for each, own in zip((q, 2 * q), both, strict=True):
            np.testing.assert_array_equal(own, attend(each, *others, **named))


def test_arguments_are_checked_as_everywhere():
    case = make_case([(1, 3)], head_dim=16, page_size=16)
    with pytest.raises(ValueError, match="is outside the 2 layers"):
        dispatch.attend(
            jnp.asarray(case.q), jnp.asarray(case.kv_pages), case.rows,
            attention.AttentionVariant(), layer=2, backend="cpu",
        )  # fmt: skip


def test_exponentials(chip):
    """Against float64, to three units in the last place, and at the ends."""
    module = ir.Module()
    code = Emitter(function(module, "exps", [PTR, PTR, I64]))
    x, y, count = code.function.args
    kind = ir.VectorType(F32, chip.lanes)
    with code.loop(i64(0), count, i64(chip.lanes)) as index:
        value = vectors.exp(code, code.load(code.at(x, index), typ=kind, align=4))
        code.store(value, code.at(y, index), align=4)
    code.ret_void()
    compiled = Compiled(module, chip)
    exps = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(
        compiled.address("exps")
    )

    def of(numbers):
        numbers = np.ascontiguousarray(numbers, np.float32)
        out = np.empty_like(numbers)
        exps(numbers.ctypes.data, out.ctypes.data, numbers.size)
        return out

    numbers = np.linspace(-87, 88, 2**16, dtype=np.float32)
    want = np.exp(numbers.astype(np.float64))
    assert (abs(of(numbers) - want) / np.spacing(want.astype(np.float32))).max() < 3
    ends = of(np.array([0, -1e30, -np.inf, 100, np.inf, 1e30, -88, 1] * 2))
    np.testing.assert_array_equal(ends[[0, 3, 4, 5]], [1, np.inf, np.inf, np.inf])
    assert (ends[[1, 2, 6]] < 1.3e-38).all()
