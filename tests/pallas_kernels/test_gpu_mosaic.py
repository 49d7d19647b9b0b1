# SPDX-License-Identifier: Apache-2.0
"""The Mosaic GPU lowering: interpreted with its barriers, what it refuses, and lowering for CUDA.

jax interprets it from 0.11 on. A case takes 3 to 20 s, so that most run nightly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jpaged import pallas_kernels
from jpaged.pallas_kernels import conformance, kv_pages_shape, versions
from jpaged.pallas_kernels.gpu import mosaic, narrow, triton
from jpaged.pallas_kernels.gpu.attention import choose_lowering
from jpaged.pallas_kernels.gpu.chip import Chip, target_chip
from jpaged.pallas_kernels.rows import Rows

ATTEND = functools.partial(pallas_kernels.paged_attention, backend="gpu")
H100 = Chip("NVIDIA H100", (9, 0), 132, 227 * 1024)
B200 = Chip("NVIDIA B200", (10, 0), 148, 227 * 1024)
CASES = conformance.suite(jnp.bfloat16)
# Together: both kinds of step, pages shorter and longer than a block, windows that start within a
# block, odd groups, head_dims of each width of tile, every dtype, several splits, all padding.
ALWAYS = {
    (9, 0): {
        "decode, page_size 8",
        "mixed, page_size 256",
        "sliding_window 17",
        "sliding_window 4, decode",
        "9 query heads, 3 KV heads",
        "head_dim 80, decode",
        "head_dim 256, decode",
        "float16, decode",
        "int8 pages",
        "float8_e4m3fn pages",
        "33,000 tokens, sliding_window 100",
        "sinks, sliding_window 17",
    },
    (10, 0): {"decode, page_size 16", "head_dim 96, mixed", "int8 pages"},
}
# Of steps that have no more tokens than rows.
NARROW = (
    *(f"decode, page_size {size}" for size in (8, 16, 64, 256)),
    *(f"sliding_window {window}, pages below released, decode" for window in (1, 17, 100)),
    "decode without padding",
)
NARROW_ALWAYS = {"decode, page_size 16", "sliding_window 17, pages below released, decode"}
interpreted = pytest.mark.skipif(
    not versions.interprets_mosaic(),
    reason=f"jax {jax.__version__} cannot interpret Mosaic GPU's products; jax 0.11 can",
)


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    """Saves a fifth of the time: a program runs once, and is longer compiled than run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def check(case, capability=(9, 0)):
    with conformance.interpret_gpu(capability):
        conformance.check_attention(ATTEND, case)


@interpreted
@pytest.mark.parametrize(
    ("capability", "name"),
    [
        (capability, name)
        if name in ALWAYS[capability]
        else pytest.param(capability, name, marks=(pytest.mark.nightly, pytest.mark.slow))
        for capability in ALWAYS
        for name in CASES
    ],
    ids=str,
)
def test_conforms(capability, name):
    check(CASES[name](), capability)


def test_what_always_runs_exists():
    assert set(CASES) >= ALWAYS[9, 0] | ALWAYS[10, 0] | NARROW_ALWAYS


@pytest.fixture
def plans(monkeypatch):
    """Has calls take the lowering with keys as rows; gives the plans that it made."""
    made = []

    class Lowering:
        attend_tiles = staticmethod(narrow.attend_tiles)

        @staticmethod
        def plan_attention(*args):
            made.append(narrow.plan_attention(*args))
            return made[-1]

    monkeypatch.setattr("jpaged.pallas_kernels.gpu.attention.choose_lowering", lambda *_: Lowering)
    return made


@interpreted
@pytest.mark.parametrize(
    "name",
    [
        name if name in NARROW_ALWAYS else pytest.param(name, marks=pytest.mark.nightly)
        for name in NARROW
    ],
)
def test_keys_as_rows_conform(plans, name):
    check(CASES[name]())
    (plan,) = plans
    assert mosaic.is_narrow(plan)


@interpreted
@pytest.mark.parametrize("capability", ALWAYS, ids=str)
def test_splits_of_a_prefill_and_garbage_in_padding(capability):
    """Some rows of a tile see nothing of its later splits, and padding points nowhere."""
    lens = [(1, 700), (9, 1100), (0, 5), (40, 900)]
    case = conformance.make_case(
        lens, head_dim=64, num_kv_heads=1, page_size=8, pad_rows=3, dtype=jnp.bfloat16
    )
    for row, (_, kv_len) in enumerate(lens):
        case.rows.page_table[row, -(-kv_len // 8) :] = 10**6
    case.rows.page_table[len(lens) :], case.rows.kv_lens[len(lens) :] = -(10**6), 2**31 - 1
    case.rows.cu_q_lens[len(lens) + 1 :] = 2**31 - 1
    check(case, capability)


@interpreted
def test_a_step_without_rows_gives_zeros():
    case = conformance.make_case([(1, 9)] * 3, head_dim=64, page_size=8, dtype=jnp.bfloat16)
    case.rows.num_seqs[0] = 0
    case.rows.page_table[:], case.rows.kv_lens[:], case.rows.cu_q_lens[1:] = 10**6, 10**6, 10**6
    q = jnp.full(case.q.shape, jnp.nan, jnp.bfloat16)
    with conformance.interpret_gpu():
        out = jax.jit(ATTEND)(q, jnp.asarray(case.kv_pages, jnp.bfloat16), *case.index)
    assert out.shape == q.shape and not np.asarray(out, np.float32).any()


@interpreted
@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_that_is_read_before_its_barrier_is_found(waits):
    def kernel(x_ref, out_ref, held_ref, barrier):
        plgpu.copy_gmem_to_smem(x_ref, held_ref, barrier)
        if waits:
            plgpu.barrier_wait(barrier)
        out_ref[...] = held_ref[...]
        if not waits:
            plgpu.barrier_wait(barrier)

    def run():
        with conformance.interpret_gpu():
            call = plgpu.kernel(
                kernel,
                out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
                scratch_types=[plgpu.SMEM((64, 64), jnp.float32), plgpu.Barrier()],
            )
            jax.block_until_ready(jax.jit(call)(jnp.ones((64, 64))))

    if waits:
        run()
    else:
        with pytest.raises(AssertionError, match=r"^1 of 1 kernels have a race"):
            run()


@interpreted
@pytest.mark.parametrize("start", [8, 4])
def test_a_copy_that_tears_tiles_is_found(start):
    """Interpreted, it is right; on a device, half of the rows would be zeros."""

    def kernel(x_ref, start_ref, out_ref, held_ref, barrier):
        rows = x_ref.at[pl.ds(start_ref[0], 64)]
        plgpu.copy_gmem_to_smem(rows, held_ref, barrier)
        plgpu.barrier_wait(barrier)
        out_ref[...] = held_ref[...]

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def run():
        with conformance.interpret_gpu():
            call = plgpu.kernel(
                kernel,
                out_type=jax.ShapeDtypeStruct((64, 64), jnp.bfloat16),
                scratch_types=[
                    plgpu.SMEM((64, 64), jnp.bfloat16, transforms=tiled),
                    plgpu.Barrier(),
                ],
            )
            out = jax.jit(call)(jnp.ones((128, 64), jnp.bfloat16), jnp.array([start]))
            jax.block_until_ready(out)

    if start % 8 == 0:
        run()
    else:
        with pytest.raises(AssertionError, match="starts at 4, no multiple of 8"):
            run()


def test_an_interpreter_that_is_not_there_is_named(monkeypatch):
    monkeypatch.delattr(plgpu, "InterpretGPUParams", raising=False)
    with pytest.raises(RuntimeError, match="cannot interpret Mosaic GPU's products"):
        with conformance.interpret_gpu():
            pass


def arguments(
    *,
    num_tokens=64,
    heads=(32, 8),
    head_dim=128,
    page_size=16,
    dtype=jnp.bfloat16,
    kv_dtype=None,
    num_pages=99,
    num_layers=2,
):
    shape = kv_pages_shape(num_layers, num_pages, heads[1], page_size, head_dim, backend="gpu")
    return (
        jax.ShapeDtypeStruct((num_tokens, heads[0], head_dim), dtype),
        jax.ShapeDtypeStruct(shape, kv_dtype or dtype),
        Rows(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((64, 128), (64,), (65,), (1,)))),
    )


@pytest.mark.parametrize("chip", [H100, B200], ids=["h100", "b200"])
@pytest.mark.parametrize("num_tokens", [64, 500], ids=["decode", "mixed"])
@pytest.mark.parametrize("kv_dtype", [None, jnp.int8], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_a_plan_fits_the_chip(head_dim, kv_dtype, num_tokens, chip):
    args = arguments(head_dim=head_dim, kv_dtype=kv_dtype, num_tokens=num_tokens)
    for lowering in (mosaic, narrow):
        plan = lowering.plan_attention(*args, chip)
        num_stages = mosaic.choose_stages(plan, chip)
        assert mosaic.smem_bytes(plan, num_stages) <= chip.smem_bytes and num_stages >= 2
        if mosaic.is_narrow(plan):
            assert chip == H100 and num_tokens == 64 and head_dim != 96 and plan.tile_tokens == 1
            assert lowering is narrow
        else:
            assert plan.tile_rows % mosaic.tensor_core_of(chip).rows == 0


@pytest.mark.parametrize(
    ("chip", "changes", "count"),
    [
        (H100, {"head_dim": 64}, 4),
        (H100, {}, 3),
        (H100, {"heads": (17, 1)}, 2),
        (H100, {"head_dim": 96}, 2),
    ],
    ids=["head_dim 64", "usual", "17 heads a group", "head_dim 96"],
)
def test_several_thread_blocks_of_decode_fit_a_multiprocessor(chip, changes, count):
    plan = narrow.plan_attention(*arguments(**changes), chip)
    num_stages = mosaic.choose_stages(plan, chip)
    # CUDA takes 1 KiB of each for itself.
    assert count * (mosaic.smem_bytes(plan, num_stages) + 1024) <= chip.smem_bytes + 1024


@pytest.mark.parametrize(
    ("chip", "changes"),
    [
        (B200, {}),
        (H100, {"num_tokens": 65}),
        (H100, {"heads": (34, 2)}),
        (H100, {"head_dim": 80}),
    ],
    ids=["b200", "more tokens than rows", "17 heads a group", "head_dim 80"],
)
def test_queries_are_rows_where_keys_cannot_be_or_need_not(chip, changes):
    assert not mosaic.is_narrow(narrow.plan_attention(*arguments(**changes), chip))
    assert mosaic.is_narrow(narrow.plan_attention(*arguments(), H100))
    assert not mosaic.is_narrow(mosaic.plan_attention(*arguments(), H100))


@interpreted
@pytest.mark.parametrize(
    "changes",
    [
        dict(num_q_heads=12, num_kv_heads=1, head_dim=64, sliding_window=200),
        *(
            pytest.param(changes, marks=pytest.mark.nightly)
            for changes in (
                dict(head_dim=64, sinks=(0.5, -1.0, 2.0, 9.0)),
                dict(head_dim=256, soft_cap=5.0),
                dict(num_q_heads=2, num_kv_heads=2, head_dim=128),
                dict(head_dim=128, kv_dtype=jnp.int8, kv_scale=(0.03, 0.05)),
                dict(head_dim=64, kv_dtype=jnp.float8_e4m3fn),
            )
        ),
    ],
    ids=str,
)
def test_keys_as_rows_of_rows_with_several_tokens_or_none(plans, changes):
    """A step as small as decode whose rows have several tokens each, and splits."""
    lens = [(3, 300), (0, 5), (1, 1), (4, 700), (0, 9), (0, 70), (0, 1), (0, 3)]
    case = conformance.make_case(lens, page_size=16, pad_tokens=0, dtype=jnp.bfloat16, **changes)
    check(case)
    assert [mosaic.is_narrow(plan) for plan in plans] == [True]


REFUSALS = {
    "float32 pages": (
        {"kv_dtype": jnp.float32},
        "takes pages of the queries' dtype bfloat16, int8 or float8_e4m3fn, not of float32",
    ),
    "head_dim 72": (
        {"head_dim": 72},
        "needs a head_dim that is a multiple of 16 and at most 256 over pages of bfloat16, not 72",
    ),
    "head_dim 80 in 8 bits": (
        {"head_dim": 80, "kv_dtype": jnp.int8},
        "needs a head_dim that is a multiple of 32 and at most 256 over pages of int8, not 80",
    ),
    "head_dim 512": ({"head_dim": 512}, "at most 256 over pages of bfloat16, not 512"),
    "page_size 4": (
        {"page_size": 4},
        "needs a page_size of 8, 16, 32 or a multiple of 64, not 4",
    ),
    "page_size 24": ({"page_size": 24}, "8, 16, 32 or a multiple of 64, not 24"),
    "page_size 96": ({"page_size": 96}, "8, 16, 32 or a multiple of 64, not 96"),
    "65 heads a group": (
        {"heads": (65, 1)},
        "takes up to 64 query heads a KV head, not 65 for 1",
    ),
    "too many cells": (
        {"num_pages": 2**20, "num_layers": 80},
        "more than the 2147483647 that backend 'gpu' counts; lower num_pages",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_with_the_rule(name):
    changes, message = REFUSALS[name]
    with pytest.raises(ValueError, match="backend 'gpu'") as caught:
        mosaic.plan_attention(*arguments(**changes), H100)
    assert message in str(caught.value)


def test_shared_memory_that_does_not_suffice_is_refused():
    chip = Chip("small", (9, 0), 132, 64 * 1024)
    message = (
        r"needs \d+ bytes of shared memory, more than the 65536 that a thread block of 'small'"
    )
    with pytest.raises(ValueError, match=message):
        mosaic.plan_attention(*arguments(head_dim=256), chip)


def on_gpu(name, num_cores=132):
    """What a trace for a GPU that is not there sees."""
    device = AbstractDevice(name, num_cores=num_cores, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
    ("name", "dtype", "want"),
    [
        ("NVIDIA H100 80GB HBM3", jnp.bfloat16, mosaic),
        ("NVIDIA H200", jnp.float16, mosaic),
        ("NVIDIA GB200", jnp.bfloat16, mosaic),
        ("NVIDIA H200", jnp.float32, triton),
        ("NVIDIA A100-SXM4-80GB", jnp.bfloat16, triton),
        ("NVIDIA A10G", jnp.bfloat16, triton),
        ("NVIDIA L4", jnp.bfloat16, triton),
        ("NVIDIA L40S", jnp.bfloat16, triton),
        ("NVIDIA GeForce RTX 4090", jnp.bfloat16, triton),
        ("NVIDIA GeForce RTX 5090", jnp.bfloat16, triton),
    ],
)
def test_the_lowering_of_a_chip(name, dtype, want):
    q = jax.ShapeDtypeStruct((1, 8, 64), dtype)
    with on_gpu(name):
        assert choose_lowering(q, target_chip()) is want


def test_an_unknown_chip_is_refused():
    with on_gpu("NVIDIA Tesla V100"), pytest.raises(ValueError, match="'NVIDIA Tesla V100'"):
        target_chip()


@pytest.mark.parametrize("name", ["NVIDIA H100", "NVIDIA B200"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_tokens": 500, "head_dim": 256}, {"kv_dtype": jnp.int8, "head_dim": 96}],
    ids=["decode", "mixed", "int8"],
)
def test_lowers_for_cuda_without_a_gpu(name, changes):
    with on_gpu(name):
        traced = jax.jit(functools.partial(ATTEND, kv_scale=jnp.ones(2))).trace(
            *jax.tree.leaves(arguments(**changes))
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1


def test_a_group_of_warps_that_is_asked_too_much_of_is_caught_at_lowering():
    """Mosaic GPU itself counts shared memory: 12 MiB of it here."""

    def kernel(out_ref, held_ref):
        del held_ref
        out_ref[...] = jnp.zeros((64, 64))

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
        scratch_types=[plgpu.SMEM((3 * 2**20,), jnp.float32)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    with on_gpu("NVIDIA H100"), pytest.raises(ValueError, match="exceeds available shared memory"):
        jax.jit(call).trace().lower(lowering_platforms=("cuda",))


def test_it_needs_a_gpu_or_interpretation():
    message = r"^backend 'gpu' on platform 'cpu': .*pallas_kernels.conformance.interpret_gpu\(\)$"
    specs = jax.tree.leaves(arguments(num_tokens=2))
    with pytest.raises(ValueError, match=message):
        ATTEND(*(jnp.zeros(spec.shape, spec.dtype) for spec in specs))
