# SPDX-License-Identifier: Apache-2.0
"""The whole steps that the TPU compiler makes of our code, for chips that are not there."""

import dataclasses

import pytest

from jpaged.models.shapes import SHAPES
from jpaged.pallas_kernels import dispatch
from jpaged.scripts.kernels.compiled_steps import compile_decode

pytestmark = pytest.mark.slow


def small(name, head_dim=None):
    config = dataclasses.replace(SHAPES[name], num_layers=3, vocab_size=2048)
    if head_dim is None:
        return config
    (layer,) = config.pattern
    rope = dataclasses.replace(layer.attention.rope, dim=head_dim)
    attention = dataclasses.replace(layer.attention, head_dim=head_dim, rope=rope)
    return dataclasses.replace(config, pattern=(dataclasses.replace(layer, attention=attention),))


STEPS = [
    pytest.param("v4", small("llama-3.2-1b"), marks=pytest.mark.nightly),
    pytest.param("v5e", small("llama-3.2-1b"), marks=pytest.mark.nightly),
    pytest.param("v5e", small("qwen3-0.6b"), marks=pytest.mark.nightly),
    pytest.param("v5e", small("qwen3-0.6b", head_dim=80), marks=pytest.mark.nightly),
    pytest.param("v5e", small("qwen3-0.6b", head_dim=96), marks=pytest.mark.nightly),
    pytest.param("v5e", small("qwen3-0.6b", head_dim=256), marks=pytest.mark.nightly),
    pytest.param("v5p", small("qwen3-1.7b"), marks=pytest.mark.nightly),
    pytest.param("v6e", small("smollm2-135m"), marks=pytest.mark.nightly),
    ("7x", small("smollm2-135m")),
    # Whose query projections were copied, as heads, in every step.
    ("v5e", small("llama-3.1-70b")),
    *(
        pytest.param(*case, marks=pytest.mark.nightly)
        for case in (
            ("7x", small("llama-3.1-70b")),
            ("7x", small("llama-3.1-8b")),
            ("v5p", small("qwen3-14b")),
            ("v4", small("qwen3-32b")),
        )
    ),
    pytest.param("7x", small("qwen3-0.6b"), marks=pytest.mark.nightly),
    pytest.param("7x", small("qwen3-4b"), marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(
    ("target", "config"),
    STEPS,
    ids=lambda value: f"{value.num_q_heads}-{value.head_dim}" if hasattr(value, "head_dim") else "",
)
def test_a_step_keeps_its_pool_in_place(tpu_compiler, target, config):
    facts = compile_decode(tpu_compiler, tpu_compiler.mesh(target), config)
    assert facts.error is None
    assert facts.alias_bytes == facts.pool_bytes
    assert facts.pool_ops == ()
    assert facts.temp_bytes < 0.05 * facts.pool_bytes
    assert facts.weight_copies == 0
    assert facts.collectives == {}


@pytest.mark.parametrize(
    ("kv_dtype", "num_tokens"),
    [
        ("int8", None),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in (("float8_e4m3fn", None), ("int8", 256), ("float8_e4m3fn", 256))
        ),
    ],
)
def test_so_does_one_with_pages_of_eight_bits(tpu_compiler, kv_dtype, num_tokens):
    mesh, config = tpu_compiler.mesh("v5e"), small("qwen3-0.6b")
    facts = compile_decode(tpu_compiler, mesh, config, kv_dtype=kv_dtype, num_tokens=num_tokens)
    assert facts.error is None
    assert facts.alias_bytes == facts.pool_bytes == 3 * (64 * 128 + 1) * 16 * 8 * 256
    assert facts.pool_ops == () and facts.weight_copies == 0
    assert facts.temp_bytes < 0.05 * facts.pool_bytes


@pytest.mark.nightly
def test_temporaries_do_not_grow_with_the_layers(tpu_compiler):
    """So `tpu_report` compiles a few layers only."""
    few, more = (
        compile_decode(
            tpu_compiler,
            tpu_compiler.mesh("v5e"),
            dataclasses.replace(small("llama-3.2-1b"), num_layers=n),
        )
        for n in (2, 6)
    )
    assert more.pool_bytes == 3 * few.pool_bytes
    assert abs(more.temp_bytes - few.temp_bytes) < 0.01 * few.pool_bytes


@pytest.mark.nightly
def test_a_7x_would_tile_all_weights_anew_in_every_step(tpu_compiler, monkeypatch):
    """What `models.sharding.placements` is for; where this fails, it may go."""
    monkeypatch.setattr("jpaged.models.sharding.placements", lambda params, shardings: shardings)
    facts = compile_decode(tpu_compiler, tpu_compiler.mesh("7x"), small("llama-3.2-1b"))
    assert facts.temp_bytes > 3 * 2 * 60e6 * 0.9  # three layers of 60 million weights


@pytest.mark.nightly
def test_an_embedding_would_be_copied_in_every_step(tpu_compiler, monkeypatch):
    """SmolLM2's, of 49,152 by 576: as `models.sharding.placements` has it, and as libtpu would."""
    config = dataclasses.replace(SHAPES["smollm2-135m"], num_layers=2)
    facts = compile_decode(tpu_compiler, tpu_compiler.mesh("v5e"), config)
    assert facts.weight_copies == 0 and facts.temp_bytes < 5e6
    monkeypatch.setattr("jpaged.models.sharding.placements", lambda params, shardings: shardings)
    facts = compile_decode(tpu_compiler, tpu_compiler.mesh("v5e"), config)
    assert facts.weight_copies == 1 and facts.temp_bytes > 49_152 * 576 * 2


@pytest.mark.parametrize("target", ["v5e", pytest.param("v6e", marks=pytest.mark.nightly)])
def test_four_chips_reduce_twice_a_layer_and_gather_nothing(tpu_compiler, target):
    config = small("llama-3.2-1b")
    facts = compile_decode(tpu_compiler, tpu_compiler.mesh(target, 4), config)
    assert facts.error is None
    # After attention and MLP, in the one loop body of all layers, and after the embedding.
    assert facts.collectives == {"all-reduce": 3}
    assert facts.pool_ops == () and facts.alias_bytes == facts.pool_bytes
    assert facts.weight_copies == 0
    whole = compile_decode(tpu_compiler, tpu_compiler.mesh(target), config)
    assert 4 * facts.pool_bytes == whole.pool_bytes


def test_a_copy_of_the_pool_would_be_seen(tpu_compiler, monkeypatch):
    write = dispatch.write
    monkeypatch.setattr(
        dispatch,
        "write",
        lambda pool, *rest, **options: write(pool[:, ::-1], *rest, **options),
    )
    facts = compile_decode(tpu_compiler, tpu_compiler.mesh("v6e"), small("smollm2-135m"))
    assert facts.error is None
    assert facts.pool_ops or facts.temp_bytes > 0.05 * facts.pool_bytes
