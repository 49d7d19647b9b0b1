# SPDX-License-Identifier: Apache-2.0
"""Decode with keys as rows: interpreted with its barriers, and what it takes of a chip."""

import jax.numpy as jnp
import pytest

from jpaged.pallas_kernels import conformance
from jpaged.pallas_kernels.gpu import mosaic, narrow
from tests.pallas_kernels.mosaic_calls import B200, H100, arguments, check, interpreted

CASES = conformance.suite(jnp.bfloat16)
# Of steps that have no more tokens than rows.
NARROW = (
    *(f"decode, page_size {size}" for size in (8, 16, 64, 256)),
    *(f"sliding_window {window}, pages below released, decode" for window in (1, 17, 100)),
    "decode without padding",
)
NARROW_ALWAYS = {"decode, page_size 16", "sliding_window 17, pages below released, decode"}


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


@pytest.mark.parametrize("kv_dtype", [None, jnp.int8], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_a_plan_fits_the_chip(head_dim, kv_dtype):
    plan = narrow.plan_attention(*arguments(head_dim=head_dim, kv_dtype=kv_dtype), H100)
    num_stages = mosaic.choose_stages(plan, H100)
    assert mosaic.smem_bytes(plan, num_stages) <= H100.smem_bytes and num_stages >= 2
    assert mosaic.is_narrow(plan) and plan.tile_tokens == 1


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
