# SPDX-License-Identifier: Apache-2.0
"""Which products of a decoder are by the backend's kernels, and which by the compiler's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jpaged import pallas_kernels
from jpaged.models import sharding
from jpaged.models.config import ExpertsSpec, dense_config
from jpaged.models.decoder import Decoder
from jpaged.models.inputs import PagedInputs
from jpaged.models.merged import merge_projections
from jpaged.pallas_kernels import dispatch
from jpaged.pallas_kernels.cpu.chip import host_chip
from jpaged.pallas_kernels.cpu.products import TARGET
from jpaged.pallas_kernels.rows import Rows

pytestmark = pytest.mark.skipif(host_chip() is None, reason="no kernels for this processor")

LAYERS = 3
CONFIG = dense_config(
    family="Qwen3ForCausalLM",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=LAYERS,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    qk_norm=True,
    tie_word_embeddings=False,
    max_position_embeddings=256,
)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
# Two rows: a chunk and a decoding one.
INPUTS = PagedInputs(
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


def pool():
    return jnp.zeros(pallas_kernels.kv_pages_shape(LAYERS, 5, 2, 4, 16, backend="xla"))


def compiled(decoder, params, kv_pages=None):
    kv_pages = pool() if kv_pages is None else kv_pages
    return jax.jit(decoder.apply).lower(params, INPUTS, kv_pages).compile()


def num_calls(decoder, params, kv_pages=None):
    return compiled(decoder, params, kv_pages).as_text().count(f'custom_call_target="{TARGET}"')


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["head", "tied"])
@pytest.mark.parametrize("backend", ["cpu", None])
class TestEachProductIsACall:
    def test_unrolled(self, config, backend):
        decoder = Decoder(config, False, backend)
        params = decoder.init(jax.random.key(0))
        # Query, key, value, output, gate, up and down; and the head.
        assert num_calls(decoder, params) == 7 * LAYERS + 1

    def test_merged(self, config, backend):
        decoder = Decoder(config, False, backend)
        params = merge_projections(decoder.init(jax.random.key(0)))
        assert num_calls(decoder, params) == 4 * LAYERS + 1

    def test_scanned(self, config, backend):
        decoder = Decoder(config, True, backend)
        assert num_calls(decoder, decoder.init(jax.random.key(0))) == 7 + 1


class TestNoProductIsACall:
    def test_where_xla_is_asked_for(self):
        decoder = Decoder(CONFIG, False, "xla")
        assert num_calls(decoder, decoder.init(jax.random.key(0))) == 0

    def test_where_cpus_get_xla(self, monkeypatch):
        monkeypatch.setattr(dispatch, "_backend_of_cpus", lambda: "xla")
        decoder = Decoder(CONFIG, False)
        assert num_calls(decoder, decoder.init(jax.random.key(0))) == 0

    def test_of_16_bits(self):
        decoder = Decoder(CONFIG, False, "cpu")
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), decoder.init(jax.random.key(0)))
        assert num_calls(decoder, params) == 0

    @pytest.mark.parametrize("backend", ["cpu", None])
    @pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
    def test_over_a_mesh(self, scan, backend):
        mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("tp",), axis_types=(AxisType.Auto,))
        params = Decoder(CONFIG, scan).init(jax.random.key(0))
        want = compiled(Decoder(CONFIG, scan, "xla"), params)(params, INPUTS, pool())[0]
        split = Decoder(CONFIG, scan, backend, mesh)
        params = jax.device_put(params, sharding.param_shardings(params, mesh))
        kv_pages = jax.device_put(pool(), sharding.pool_sharding(mesh))
        assert num_calls(split, params, kv_pages) == 0
        got, _ = jax.jit(split.apply)(params, INPUTS, kv_pages)
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_logits_and_pages_are_those_of_xla(scan):
    params = Decoder(CONFIG, scan).init(jax.random.key(0))
    (want, want_pool), (got, got_pool) = (
        compiled(Decoder(CONFIG, scan, backend), params)(params, INPUTS, pool())
        for backend in ("xla", "cpu")
    )
    assert not np.array_equal(got, want)  # other sums
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(got_pool, want_pool, atol=1e-5)


def test_a_dense_model_is_differentiable():
    """`apply_dense` has no kernels, whatever the backend."""
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    decoders = [Decoder(CONFIG, False, backend) for backend in (None, "cpu", "xla")]
    params = decoders[0].init(jax.random.key(0))

    def loss(decoder, params):
        logprobs = jax.nn.log_softmax(decoder.apply_dense(params, tokens))
        return -jnp.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], -1).mean()

    gradients = [jax.jit(jax.grad(loss, 1), static_argnums=0)(d, params) for d in decoders]
    for other in gradients[:2]:
        jax.tree.map(np.testing.assert_array_equal, other, gradients[2])
    # In the direction of the gradient the loss falls by the square of its length.
    squared = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradients[0]))
    step = 1e-2 / squared**0.5  # so long in all
    moved = [
        jax.tree.map(lambda p, g, by=by: p - by * g, params, gradients[0]) for by in (step, -step)
    ]
    fall = loss(decoders[0], moved[1]) - loss(decoders[0], moved[0])
    assert float(fall) == pytest.approx(2 * step * squared, rel=1e-2)


def test_experts_stay_the_compilers():
    """Attention's products and the head are calls; the router's and the experts' are not."""
    (layer,) = CONFIG.pattern
    experts = ExpertsSpec(intermediate_size=48, num_experts=4, num_experts_per_token=2)
    config = dataclasses.replace(CONFIG, pattern=(dataclasses.replace(layer, mlp=experts),))
    decoder = Decoder(config, False, "cpu")
    assert num_calls(decoder, decoder.abstract_params(jnp.float32)) == 4 * LAYERS + 1
