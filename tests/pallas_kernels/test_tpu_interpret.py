# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels in interpret mode pass the conformance suite, and a race of copies fails it.

A case takes 4 to 10 s, nearly all of it compilation, so that most run nightly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jpaged import pallas_kernels
from jpaged.pallas_kernels import conformance, tuning
from jpaged.pallas_kernels.tpu import plan

TPU = {
    name: functools.partial(getattr(pallas_kernels, name), backend="tpu")
    for name in ("paged_attention", "write_kv", "copy_pages")
}
# Together: both kinds of steps, small and usual pages, windows that end within and between groups
# of pages, heads that fill no register, every layout of a cell's lanes, and items of each size.
ALWAYS = {
    "decode, page_size 8",
    "mixed, page_size 16",
    "sliding_window 17",
    "head_dim 64, mixed",
    "head_dim 80, decode",
    "bfloat16, decode",
    "int8 pages",
    "one row, without queries",
    "sinks, mixed",
}
REFUSED = {"float16, decode", "float16, mixed"}
CASES = conformance.suite()


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    """Saves a fifth of the time: a program runs once, and is longer compiled than run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def run_only(case, monkeypatch):
    """Runs one case, and not those whose names contain its name."""
    suite = {case: CASES[case]}
    monkeypatch.setattr(conformance.report, "suite", lambda dtype: suite)
    results = list(conformance.run(**TPU, only=case, interpret=conformance.interpret_tpu))
    assert [(result.function, result.case) for result in results] == [(name, case) for name in TPU]
    return results


@pytest.mark.parametrize(
    "case",
    [
        case
        if case in ALWAYS
        else pytest.param(case, marks=(pytest.mark.nightly, pytest.mark.slow))
        for case in CASES
        if case not in REFUSED
    ],
)
def test_conforms(case, monkeypatch):
    results = run_only(case, monkeypatch)
    assert [result for result in results if result.status != "passed"] == []


def test_the_names_above_are_cases():
    assert ALWAYS | REFUSED <= set(CASES)


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_float16_is_refused_with_the_rule(case, monkeypatch):
    results = run_only(case, monkeypatch)
    assert len(results) == 3
    rule = "backend 'tpu' takes pages of bfloat16, float32, int8, float8_e4m3fn, not of float16"
    assert {(result.status, result.detail) for result in results} == {("refused", rule)}


def check(case):
    with conformance.interpret_tpu():
        conformance.check_attention(TPU["paged_attention"], case)


def check_write(case):
    with conformance.interpret_tpu():
        conformance.check_write(TPU["write_kv"], case)


@pytest.mark.parametrize(
    "window",
    [
        pytest.param({}, id="all", marks=(pytest.mark.nightly, pytest.mark.slow)),
        pytest.param({"sliding_window": 1100}, id="window"),
    ],
)
def test_page_tables_that_come_in_parts(window, monkeypatch):
    """A tile of decode has pages of three parts of 128 entries, one of prefill of two."""
    monkeypatch.setattr(plan, "_MAX_TABLE_PART", 128)
    lens = [(1, 2060), (20, 1040)]
    case = conformance.make_case(
        lens, head_dim=128, num_q_heads=2, num_kv_heads=1, page_size=8, **window
    )
    assert case.rows.page_table.shape[1] > 2 * 128
    check(case)


@pytest.mark.parametrize(
    "num_tokens",
    [
        pytest.param(20, id="mixed", marks=(pytest.mark.nightly, pytest.mark.slow)),
        pytest.param(3, id="decode"),
    ],
)
def test_a_step_without_rows_gives_zeros_and_reads_nothing(num_tokens):
    """Every page id is outside the pool, which is an error where one is fetched.

    Copies run as they start: those that nobody waits for would not run otherwise.
    """
    case = conformance.make_case([(1, 9)] * 3, head_dim=128, page_size=8, pad_tokens=num_tokens - 3)
    case.rows.num_seqs[0] = 0
    case.rows.page_table[:], case.rows.kv_lens[:] = 10**6, 10**6
    case.rows.cu_q_lens[1:] = 10**6
    q, pool = jnp.full(case.q.shape, jnp.nan), jnp.asarray(case.kv_pages)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(dma_execution_mode="eager")):
        out = jax.jit(TPU["paged_attention"])(q, pool, *case.index)
        assert out.shape == case.q.shape and not out.any()


def test_a_step_without_rows_writes_nothing():
    case = conformance.make_case([(1, 9)] * 3, head_dim=128, page_size=8)
    case.rows.num_seqs[0] = 0
    check_write(case)


def test_padding_within_the_lanes_of_a_key():
    """64 lanes of NaN follow a value, and queries meet all 128 lanes of the cell."""
    case = conformance.make_case(
        [(1, 9), (5, 12), (1, 30)], head_dim=32, page_size=8, lane_padding=None
    )
    assert case.kv_pages.shape[4] == 128 and np.isnan(case.kv_pages[..., 64:]).all()
    check(case)


def test_rows_share_and_straddle_blocks(monkeypatch):
    """Blocks of 8 tokens hold up to four rows' queries, and most rows are in two blocks."""
    tiles = tuning.TpuTiles(group_tokens=32, q_tile=8)
    monkeypatch.setattr(tuning, "tpu_tiles", lambda *_, **__: tiles)
    lens = [(7, 7), (2, 9), (1, 40), (2, 33), (3, 70), (2, 2), (6, 38), (2, 65), (17, 20), (0, 4)]
    check(conformance.make_case(lens, head_dim=128, page_size=8, pad_rows=3))


def test_no_more_tokens_than_rows_and_garbage_in_padding():
    """Decode's kernel alone; a row of several queries, and padding that points nowhere."""
    lens = [(1, 9), (3, 8), (0, 5), (1, 130), (1, 16)]
    case = conformance.make_case(lens, head_dim=128, page_size=8, pad_rows=4, pad_tokens=2)
    assert len(case.q) < len(case.rows.kv_lens)
    for row, (_, kv_len) in enumerate(lens):
        case.rows.page_table[row, -(-kv_len // 8) :] = 10**6
    case.rows.page_table[len(lens) :], case.rows.kv_lens[len(lens) :] = -(10**6), 10**8
    case.rows.cu_q_lens[len(lens) + 1 :] = 10**8
    check(case)
    check_write(case)


def copy_through(x, *, wait_first):
    """Copies to scratch memory and from there to the result."""

    def kernel(x_ref, out_ref, held_ref, sem):
        copy = pltpu.make_async_copy(x_ref, held_ref, sem)
        copy.start()
        if wait_first:
            copy.wait()
        out_ref[...] = held_ref[...]
        if not wait_first:
            copy.wait()

    return pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
    )(x)


@pytest.mark.parametrize(
    ("kernels_wait", "racy"),
    [([True, True], 0), ([False], 1), ([False, True], 1), ([True, False], 1)],
    ids=["clean", "racy", "racy-clean", "clean-racy"],
)
def test_a_copy_that_is_read_before_its_wait_is_found(kernels_wait, racy):
    def run():
        with conformance.interpret_tpu():
            for wait_first in kernels_wait:
                jax.block_until_ready(copy_through(jnp.ones((8, 128)), wait_first=wait_first))

    if racy:
        with pytest.raises(AssertionError, match=f"^1 of {len(kernels_wait)} kernels have a race"):
            run()
    else:
        run()


def test_a_race_fails_a_case(monkeypatch):
    def races(pool, sources, targets):
        copy_through(jnp.ones((8, 128)), wait_first=False)
        return pallas_kernels.reference.copy_pages(pool, sources, targets)

    (result,) = conformance.run(
        copy_pages=races, only="decode, page_size 64", interpret=conformance.interpret_tpu
    )
    assert result.status == "failed" and "have a race" in result.detail
