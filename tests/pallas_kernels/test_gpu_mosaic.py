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

from jpaged.pallas_kernels import conformance
from jpaged.pallas_kernels.gpu import mosaic, triton
from jpaged.pallas_kernels.gpu.attention import choose_lowering
from jpaged.pallas_kernels.gpu.chip import Chip, target_chip
from tests.pallas_kernels.mosaic_calls import ATTEND, B200, H100, arguments, check, interpreted

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


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    """Saves a fifth of the time: a program runs once, and is longer compiled than run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


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
    assert set(CASES) >= ALWAYS[9, 0] | ALWAYS[10, 0]


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


@pytest.mark.parametrize("chip", [H100, B200], ids=["h100", "b200"])
@pytest.mark.parametrize("num_tokens", [64, 500], ids=["decode", "mixed"])
@pytest.mark.parametrize("kv_dtype", [None, jnp.int8], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_a_plan_fits_the_chip(head_dim, kv_dtype, num_tokens, chip):
    args = arguments(head_dim=head_dim, kv_dtype=kv_dtype, num_tokens=num_tokens)
    plan = mosaic.plan_attention(*args, chip)
    num_stages = mosaic.choose_stages(plan, chip)
    assert mosaic.smem_bytes(plan, num_stages) <= chip.smem_bytes and num_stages >= 2
    assert plan.tile_rows % mosaic.tensor_core_of(chip).rows == 0


def test_two_thread_blocks_of_decode_fit_a_multiprocessor():
    plan = mosaic.plan_attention(*arguments(), H100)
    num_stages = mosaic.choose_stages(plan, H100)
    assert 2 * mosaic.smem_bytes(plan, num_stages) <= H100.smem_bytes


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
