# SPDX-License-Identifier: Apache-2.0
"""What pages depend on beside tokens: each of it has other pages on disk."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.device import cpu, fingerprint
from tests.jpaged.exact import EXACT
from tests.jpaged.tiny import tiny_engine, windowed


@pytest.fixture
def kept(tmp_path):
    """Makes engines that share a directory."""
    return functools.partial(tiny_engine, **EXACT, prompt_cache=str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"page_size": 4},
        {"kv_dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"max_num_batched_tokens": 40},
        {"max_model_len": 120},
        {"model_config": windowed()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_have_other_pages(kept, change):
    contexts = {kept(**own)._prompts._context for own in ({}, {"num_pages": 50}, change)}
    assert len(contexts) == 2


@pytest.mark.parametrize(
    ("module", "name"),
    [(fingerprint, "_version"), (cpu, "name"), (cpu, "features"), (cpu, "num_cores")],
)
def test_other_versions_and_machines_have_other_pages(kept, monkeypatch, module, name):
    before = kept()._prompts._context
    assert kept()._prompts._context == before
    monkeypatch.setattr(module, name, lambda *args: "another")
    assert kept()._prompts._context != before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_bit_of_the_weights_counts(dtype):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (3, 4, 5 * jnp.dtype(dtype).itemsize)).astype(np.uint8)
    found = set()
    ways = fingerprint.fingerprint, lambda tree: np.asarray(fingerprint.mixed(tree["w"]))
    for way in ways:
        seen = set()
        for byte in range(-1, raw.size):
            own = raw.copy()
            if byte >= 0:
                own.reshape(-1)[byte] ^= 1 << byte % 8
            array = jnp.asarray(own.view(jnp.dtype(dtype)))
            seen.add(bytes(way({"w": array})))
        assert len(seen) == raw.size + 1
        found |= seen
    array = jnp.asarray(raw.view(jnp.dtype(dtype)))
    # Names, shapes and places count too.
    others = [
        {"v": array},
        {"w": array.reshape(4, 3, 5)},
        {"w": array[::-1]},
        {"w": jnp.swapaxes(array[:, :3], 0, 1)},
        {"w": array[:, :3]},
    ]
    assert len({fingerprint.fingerprint(own) for own in others} | found) == len(found) + 5
    sums = [fingerprint.mixed(own["w"]) for own in others[1:]]
    assert len({bytes(np.asarray(own)) for own in sums} | found) == len(found) + 4
