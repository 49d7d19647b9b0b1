# SPDX-License-Identifier: Apache-2.0
"""The Triton lowering: the conformance suite interpreted, what it refuses, and lowering for CUDA.

Interpreted, a case takes about a second, nearly all of it compilation, so that most run nightly.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jpaged.pallas_kernels import conformance, kv_pages_shape
from jpaged.pallas_kernels.gpu import triton, work
from jpaged.pallas_kernels.gpu.chip import Chip
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant

A100 = Chip("NVIDIA A100", (8, 0), 108, 163 * 1024)
L4 = Chip("NVIDIA L4", (8, 9), 58, 99 * 1024)
CASES = conformance.suite()
# Together: every kind of step, pages shorter and longer than a block, one split and several,
# windows that start within a block, odd groups, lanes that fill no power of two, every dtype, all
# padding.
ALWAYS = {
    "decode, page_size 256",
    "prefill, page_size 64",
    "mixed, page_size 8",
    "chunks around page boundaries",
    "much padding",
    "sliding_window 17",
    "soft_cap and sm_scale",
    "9 query heads, 3 KV heads",
    "16 query heads, 1 KV heads",
    "head_dim 80, mixed",
    "head_dim 256, decode",
    "bfloat16, mixed",
    "float16, decode",
    "int8 pages",
    "float8_e4m3fn pages",
    "33,000 tokens, sliding_window 100",
    "one row, without queries",
    "sinks, decode",
    "sinks, sliding_window 17",
}


def paged_attention(
    q, kv_pages, *index, layer, kv_scale=None, sinks=None, chip=L4, interpret=True, **variant
):
    rows, variant = Rows(*index), AttentionVariant(**variant)
    plan = triton.plan_attention(q, kv_pages, rows, chip)
    plan = dataclasses.replace(plan, has_sinks=sinks is not None)
    tiles, splits = work.make_tiles(rows, q.shape[0], plan=plan, variant=variant)
    scale = jnp.ones(2, jnp.float32) if kv_scale is None else kv_scale
    out = triton.attend_tiles(
        work.to_query_rows(q, plan),
        kv_pages,
        rows.page_table,
        tiles,
        layer,
        scale * jnp.array([variant.scale(q.shape[-1]), 1.0], jnp.float32),
        plan=plan,
        variant=variant,
        interpret=interpret,
    )
    return work.merge_splits(out, splits, plan, sinks)


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    """Saves a fifth of the time: a program runs once, and is longer compiled than run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ALWAYS
        else pytest.param(name, marks=(pytest.mark.nightly, pytest.mark.slow))
        for name in CASES
    ],
)
def test_conforms(name):
    conformance.check_attention(paged_attention, CASES[name]())


def test_what_always_runs_exists():
    assert set(CASES) >= ALWAYS


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_queries_that_see_nothing_of_a_split_take_nothing_from_it(window, dtype):
    options = {} if window is None else {"sliding_window": window}
    case = conformance.make_case(
        [(100, 900), (1, 1030), (130, 130)],
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=32,
        dtype=dtype,
        **options,
    )
    large = Chip("large", (8, 9), 1000, 99 * 1024)
    plan = triton.plan_attention(
        case.q.astype(dtype), case.kv_pages.astype(dtype), case.rows, large
    )
    assert plan.num_splits >= 4
    conformance.check_attention(functools.partial(paged_attention, chip=large), case)


def test_pages_that_no_query_sees_any_more_are_not_read():
    window, page_size = 40, 4
    case = conformance.make_case(
        [(1, 300), (9, 130)], page_size=page_size, head_dim=32, sliding_window=window
    )
    for row, (q_len, kv_len) in enumerate([(1, 300), (9, 130)]):
        # The null page, which is NaN here.
        case.rows.page_table[row, : (kv_len - q_len - window + 1) // page_size] = 0
    conformance.check_attention(paged_attention, case)


@pytest.mark.parametrize("page_size", [1, 24, 100])
def test_any_page_size_serves(page_size):
    case = conformance.make_case([(1, 130), (40, 99), (3, 5)], page_size=page_size, head_dim=32)
    conformance.check_attention(paged_attention, case)


def test_sixty_four_query_heads_a_kv_head():
    case = conformance.make_case([(1, 70), (3, 9)], num_q_heads=64, num_kv_heads=1, head_dim=32)
    conformance.check_attention(paged_attention, case)


def arguments(
    *,
    num_tokens=8,
    num_q_heads=8,
    num_kv_heads=2,
    head_dim=128,
    page_size=16,
    num_pages=99,
    dtype=jnp.bfloat16,
    kv_dtype=None,
):
    shape = kv_pages_shape(2, num_pages, num_kv_heads, page_size, head_dim, backend="gpu")
    return (
        jax.ShapeDtypeStruct((num_tokens, num_q_heads, head_dim), dtype),
        jax.ShapeDtypeStruct(shape, kv_dtype or dtype),
        Rows(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((8, 64), (8,), (9,), (1,)))),
    )


@pytest.mark.parametrize("num_tokens", [8, 512])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 5, 17, 32])
def test_tiles_hold_a_token_and_fit_the_smallest_chip(group, head_dim, dtype, num_tokens):
    args = arguments(num_tokens=num_tokens, num_q_heads=2 * group, head_dim=head_dim, dtype=dtype)
    plan = triton.plan_attention(*args, L4)
    assert group <= plan.tile_rows <= 128
    for power in (plan.tile_rows, plan.block_tokens):
        assert power >= 16 and power & (power - 1) == 0
    assert num_tokens > 8 or plan.tile_rows <= 2 * max(group, 8)


V100 = Chip("Tesla V100", (7, 0), 80, 96 * 1024)


@pytest.mark.parametrize(
    ("chip", "changes", "message"),
    [
        (V100, {}, "needs compute capability 8.0 or newer, not the 7.0 of a Tesla V100"),
        (A100, {"dtype": jnp.float64}, "float16 and float32, but q has dtype float64"),
        (A100, {"kv_dtype": jnp.float8_e5m2}, "int8, float8_e4m3fn, not of float8_e5m2"),
        (A100, {"kv_dtype": jnp.float8_e4m3fn}, "from compute capability 8.9 on, not on the 8.0"),
        (A100, {"kv_dtype": jnp.float16}, "float16 does not fit bfloat16"),
        (A100, {"kv_dtype": jnp.float32}, "float32 does not fit bfloat16"),
        (A100, {"head_dim": 320}, "takes head_dim up to 256, not 320"),
        (A100, {"num_q_heads": 130}, "takes up to 64 query heads a KV head, not 130 for 2"),
        (
            L4,
            {"dtype": jnp.float32, "head_dim": 256, "num_q_heads": 128},
            "needs 103424 bytes of shared memory, more than the 101376 that a thread block of a",
        ),
        (
            A100,
            {"kv_dtype": jnp.int8, "num_pages": 2**17 + 1},
            "takes pools of int8 of up to 2**31 bytes or of more than 2**32",
        ),
        (A100, {"num_pages": 2**25 + 1}, "kv_pages has 2147483712 in its 2 layers"),
    ],
)
def test_refuses_with_the_rule(chip, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        triton.plan_attention(*arguments(**changes), chip)


def test_takes_pools_on_either_side_of_those_it_refuses():
    for num_pages in (2**17, 2**18 + 1):
        triton.plan_attention(*arguments(num_pages=num_pages, kv_dtype=jnp.int8), A100)
    triton.plan_attention(*arguments(num_pages=2**25), A100)


# jax says that its Triton backend will go: known, see the docstring of the module.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("chip", "changes", "options"),
    [
        (A100, {}, {}),
        (A100, {"num_tokens": 512, "page_size": 256}, {"sliding_window": 100, "soft_cap": 30.0}),
        (A100, {"dtype": jnp.float32, "kv_dtype": jnp.int8, "head_dim": 96}, {}),
        (L4, {"dtype": jnp.float16, "kv_dtype": jnp.float8_e4m3fn, "head_dim": 80}, {}),
        (A100, {"num_pages": 2**22}, {}),
    ],
    ids=["decode", "window and cap", "float32 and int8", "float8", "many pages"],
)
def test_lowers_for_cuda_without_a_gpu(chip, changes, options):
    q, kv_pages, rows = arguments(**changes)
    # jax asks it which GPU it lowers for.
    device = AbstractDevice(chip.name, num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    attend = functools.partial(paged_attention, chip=chip, interpret=False, **options)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda *args: attend(*args[:-1], layer=args[-1])).trace(
            q, kv_pages, *jax.tree.leaves(rows), layer
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 1
    # Interpreted, a product is as exact without it.
    assert ("HIGHEST" in str(traced.jaxpr)) == (q.dtype == jnp.float32)
