# SPDX-License-Identifier: Apache-2.0
"""Keys and values of eight bits, beside a float64 decoder that rounds them with NumPy."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jpaged import pallas_kernels
from jpaged.models import checkpoint, sharding
from jpaged.models.decoder import Decoder, stack_layers
from tests.models.test_decoder import FIXTURES, LLAMA, QWEN, NaiveDecoder, Pages, load, log_softmax
from tests.models.test_sharding import CONFIG, mesh, step_inputs

__all__ = ["mesh"]  # a fixture


def rounded(numbers, scale, kv_dtype):
    """What numbers become in pages and back."""
    if kv_dtype == "int8":
        return np.clip(np.round(numbers / scale), -128, 127) * scale
    clipped = np.clip(numbers / scale, -448, 448)
    return clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


class RoundingDecoder(NaiveDecoder):
    """The naive decoder, with a cache of eight bits."""

    def __init__(self, directory, scales, kv_dtype):
        super().__init__(directory)
        self.scales, self.kv_dtype = scales.astype(np.float64), kv_dtype

    def stored(self, head, prefix, part):
        layer = int(prefix.split(".")[2])
        return rounded(head, self.scales[layer, part], self.kv_dtype)


@pytest.mark.parametrize(
    ("name", "kv_dtype", "scan_layers"),
    [(QWEN, "int8", False), (LLAMA, "float8_e4m3fn", True)],
    ids=["int8 unrolled", "float8 scanned"],
)
def test_logits_are_those_of_rounded_keys_and_values(name, kv_dtype, scan_layers):
    """Prompts in uneven chunks, then decoded: all see the same rounded keys, their own step's too.

    Scales differ by layer, and some keys and values are cut off.
    """
    _, config, params = load(name)
    rng = np.random.default_rng(1)
    # Of the fixtures' keys, of about 1, and values, of about 0.02.
    coarse = {"int8": [0.02, 0.0004], "float8_e4m3fn": [0.005, 0.0001]}[kv_dtype]
    layers = np.linspace(0.7, 1.6, config.num_layers)[:, None]
    scales = (layers * np.array(coarse)).astype(np.float32)
    naive, exact = RoundingDecoder(FIXTURES / name, scales, kv_dtype), load(name)[0]
    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in (38, 11, 5)]
    want = [naive.logits(prompt) for prompt in prompts]
    if scan_layers:
        params = stack_layers(params, config)
    params = params | {"kv_scales": jnp.asarray(scales)}
    pages = Pages(config, params, prompts, scan_layers=scan_layers, kv_dtype=kv_dtype)
    for counts in [(5, 7, 0), (20, 1, 1), (12, 2, 3), (1, 1, 1)]:
        logits = pages.step(*counts)
        live = [i for i in range(3) if counts[i]]
        expected = np.stack([want[i][pages.done[i] - 1] for i in live])
        np.testing.assert_allclose(log_softmax(logits), log_softmax(expected), atol=2e-4, rtol=0)
    # It is no matter of course: without rounding they are others.
    others = np.stack([exact.logits(prompt)[-1] for prompt in prompts])
    assert np.abs(log_softmax(expected) - log_softmax(others)).max() > 2e-3


def test_two_devices_round_as_one_does(mesh):
    params = Decoder(CONFIG).init(jax.random.key(0))
    params["kv_scales"] = jnp.array([[0.02, 0.01], [0.03, 0.02]])
    pool = jnp.zeros(pallas_kernels.kv_pages_shape(2, 5, 2, 4, 16, backend="xla"), jnp.int8)
    want, want_pool = jax.jit(Decoder(CONFIG, backend="xla").apply)(params, step_inputs(), pool)
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    pool = jax.device_put(pool, sharding.pool_sharding(mesh))
    split = Decoder(CONFIG, backend="xla", mesh=mesh)
    got, got_pool = jax.jit(split.apply)(params, step_inputs(), pool)
    np.testing.assert_allclose(got, want, atol=1e-5)
    # A sum over devices may round to the next step.
    apart = np.abs(np.asarray(got_pool, np.int32) - np.asarray(want_pool, np.int32))
    assert apart.max() <= 1 and np.abs(want_pool).max() > 20


def test_pages_of_integers_want_scales():
    params = Decoder(CONFIG).abstract_params()
    pool = jax.ShapeDtypeStruct((2, 5, 2, 4, 32), jnp.int8)
    with pytest.raises(ValueError, match="kv_pages of int8 need kv_scale, the size of one step"):
        jax.eval_shape(Decoder(CONFIG, backend="xla").apply, params, step_inputs(), pool)


# As llm-compressor writes it where it leaves weights as they are.
KV_ALONE = {
    "config_groups": {},
    "format": "dense",
    "ignore": [],
    "kv_cache_scheme": {
        **{"actorder": None, "dynamic": False, "group_size": None, "num_bits": 8},
        **{"observer": "minmax", "strategy": "tensor", "symmetric": True, "type": "float"},
    },
    "quant_method": "compressed-tensors",
}
LAYER = "model.layers.{}.self_attn."


def stored(directory, scales, quantization=KV_ALONE):
    """The fixture of two layers with tensors beside its weights."""
    fields = json.loads((FIXTURES / LLAMA / "config.json").read_text())
    fields["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(fields))
    tensors = safetensors.numpy.load_file(FIXTURES / LLAMA / "model.safetensors")
    safetensors.numpy.save_file(tensors | scales, directory / "model.safetensors")
    return directory


def named(key, value, numbers=((0.5, 0.25), (3.0, 0.125)), shape=(1,), dtype=np.float32):
    return {
        LAYER.format(layer) + name: np.full(shape, number, dtype)
        for layer, pair in enumerate(numbers)
        for name, number in zip((key, value), pair, strict=True)
    }


class TestOfCheckpoints:
    """Files made here, with the names that programs give scales."""

    @pytest.mark.parametrize(
        "tensors",
        [
            named("k_scale", "v_scale", dtype=ml_dtypes.bfloat16),
            named("k_proj.output_scale", "v_proj.output_scale", shape=()),
            named("k_proj.k_scale", "v_proj.v_scale", dtype=np.float16),
        ],
        ids=["llm-compressor", "as outputs", "of projections"],
    )
    def test_are_read_by_layer(self, tensors, tmp_path):
        directory = stored(tmp_path, tensors)
        np.testing.assert_array_equal(
            checkpoint.kv_scales_of(directory), np.array([[0.5, 0.25], [3, 0.125]], np.float32)
        )
        # The weights beside them are what they are without.
        _, params = checkpoint.load(directory, jnp.float32)
        jax.tree.map(np.testing.assert_array_equal, params, load(LLAMA)[2])

    def test_one_for_both(self, tmp_path):
        tensors = {LAYER.format(i) + "kv_scale": np.ones(1, np.float32) + i for i in range(2)}
        found = checkpoint.kv_scales_of(stored(tmp_path, tensors, None))
        np.testing.assert_array_equal(found, [[1, 1], [2, 2]])

    def test_none(self):
        assert checkpoint.kv_scales_of(FIXTURES / LLAMA) is None

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            (named("k_scale", "v_scale", [(1, 1)]), "layer 1 has none of its keys"),
            (named("k_scale", "v_scale", [(1, 1)] * 3), "of a layer that the model does not have"),
            (named("k_scale", "v_scale", [(1, 1), (1, 0)]), "v_scale' is 0.0, and must be finite"),
            (named("k_scale", "v_scale", [(1, np.nan)] * 2), "v_scale' is nan, and must be"),
            (named("k_scale", "v_scale", shape=(2,)), r"has shape \[2\] and dtype F32; a layer"),
            (
                named("k_scale", "v_scale") | named("k_proj.k_scale", "v_proj.v_scale"),
                "k_scale' and 'model.layers.0.self_attn.k_scale' are both there",
            ),
        ],
    )
    def test_are_refused(self, tensors, message, tmp_path):
        with pytest.raises(checkpoint.CheckpointError, match=message) as e:
            checkpoint.kv_scales_of(stored(tmp_path, tensors))
        assert "\n" not in str(e.value) and str(e.value).endswith("give others (--kv_scales)")

    @pytest.mark.parametrize(
        "change",
        [
            {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
            {"kv_cache_scheme": KV_ALONE["kv_cache_scheme"] | {"type": "int"}},
            {"kv_cache_scheme": KV_ALONE["kv_cache_scheme"] | {"dynamic": True}},
            {"kv_cache_scheme": KV_ALONE["kv_cache_scheme"] | {"strategy": "attn_head"}},
            {"kv_cache_scheme": None},
            {"quant_method": "fp8"},
        ],
    )
    def test_what_else_is_quantised_is_refused(self, change, tmp_path):
        directory = stored(tmp_path, named("k_scale", "v_scale"), KV_ALONE | change)
        with pytest.raises(ValueError, match=r"quantization_config=.*supported: null"):
            checkpoint.load(directory, jnp.float32)
