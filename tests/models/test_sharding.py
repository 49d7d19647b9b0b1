# SPDX-License-Identifier: Apache-2.0
"""Heads split over devices: the same logits, each device with its own heads and pages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from jpaged import pallas_kernels
from jpaged.models import sharding
from jpaged.models.config import dense_config
from jpaged.models.decoder import Decoder
from jpaged.models.inputs import PagedInputs
from jpaged.pallas_kernels.rows import Rows

FIELDS = dict(
    family="Qwen3ForCausalLM",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    qk_norm=True,
    tie_word_embeddings=False,
    max_position_embeddings=40960,
)
CONFIG = dense_config(**FIELDS)
_LAYER = CONFIG.pattern[0]
# A sink and a bias of each head go where the head goes.
SINKS = dataclasses.replace(
    CONFIG,
    pattern=(
        dataclasses.replace(
            _LAYER,
            attention=dataclasses.replace(
                _LAYER.attention, sinks=True, qkv_bias=True, out_bias=True
            ),
        ),
    ),
)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices("cpu")[:2]), ("tp",), axis_types=(AxisType.Auto,))


def step_inputs():
    """A chunk of one row and a decoding one, in pages of 4."""
    return PagedInputs(
        token_ids=jnp.array([3, 7, 11, 20, 41, 5], jnp.int32),
        positions=jnp.array([0, 1, 2, 3, 4, 0], jnp.int32),
        rows=Rows(
            page_table=jnp.array([[2, 3], [1, 0]], jnp.int32),
            kv_lens=jnp.array([5, 1], jnp.int32),
            cu_q_lens=jnp.array([0, 5, 6], jnp.int32),
            num_seqs=jnp.array([2], jnp.int32),
        ),
        logits_indices=jnp.array([4, 5], jnp.int32),
    )


@pytest.mark.parametrize("config", [CONFIG, SINKS], ids=["plain", "sinks"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_two_devices_compute_what_one_does(mesh, scan, config):
    params = Decoder(config, scan).init(jax.random.key(0))
    shape = pallas_kernels.kv_pages_shape(2, 5, 2, 4, 16, backend="xla")
    pool = jnp.zeros(shape)
    want, want_pool = jax.jit(Decoder(config, scan, "xla").apply)(params, step_inputs(), pool)
    split = Decoder(config, scan, "xla", mesh)
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    pool = jax.device_put(pool, sharding.pool_sharding(mesh))
    got, got_pool = jax.jit(split.apply)(params, step_inputs(), pool)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(got_pool, want_pool, atol=1e-5)
    assert got_pool.addressable_shards[0].data.shape == (2, 5, 1, 4, 32)
    assert np.abs(np.asarray(want_pool)).max() > 0.1


def test_one_token_is_looked_up_as_on_one_device(mesh):
    """With another beside it: test_gpu_kernels.py holds what that is for."""
    decoder = Decoder(CONFIG, False, "xla", mesh)
    params = Decoder(CONFIG).init(jax.random.key(0))
    pool = jnp.zeros(pallas_kernels.kv_pages_shape(2, 5, 2, 4, 16, backend="xla"))
    one, zero = jnp.array([1], jnp.int32), jnp.array([0], jnp.int32)
    rows = Rows(jnp.array([[1, 0]], jnp.int32), one, jnp.array([0, 1], jnp.int32), one)
    inputs = PagedInputs(jnp.array([41], jnp.int32), zero, rows, zero)
    want, _ = jax.jit(Decoder(CONFIG, False, "xla").apply)(params, inputs, pool)
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    pool = jax.device_put(pool, sharding.pool_sharding(mesh))
    got, _ = jax.jit(decoder.apply)(params, inputs, pool)
    assert got.shape == want.shape == (1, 64)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_what_is_split(mesh, scan):
    params = Decoder(SINKS, scan).abstract_params()
    specs = {
        "/".join(entry.key for entry in path): leaf.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            sharding.param_shardings(params, mesh)
        )
    }
    stacked = (None,) if scan else ()
    layer = "layers/0/" if scan else "layers_1/"
    first, second = PartitionSpec(*stacked, "tp", None), PartitionSpec(*stacked, None, "tp")
    for name in ("attention/q_proj", "attention/k_proj", "attention/v_proj", "mlp/gate_proj"):
        assert specs[f"{layer}{name}/weight"] == first
    for name in ("attention/o_proj", "mlp/down_proj"):
        assert specs[f"{layer}{name}/weight"] == second
    assert specs[f"{layer}attention/sinks"] == PartitionSpec(*stacked, "tp")
    assert specs["embedding"] == specs["lm_head"] == PartitionSpec("tp", None)
    assert not any(specs[f"{layer}attention/q_norm/scale"])
    assert not any(specs["final_norm/scale"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 1}, r"^num_kv_heads=1 does not split over 2 devices; take a number"),
        ({"intermediate_size": 47}, r"^intermediate_size=47 does not split over 2 devices"),
        ({"vocab_size": 63}, r"^vocab_size=63 does not split over 2 devices"),
    ],
)
def test_what_does_not_split_is_refused(mesh, changes, message):
    with pytest.raises(ValueError, match=message):
        Decoder(dense_config(**FIELDS | changes), mesh=mesh)


def test_a_mesh_of_two_axes_is_refused():
    mesh = Mesh(np.array(jax.devices("cpu")[:2]).reshape(1, 2), ("dp", "tp"))
    with pytest.raises(ValueError, match=r"has one axis, not \('dp', 'tp'\)"):
        Decoder(CONFIG, mesh=mesh)


class Device:
    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize("kind", ["TPU7x", "TPU v6 lite", "NVIDIA H100"])
@pytest.mark.parametrize("width", [96, 128])
def test_matrices_of_16_bits_on_a_7x_get_tiles_and_narrow_embeddings_rows(kind, width, monkeypatch):
    where = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    monkeypatch.setattr(type(where), "device_set", property(lambda self: {Device(kind)}))
    formats = []
    monkeypatch.setattr(sharding, "Format", lambda layout, where: formats.append(layout) or where)
    for dtype in (jnp.bfloat16, jnp.float32):
        config = dataclasses.replace(SINKS, hidden_size=width)
        params = Decoder(config, True).abstract_params(dtype)
        placed = sharding.placements(params, where)
        assert all(leaf is where for leaf in jax.tree.leaves(placed))
    tiled = [layout for layout in formats if layout.tiling == ((16, 128), (2, 1))]
    # Seven of the stacked layers, the embedding and the head.
    assert len(tiled) == (9 if kind == "TPU7x" else 0)
    rows = [layout for layout in formats if layout not in tiled]
    # The embedding, where it has no tiles, in a width that is no multiple of 128.
    narrow = {"TPU7x": 1, "TPU v6 lite": 2, "NVIDIA H100": 0}[kind] if width == 96 else 0
    assert [(layout.major_to_minor, layout.tiling) for layout in rows] == narrow * [((0, 1), None)]
