# SPDX-License-Identifier: Apache-2.0
"""How TPU kernels are cut to fit a chip, and what is refused before anything is compiled."""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest

from jpaged.pallas_kernels import kv_pages_shape, tuning
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.tpu.chip import Chip
from jpaged.pallas_kernels.tpu.plan import check_pool, check_scalars, plan_attention, vmem_limit

MIB = 2**20
SMALL, LARGE = Chip("v0", 16 * MIB, MIB), Chip("v0", 128 * MIB, MIB)


def plan_of(
    *,
    num_q_heads=8,
    num_kv_heads=2,
    head_dim=128,
    page_size=16,
    kv_dim=None,
    pages_per_seq=10,
    dtype=jnp.float32,
    kv_dtype=None,
    decode=False,
    chip=LARGE,
):
    shape = kv_pages_shape(2, 99, num_kv_heads, page_size, head_dim, backend="tpu")
    return plan_attention(
        jax.ShapeDtypeStruct((50, num_q_heads, head_dim), dtype),
        jax.ShapeDtypeStruct((*shape[:4], kv_dim or shape[4]), kv_dtype or dtype),
        Rows(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((4, pages_per_seq), (4,), (5,), (1,)))),
        decode=decode,
        chip=chip,
    )


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("chip", [SMALL, LARGE], ids=["16 MiB", "128 MiB"])
@pytest.mark.parametrize("page_size", [8, 16, 48, 256])
@pytest.mark.parametrize("heads", [(1, 1), (14, 2), (32, 8), (64, 8)])
def test_a_plan_fits_and_its_parts_fit_together(heads, page_size, chip, decode):
    num_q_heads, num_kv_heads = heads
    plan = plan_of(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        dtype=jnp.bfloat16,
        decode=decode,
        chip=chip,
    )
    assert vmem_limit(plan.vmem_bytes) <= chip.vmem_bytes
    for power in (plan.q_tile, plan.group_pages):
        assert power & (power - 1) == 0
    assert plan.table_part % plan.group_pages == 0
    assert plan.q_tile == 1 or not decode
    assert plan.group_tokens <= max(page_size, 256)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (
            {"dtype": jnp.float16, "kv_dtype": jnp.float32},
            "backend 'tpu' multiplies bfloat16 and float32, but q has dtype float16; convert it, "
            "or pass backend='xla'",
        ),
        (
            {"kv_dtype": jnp.float16},
            "backend 'tpu' takes pages of bfloat16, float32, int8, float8_e4m3fn, not of float16",
        ),
        (
            {"page_size": 12},
            "backend 'tpu' needs a page_size that is a multiple of 8 and at most 256, not 12",
        ),
        (
            {"page_size": 264},
            "backend 'tpu' needs a page_size that is a multiple of 8 and at most 256, not 264",
        ),
        (
            {"head_dim": 80, "kv_dim": 160},
            "backend 'tpu' needs cells of a multiple of 128 lanes, not 160; "
            "kv_pages_shape(..., backend='tpu') gives them",
        ),
    ],
    ids=["queries", "pages", "page_size", "long pages", "kv_dim"],
)
def test_what_the_chip_cannot_do_is_refused_with_the_rule(options, rule):
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        plan_of(**options)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
def test_pools_of_kv_pages_shape_are_taken(head_dim, dtype):
    shape = kv_pages_shape(1, 5, 2, 8, head_dim, backend="tpu")
    check_pool(jax.ShapeDtypeStruct(shape, dtype))


def test_a_page_too_large_for_the_chip_is_refused_with_both_sizes():
    """Two pages of 256 tokens, 128 heads, 256 lanes of bfloat16 are 32 MiB by themselves."""
    heads = {"num_q_heads": 128, "num_kv_heads": 128}
    options = heads | {"page_size": 256, "dtype": jnp.bfloat16}
    with pytest.raises(
        ValueError,
        match=r"^attention over pages of 256 tokens, 128 KV heads and 256 lanes needs (\d+) bytes "
        r"of vector memory, more than the 13631488 that a v0 has for it; lower page_size, or "
        r"shard the KV heads over more chips$",
    ) as error:
        plan_of(**options, chip=SMALL)
    needed = int(re.search(r"needs (\d+)", str(error.value))[1])
    assert 32 * MIB < needed == plan_of(**options, decode=True).vmem_bytes


class TestTuning:
    def test_a_share_of_a_layers_heads_gets_the_tiles_of_the_layer(self):
        whole = tuning.tpu_tiles("v5e", num_q_heads=64, num_kv_heads=8, head_dim=128)
        assert whole == tuning.TPU_ROWS["v5e", 64, 8, 128].tiles
        assert whole == tuning.tpu_tiles("v5e", num_q_heads=16, num_kv_heads=2, head_dim=128)

    def test_the_closest_number_of_kv_heads_counts(self, monkeypatch):
        rows = {
            ("v0", 8 * kv_heads, kv_heads, 64): tuning.TpuRow(tuning.TpuTiles(kv_heads, 8), "", "")
            for kv_heads in (2, 8)
        } | {("v1", 32, 4, 64): tuning.TpuRow(tuning.TpuTiles(99, 8), "", "")}
        monkeypatch.setattr(tuning, "TPU_ROWS", rows)
        for kv_heads, closest in ((1, 2), (2, 2), (4, 2), (6, 8), (32, 8)):
            tiles = tuning.tpu_tiles(
                "v0", num_q_heads=8 * kv_heads, num_kv_heads=kv_heads, head_dim=64
            )
            assert tiles.group_tokens == closest

    @pytest.mark.parametrize("group", [1, 3, 7, 16, 1000])
    def test_heads_like_no_row_get_what_most_rows_have(self, group):
        tiles = tuning.tpu_tiles("v9", num_q_heads=group, num_kv_heads=1, head_dim=64)
        assert tiles.group_tokens == 256
        assert tiles.q_tile & (tiles.q_tile - 1) == 0 and 8 <= tiles.q_tile <= 128
        assert tiles.q_tile * group <= max(256, 8 * group)


def test_tiles_of_queries_shrink_before_groups_of_pages():
    """Every chip between plenty and too little: q_tile falls to 1 before group_pages falls."""
    options = {"num_q_heads": 32, "num_kv_heads": 8, "dtype": jnp.bfloat16}
    most = plan_of(**options, chip=Chip("v0", 64 * MIB, MIB))
    plans = []
    for vmem in range(most.vmem_bytes + 3 * MIB, 0, -64 * 1024):
        try:
            plans.append(plan_of(**options, chip=Chip("v0", vmem, MIB)))
        except ValueError:
            break
        assert plans[-1].vmem_bytes + 3 * MIB <= vmem
    steps = list(dict.fromkeys((plan.q_tile, plan.group_pages) for plan in plans))
    assert most == plans[0] and steps[0] == (64, 16) and steps[-1] == (1, 1)
    for (q_tile, pages), after in itertools.pairwise(steps):
        if q_tile > 1:
            assert after[0] < q_tile and (after[1] == pages or after[0] == 1)
        else:
            assert after[0] == 1 and after[1] < pages


def test_vector_memory_computed_by_hand():
    """14 query heads on 2 of 80 lanes, bfloat16 over int8, q_tile 4, pages of 32 by groups of 2."""
    tiles = tuning.TpuTiles(group_tokens=64, q_tile=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "tpu_tiles", lambda *_, **__: tiles)
        plan = plan_of(
            num_q_heads=14, head_dim=80, page_size=32, dtype=jnp.bfloat16, kv_dtype=jnp.int8
        )
    assert (plan.head_queries, plan.score_rows, plan.block_rows) == (28, 32, 32)
    assert (plan.group_pages, plan.softmax_heads, plan.kv_dim) == (2, 2, 256)
    queries = results = 2 * 32 * 128 * 2  # heads, rows, lanes, bytes
    pages = 2 * 2 * 32 * 256 * 1  # pages, heads, slots, lanes, bytes
    peak = total = 2 * 32 * 128 * 4
    sums = 2 * 32 * 256 * 4
    scores = 2 * 32 * 128 * 4  # 64 tokens take 128 lanes
    assert plan.vmem_bytes == 2 * (queries + results + pages) + peak + total + sums + scores


@pytest.mark.parametrize(
    ("head_dim", "key_lanes", "value_lanes"),
    [
        (32, 128, (0, 128)),
        (64, 128, (0, 128)),
        (80, 128, (0, 256)),
        (96, 128, (0, 256)),
        (128, 128, (128, 256)),
        (192, 256, (128, 384)),
        (256, 256, (256, 512)),
    ],
)
def test_lanes_that_are_multiplied(head_dim, key_lanes, value_lanes):
    """Whole registers, that hold the key or the value, within the cell."""
    plan = plan_of(head_dim=head_dim)
    assert (plan.key_lanes, plan.value_lanes) == (key_lanes, value_lanes)
    start, end = plan.value_lanes
    assert plan.key_lanes >= head_dim and start <= head_dim and 2 * head_dim <= end
    assert max(plan.key_lanes, end) <= plan.kv_dim and plan.acc_lanes == end - start


@pytest.mark.parametrize(
    ("pages_per_seq", "table_part"), [(1, 128), (128, 128), (129, 256), (2048, 2048), (9999, 2048)]
)
def test_long_page_tables_come_in_parts(pages_per_seq, table_part):
    plan = plan_of(pages_per_seq=pages_per_seq)
    assert plan.table_part == table_part
    # 8 fields of 300 spans and one, in whole tiles of 128; four buffers of a part.
    assert plan.smem_bytes(300) == 4 * (8 * 384 + 4 * table_part)


def test_too_long_a_list_of_work_is_refused_with_both_sizes():
    limit = MIB - 2**17
    check_scalars("attention", limit, 5, SMALL)
    with pytest.raises(
        ValueError,
        match=f"^attention of 5 rows needs {limit + 1} bytes of scalar memory, more than the "
        f"{limit} that a v0 has for it; lower max_num_seqs, max_model_len or "
        "max_num_batched_tokens, or raise page_size$",
    ):
        check_scalars("attention", limit + 1, 5, SMALL)
