# SPDX-License-Identifier: Apache-2.0
"""Weights that multiply the same tokens as one: the same numbers, in fewer products."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.models.decoder import Decoder, stack_layers
from jpaged.models.merged import merge_projections
from tests.jpaged.tiny import TINY

# As the recordings of families are compared.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def biased(config):
    (layer,) = config.pattern
    attention = dataclasses.replace(layer.attention, qkv_bias=True)
    return dataclasses.replace(config, pattern=(dataclasses.replace(layer, attention=attention),))


def random_params(config):
    decoder = Decoder(config)
    leaves, tree = jax.tree.flatten(decoder.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Biases too, which start as zeros.
    return decoder, jax.tree.unflatten(
        tree,
        [jax.random.normal(key, leaf.shape) * 0.1 for key, leaf in zip(keys, leaves, strict=True)],
    )


@pytest.mark.parametrize("config", [TINY, biased(TINY)], ids=["plain", "biased"])
def test_logits_are_the_same(config):
    decoder, params = random_params(config)
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12) % config.vocab_size
    want = jit(decoder.apply_dense)(params, tokens)
    merged = merge_projections(jax.tree.map(lambda leaf: leaf, params))
    np.testing.assert_allclose(jit(decoder.apply_dense)(merged, tokens), want, atol=1e-5)


def test_features_are_in_order():
    _, params = random_params(biased(TINY))
    one = params["layers_1"]
    want = {
        "weight": [one["attention"][f"{name}_proj"]["weight"] for name in "qkv"],
        "bias": [one["attention"][f"{name}_proj"]["bias"] for name in "qkv"],
    }
    mlp = [one["mlp"][f"{name}_proj"]["weight"] for name in ("gate", "up")]
    rest = {"o_proj", "q_norm", "k_norm"}
    found = merge_projections(params)["layers_1"]
    assert set(found["attention"]) == {"qkv_proj"} | rest
    assert set(found["mlp"]) == {"gate_up_proj", "down_proj"}
    for name, parts in want.items():
        np.testing.assert_array_equal(found["attention"]["qkv_proj"][name], np.concatenate(parts))
    np.testing.assert_array_equal(found["mlp"]["gate_up_proj"]["weight"], np.concatenate(mlp))


def test_stacked_layers_are_merged_layer_by_layer():
    _, params = random_params(biased(TINY))
    copy = jax.tree.map(lambda leaf: leaf, params)
    merged_first = stack_layers(merge_projections(copy), TINY)
    merged_last = merge_projections(stack_layers(params, TINY))
    jax.tree.map(np.testing.assert_array_equal, merged_last, merged_first)


def test_once_is_enough_and_experts_stay():
    _, params = random_params(TINY)
    mlp = params["layers_0"]["mlp"]
    mlp["router"] = {"weight": jnp.ones((2, 4))}
    merged = merge_projections(params)
    assert merged["layers_0"]["mlp"] is mlp and set(mlp) >= {"gate_proj", "up_proj", "router"}
    again = merge_projections(jax.tree.map(lambda leaf: leaf, merged))
    jax.tree.map(np.testing.assert_array_equal, again, merged)


def test_weights_that_nobody_else_holds_are_not_there_twice():
    """Taken out of the tree as they are merged, the last layer's before the next one's."""
    _, params = random_params(TINY)
    held = params["layers_0"]["attention"]["q_proj"]
    merge_projections(params)
    assert held == {} and "q_proj" not in params["layers_0"]["attention"]


class TestAnEngineThatMerges:
    """As on CPUs and GPUs; what it is compared with does not."""

    def test_loads_a_model_and_draws_the_same(self, monkeypatch):
        settings = dict(num_pages=40, max_model_len=128, max_num_seqs=2, strict_shapes=True)
        config = EngineConfig(step_shapes="16x2,2x2", **settings)
        engine = Engine.load("demo", config)
        prompts = ["Once upon a time", "The dog"]
        params = SamplingParams(max_tokens=12, temperature=0)
        attention = engine._runner.params["layers_0"]["attention"]
        assert "qkv_proj" in attention and "q_proj" not in attention
        got = engine.generate(prompts, params)
        assert engine.stats().num_unplanned_compilations == 0  # what was compiled ahead is called
        monkeypatch.setattr("jpaged.placement.merges_projections", lambda *_: False)
        want = Engine.load("demo", config).generate(prompts, params)
        assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]

    @pytest.mark.parametrize("stacked", [False, True])
    def test_takes_weights_that_are_merged_already(self, stacked):
        _, params = random_params(biased(TINY))
        params = merge_projections(stack_layers(params, TINY) if stacked else params)
        Engine(biased(TINY), params, EngineConfig(num_pages=9, max_model_len=32))

    def test_leaves_the_callers_tree_as_it_is(self):
        _, params = random_params(TINY)
        before = jax.tree.structure(params)
        Engine(TINY, params, EngineConfig(num_pages=9, max_model_len=32))
        assert jax.tree.structure(params) == before

    def test_refuses_merged_weights_of_another_size(self):
        _, params = random_params(TINY)
        params = merge_projections(params)
        params["layers_1"]["attention"]["qkv_proj"]["weight"] = jnp.ones((3, TINY.hidden_size))
        with pytest.raises(ValueError, match="layers_1/attention/qkv_proj/weight"):
            Engine(TINY, params, EngineConfig(num_pages=9, max_model_len=32))
