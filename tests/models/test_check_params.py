# SPDX-License-Identifier: Apache-2.0
"""Parameters that are handed over in memory: what is not this model's is refused by name."""

import dataclasses
import re

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.models.checkpoint import CheckpointError, check_params
from jpaged.models.decoder import stack_layers
from tests.jpaged.tiny import TINY, tiny_params, token_ids

UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False)
DOWN = "layers_1/mlp/down_proj/weight"


def changed(path, change):
    """The parameters, with the tensor of a path changed, or left out where that gives nothing."""
    params = jax.tree.map(lambda leaf: leaf, tiny_params())
    *parents, name = path.split("/")
    node = params
    for parent in parents:
        node = node[parent]
    value = change(node.pop(name))
    if value is not None:
        node[name] = value
    return params


def refused(params, *parts, config=TINY):
    with pytest.raises(CheckpointError) as raised:
        check_params(config, params)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 1500
    for part in parts:
        assert re.search(part, message), message


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "bool", "float8_e4m3fn", "complex64"])
def test_weights_that_are_no_floating_point_numbers(dtype):
    params = changed(DOWN, lambda leaf: leaf.astype(dtype))
    refused(params, f"'{DOWN}' has dtype {dtype}; supported: float32, float16, bfloat16")


def test_numpys_float64_is_cast():
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tiny_params())
    config = EngineConfig(max_model_len=64, num_pages=8)
    outputs = [
        Engine(TINY, given, config).generate([[5, 6]], SamplingParams(max_tokens=4, temperature=0))
        for given in (params, tiny_params(), flax.core.freeze(tiny_params()))
    ]
    assert token_ids(outputs[0]) == token_ids(outputs[1]) == token_ids(outputs[2])


@pytest.mark.parametrize("path", ["embedding", "final_norm/scale", DOWN])
def test_missing(path):
    refused(changed(path, lambda leaf: None), f"missing '{path}'")


def test_what_the_model_has_no_use_of():
    refused(tiny_params() | {"lm_head": tiny_params()["embedding"]}, "unexpected 'lm_head'")
    refused(tiny_params(), "missing 'lm_head'", config=UNTIED)


def test_stacked_layers_are_known_by_what_each_has():
    stacked = stack_layers(tiny_params(), TINY)
    check_params(TINY, stacked)
    one_more = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1]]), stacked["layers"])
    refused(stacked | {"layers": one_more}, "unexpected 'layers_2/")
    one_less = jax.tree.map(lambda leaf: leaf[:1], stacked["layers"])
    refused(stacked | {"layers": one_less}, "missing 'layers_1/")
    other = dataclasses.replace(TINY, num_layers=3)
    refused(stacked, "missing 'layers_2/", config=other)
    down = stacked["layers"]["0"]["mlp"]["down_proj"]
    down["weight"] = down["weight"].swapaxes(1, 2)
    refused(stacked, rf"'{DOWN}' has shape \(48, 32\)")


def test_an_engine_takes_layers_stacked_or_not():
    config = EngineConfig(max_model_len=64, num_pages=8)
    stacked = stack_layers(tiny_params(), TINY)
    outputs = [
        Engine(TINY, given, config).generate([[5, 6]], SamplingParams(max_tokens=4, temperature=0))
        for given in (tiny_params(), stacked)
    ]
    assert token_ids(outputs[0]) == token_ids(outputs[1])
    with pytest.raises(ValueError, match="scan_layers=False must be True, or None: params has"):
        Engine(TINY, stacked, dataclasses.replace(config, scan_layers=False))


def test_shape():
    refused(
        changed(DOWN, lambda leaf: leaf.T),
        rf"'{DOWN}' has shape \(48, 32\), model_config asks for \(32, 48\)",
    )


@pytest.mark.parametrize(
    "leaf",
    [
        "weights.bin",
        None,
        0.5,
        [1.0, 2.0],
        jax.ShapeDtypeStruct((32, 48), jnp.float32),
        np.ma.masked_array(np.zeros((32, 48), np.float32), mask=np.eye(32, 48, dtype=bool)),
    ],
    ids=lambda leaf: type(leaf).__name__,
)
def test_what_is_no_array(leaf):
    params = changed(DOWN, lambda _: _)
    params["layers_1"]["mlp"]["down_proj"]["weight"] = leaf
    refused(params, rf"tensor '{DOWN}(/0)?' must be an array of NumPy's or jax's")


def test_an_array_that_is_no_more():
    params = changed(DOWN, lambda leaf: jnp.array(leaf, copy=True))
    params["layers_1"]["mlp"]["down_proj"]["weight"].delete()
    refused(params, f"tensor '{DOWN}' was deleted")


@pytest.mark.parametrize("params", [None, [], "params", 5, {1: {}, "a": {}}, {}])
def test_no_tree(params):
    refused(params, "params")


def test_a_config_of_more_than_there_is():
    """Told by arithmetic: nothing grows with the config."""
    huge = dataclasses.replace(TINY, num_layers=2**31 - 1)
    refused(tiny_params(), "num_hidden_layers=2147483647", config=huge)


def test_the_engine_looks_before_it_allocates():
    params = changed(DOWN, lambda leaf: leaf.astype(jnp.int8))
    with pytest.raises(ValueError, match=f"'{DOWN}' has dtype int8"):
        Engine(TINY, params, EngineConfig(num_pages=8))
    with pytest.raises(ValueError, match="params does not hold this model"):
        Engine(TINY, {"embedding": tiny_params()["embedding"]} | changed(DOWN, lambda leaf: None))
