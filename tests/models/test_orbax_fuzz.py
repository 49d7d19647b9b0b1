# SPDX-License-Identifier: Apache-2.0
"""Damaged and foreign Orbax checkpoints: one line each, in bounded time, whatever is wrong."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jpaged.models import checkpoint
from jpaged.models.config_json import config_from_hf
from tests.models.test_checkpoint_fuzz import CONFIG, make_tensors

pytestmark = pytest.mark.slow

# Loads each directory in a process of its own: Orbax leaves tasks behind that fail later.
LOAD_EACH = """
import json, sys, time
import jax, numpy
import jax.numpy as jnp
from jpaged.models import checkpoint
for directory in sys.stdin.read().split():
    start = time.perf_counter()
    try:
        params = checkpoint.load(directory, jnp.float32)[1]
        found = [leaf.shape for leaf in jax.tree.leaves(params)], ""
    except Exception as e:
        found = type(e).__name__, str(e)
    print("RESULT", json.dumps([directory, *found, time.perf_counter() - start]))
"""


def params_of(seed):
    tensors = make_tensors(seed)

    def layer(name):
        return jnp.asarray(tensors[f"model.layers.0.{name}.weight"])

    return {
        "embedding": jnp.asarray(tensors["model.embed_tokens.weight"]),
        "final_norm": {"scale": jnp.asarray(tensors["model.norm.weight"])},
        "lm_head": jnp.asarray(tensors["lm_head.weight"]),
        "layers_0": {
            "attention_norm": {"scale": layer("input_layernorm")},
            "mlp_norm": {"scale": layer("post_attention_layernorm")},
            "attention": {
                f"{x}_proj": {"weight": layer(f"self_attn.{x}_proj")} for x in ("q", "k", "v", "o")
            },
            "mlp": {
                f"{x}_proj": {"weight": layer(f"mlp.{x}_proj")} for x in ("gate", "up", "down")
            },
        },
    }


def damages(file, rng, scale):
    """Contents that a file may have instead of its own; None is no file.

    Of those that are cut short or changed there are 2 and 5 times `scale`.
    """
    content = file.read_bytes()
    yield from (None, b"", b"{}", b"[]", b"null", b"\x00" * len(content), b"x" * 1000)
    for _ in range(2 * scale):
        yield content[: rng.randrange(len(content))]
    for _ in range(5 * scale):
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 8])):
            changed[rng.randrange(len(content))] = rng.randrange(256)
        yield bytes(changed)
    yield content + b"\x00"


def trees(params):
    """Trees that are no model of CONFIG, by what is wrong with them."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in flat[::3]:
        name = "_".join(key.key for key in path)

        def put(value, path=path):
            tree = jax.tree.map(lambda x: x, params)
            place = tree
            for key in path[:-1]:
                place = place[key.key]
            if value is None:
                del place[path[-1].key]
            else:
                place[path[-1].key] = value
            return tree

        yield f"missing_{name}", put(None)
        yield f"int8_{name}", put(leaf.astype(jnp.int8))
        yield f"shorter_{name}", put(leaf[:-1])
        yield f"flat_{name}", put(leaf.ravel()[None])
        yield f"tree_{name}", put({"a": leaf})
        yield f"list_{name}", put([leaf, leaf])
        yield f"number_{name}", put(1.0)
        yield f"integer_{name}", put(3)
        yield f"scalar_{name}", put(jnp.float32(1))
    yield "extra", params | {"extra": jnp.zeros(3)}
    yield "extra_layer", params | {"layers_1": params["layers_0"]}
    yield "layer_of_huge_number", params | {f"layers_{10**30}": params["layers_0"]}
    yield "list_of_layers", {"layers": [params["layers_0"]]} | params
    yield "wrapped", {"params": params}
    yield "nothing_right", {"a": jnp.zeros(3)}
    yield (
        "stacked",
        {
            "layers": jax.tree.map(lambda leaf: leaf[None], params["layers_0"]),
            **{name: params[name] for name in ("embedding", "final_norm", "lm_head")},
        },
    )
    yield "float64", jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


@pytest.fixture(scope="module", params=[1, pytest.param(3, marks=pytest.mark.nightly)])
def outcomes(request, tmp_path_factory):
    """What loading each directory gave: shapes, or the error's type and message, and seconds."""
    root = tmp_path_factory.mktemp("orbax")
    config, params = config_from_hf(CONFIG), params_of(0)
    checkpoint.save_orbax(root / "right", config, params)
    directories = [root / "right"]
    with ocp.StandardCheckpointer() as checkpointer:
        for name, tree in trees(params):
            directories.append(root / "trees" / name)
            directories[-1].mkdir(parents=True)
            shutil.copy(root / "right" / "config.json", directories[-1])
            checkpointer.save(directories[-1] / "params", tree)
    rng = random.Random(0)
    files = sorted(path for path in (root / "right" / "params").rglob("*") if path.is_file())
    for number, file in enumerate(files):
        for count, content in enumerate(damages(file, rng, request.param)):
            directories.append(root / f"damaged_{number}_{count}")
            shutil.copytree(root / "right", directories[-1])
            path = directories[-1] / file.relative_to(root / "right")
            path.unlink()
            if content is not None:
                path.write_bytes(content)
    run = subprocess.run(
        [sys.executable, "-c", LOAD_EACH],
        input="\n".join(map(str, directories)),
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(directories), run.stderr[-3000:]
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    return {pathlib.Path(name).relative_to(root): found for name, *found in results}


def test_enough_of_them(outcomes, request):
    assert len(outcomes) >= {1: 160, 3: 300}[request.node.callspec.params["outcomes"]]
    assert outcomes[pathlib.Path("right")][1] == ""


def test_damaged_files(outcomes):
    """What cannot be told from weights loads, with every shape right; the rest is one line."""
    right = outcomes[pathlib.Path("right")][0]
    for name, (kind, message, seconds) in outcomes.items():
        assert seconds < 10, name
        if isinstance(kind, list):
            assert kind == right or name.parts[0] == "trees", name
        else:
            assert kind == "CheckpointError", (name, kind, message)
            assert message.isprintable() and len(message) < 4000 and "params" in message


def test_foreign_trees(outcomes):
    for name, (kind, message, _) in outcomes.items():
        if name.parts[0] != "trees":
            continue
        assert kind == "CheckpointError", (name, kind)
        if name.name.startswith("int8"):
            assert "dtype int8" in message
        elif name.name.startswith("missing") or name.name == "nothing_right":
            assert "missing" in message or "asks for" in message
        elif name.name.startswith("shorter"):
            assert "has shape" in message
