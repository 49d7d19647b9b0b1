# SPDX-License-Identifier: Apache-2.0
"""The kernels that the TPU compiler makes of our code, for chips that are not there.

Nothing runs: these say that it compiles, what it takes, and what the compiled program does not do.
"""

import jax
import jax.numpy as jnp
import pytest

from jpaged.pallas_kernels.aot.cases import AttentionShape, coverage_cases, rows_struct
from jpaged.pallas_kernels.aot.tpu_kernels import (
    compile_attention,
    compile_case,
    compile_ragged,
    compile_write,
    kv_bytes_per_token,
)
from jpaged.pallas_kernels.tpu.plan import plan_attention

pytestmark = pytest.mark.slow

# Every kind of case somewhere, and each generation with some, of which the newest run by default;
# `tpu_report --coverage` compiles all of them for all.
REPRESENTATIVE = [
    pytest.param("v4", "head_dim 64, page_size 8", marks=pytest.mark.nightly),
    pytest.param("v4", "head_dim 128, int8 pages", marks=pytest.mark.nightly),
    ("v5e", "head_dim 80, float8_e4m3fn pages"),
    pytest.param("v5e", "8 query heads, 8 KV heads", marks=pytest.mark.nightly),
    pytest.param("v5e", "both", marks=pytest.mark.nightly),
    pytest.param("v5e", "131,072 tokens in pages of 8", marks=pytest.mark.nightly),
    pytest.param("v5p", "head_dim 256, float32 pages", marks=pytest.mark.nightly),
    pytest.param("v5p", "9 query heads, 3 KV heads", marks=pytest.mark.nightly),
    ("v6e", "16 query heads, 1 KV heads"),
    pytest.param("v6e", "sinks", marks=pytest.mark.nightly),
    ("v5e", "sinks, 1 row"),
    pytest.param("v6e", "512 rows of 131,072 tokens", marks=pytest.mark.nightly),
    ("7x", "head_dim 96, page_size 64"),
    pytest.param("7x", "head_dim 128, float8_e4m3fn pages", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("target", "name"), REPRESENTATIVE)
def test_what_the_kernels_are_made_for_compiles(tpu_compiler, target, name):
    facts = compile_case(tpu_compiler, target, coverage_cases()[name])
    assert set(facts) == {"decode", "prefill", "write", "copy"}
    assert [fact.error for fact in facts.values()] == [None] * 4


@pytest.mark.parametrize("target", ["v5e", "v6e"])
@pytest.mark.parametrize("head_dim", [128, 64])
def test_decode_reads_pages_once_without_spills_in_few_bundles(tpu_compiler, target, head_dim):
    shape = AttentionShape(32, 8, head_dim)
    facts = compile_attention(tpu_compiler, target, shape, num_rows=64, kv_len=2048)
    assert facts.dma_bytes_per_kv_token == kv_bytes_per_token(shape, jnp.bfloat16)
    assert facts.spill_bytes == 0
    assert facts.bundles_per_kv_token is not None and facts.bundles_per_kv_token <= 3


@pytest.mark.parametrize("target", ["v6e", "7x"])
def test_a_small_pool_stays_in_hbm(tpu_compiler, target):
    """Left to itself, the compiler moves one that fits to vector memory and back in every call."""
    shape = AttentionShape(32, 8, 128)
    facts = compile_attention(tpu_compiler, target, shape, num_pages=64)
    assert facts.dma_bytes_per_kv_token == kv_bytes_per_token(shape, jnp.bfloat16)


def test_fewer_bundles_than_the_ragged_kernel_of_jax(tpu_compiler):
    shape = AttentionShape(32, 8, 128)
    ours = compile_attention(tpu_compiler, "v5e", shape)
    theirs = compile_ragged(tpu_compiler, "v5e", shape)
    assert ours.dma_bytes_per_kv_token == theirs.dma_bytes_per_kv_token
    assert 2 * ours.bundles_per_kv_token < theirs.bundles_per_kv_token


class TestVectorMemory:
    def test_the_compiler_refuses_what_does_not_fit(self, tpu_compiler, monkeypatch):
        monkeypatch.setattr(
            "jpaged.pallas_kernels.tpu.attention.vmem_limit", lambda num_bytes: 2**20
        )
        # A shape of its own, as what was traced is kept.
        facts = compile_attention(tpu_compiler, "v5e", AttentionShape(56, 8, 128))
        assert "vmem" in facts.error.lower()

    def test_validation_refuses_it_first(self, tpu_compiler):
        facts = compile_attention(
            tpu_compiler, "v4", AttentionShape(64, 64, 256), page_size=256, num_rows=4
        )
        assert facts.error.startswith("ValueError: attention over pages of 256 tokens, 64 KV heads")

    def test_validation_refuses_a_write_that_does_not_fit(self, tpu_compiler):
        shape = AttentionShape(64, 64, 256)
        facts = compile_write(tpu_compiler, "v4", shape, kv_dtype=jnp.int8, page_size=32)
        assert facts.error.startswith("ValueError: a token write to 64 KV heads")

    @pytest.mark.parametrize(
        ("target", "num_tokens"),
        [
            ("v4", 64),
            ("v5e", 96),
            ("7x", 64),
            *(
                pytest.param(*item, marks=pytest.mark.nightly)
                for item in (("v4", 96), ("v5e", 64), ("7x", 96))
            ),
        ],
    )
    def test_the_plan_knows_what_the_kernel_takes(self, tpu_compiler, target, num_tokens):
        shape = AttentionShape(32, 8, 128)
        facts = compile_attention(tpu_compiler, target, shape, num_tokens=num_tokens)
        mesh = tpu_compiler.mesh(target)
        q = jax.ShapeDtypeStruct((num_tokens, 32, 128), jnp.bfloat16)
        pool = jax.ShapeDtypeStruct((2, 8193, 8, 16, 256), jnp.bfloat16)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            plan = plan_attention(q, pool, rows_struct(64, 128), decode=num_tokens == 64)
        taken = facts.vmem_bytes - facts.spill_bytes
        # Blocks that the compiler keeps elsewhere, or need no second copy, are counted too.
        assert 0.5 * plan.vmem_bytes < taken <= 1.05 * plan.vmem_bytes
