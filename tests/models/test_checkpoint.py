# SPDX-License-Identifier: Apache-2.0
"""Weights in and out, and what a person is told about weights that are damaged."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jpaged.models import checkpoint
from jpaged.models.checkpoint import CheckpointError
from jpaged.models.config_json import load_config
from jpaged.models.decoder import Decoder
from jpaged.models.json_fields import ModelConfigError

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "hf"
# Other families: see test_families.py.
ALL = [
    "llama3_rope_hd80_tied",
    "llama_gqa5_hd48_untied",
    "llama_linear_rope_mqa",
    "qwen3_gqa5_hd48_tied",
    "qwen3_mha_hd80_untied_sharded",
]
SINGLE, SHARDED = "llama_gqa5_hd48_untied", "qwen3_mha_hd80_untied_sharded"
TIED = "llama3_rope_hd80_tied"
INDEX = "model.safetensors.index.json"


def tensors_of(directory):
    """Every tensor of a directory by its Hugging Face name, as NumPy reads it."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def at(params, hf_name):
    """The parameter that a tensor should have become."""
    fixed = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params.get("lm_head"),
    }
    if hf_name in fixed:
        return fixed[hf_name]
    number, part, *rest = hf_name.removeprefix("model.layers.").removesuffix(".weight").split(".")
    layer = params[f"layers_{number}"]
    match part:
        case "input_layernorm":
            return layer["attention_norm"]["scale"]
        case "post_attention_layernorm":
            return layer["mlp_norm"]["scale"]
        case "self_attn":
            return layer["attention"][rest[0]]["scale" if "norm" in rest[0] else "weight"]
        case "mlp":
            return layer["mlp"][rest[0]]["weight"]
    raise AssertionError(hf_name)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert {x.dtype for x in jax.tree.leaves(left)} == {x.dtype for x in jax.tree.leaves(right)}


@pytest.fixture
def copy(tmp_path):
    """Copies a fixture to where it may be damaged."""

    def make(name):
        directory = tmp_path / "model"
        shutil.copytree(FIXTURES / name, directory)
        return directory

    return make


def edit(directory, function, file="model.safetensors"):
    """Rewrites the tensors of one file."""
    tensors = dict(safetensors.numpy.load_file(directory / file))
    function(tensors)
    safetensors.numpy.save_file(tensors, directory / file)


def load_fails(directory, *parts, error=CheckpointError, dtype=jnp.float32):
    with pytest.raises(error) as raised:
        checkpoint.load(directory, dtype)
    assert type(raised.value) is error
    for part in parts:
        assert part in str(raised.value)
    return str(raised.value)


class TestSafetensors:
    @pytest.mark.parametrize("name", ALL)
    def test_every_tensor_becomes_its_parameter(self, name):
        config, params = checkpoint.load(FIXTURES / name, jnp.float32)
        assert config == load_config(FIXTURES / name)
        tensors = tensors_of(FIXTURES / name)
        assert len(jax.tree.leaves(params)) == len(tensors)
        for hf_name, tensor in tensors.items():
            assert tensor.dtype == np.float32
            np.testing.assert_array_equal(at(params, hf_name), tensor, err_msg=hf_name)
        assert sum(tensor.size for tensor in tensors.values()) == Decoder(config).num_params

    @pytest.mark.parametrize("name", ALL)
    def test_the_tree_is_the_decoder_s(self, name):
        config, params = checkpoint.load(str(FIXTURES / name), jnp.bfloat16)
        expected = Decoder(config).abstract_params(jnp.bfloat16)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
            lambda x: (x.shape, x.dtype), expected
        )

    @pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "f16"])
    def test_conversion_rounds_to_nearest(self, dtype):
        _, params = checkpoint.load(FIXTURES / SINGLE, jnp.dtype(dtype))
        for hf_name, tensor in tensors_of(FIXTURES / SINGLE).items():
            np.testing.assert_array_equal(np.asarray(at(params, hf_name)), tensor.astype(dtype))

    @pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "f16"])
    def test_weights_stored_in_half_precision(self, copy, dtype):
        directory = copy(SINGLE)

        def halve(tensors):
            tensors |= {name: tensor.astype(dtype) for name, tensor in tensors.items()}

        edit(directory, halve)
        _, params = checkpoint.load(directory, jnp.float32)
        for hf_name, tensor in tensors_of(FIXTURES / SINGLE).items():
            np.testing.assert_array_equal(at(params, hf_name), tensor.astype(dtype).astype("f4"))

    def test_shards_without_an_index(self, copy):
        directory = copy(SHARDED)
        _, want = checkpoint.load(directory, jnp.float32)
        (directory / INDEX).unlink()
        _, params = checkpoint.load(directory, jnp.float32)
        same(params, want)

    def test_files_that_the_index_does_not_list_are_left_alone(self, copy):
        directory = copy(SHARDED)
        _, want = checkpoint.load(directory, jnp.float32)
        (directory / "optimizer.safetensors").write_bytes(b"not for us")
        same(checkpoint.load(directory, jnp.float32)[1], want)

    def test_buffers_of_old_checkpoints_are_ignored(self, copy):
        directory = copy(SINGLE)
        _, want = checkpoint.load(directory, jnp.float32)

        def add(tensors):
            for layer in range(2):
                name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
                tensors[name] = np.zeros(24, np.int64)

        edit(directory, add)
        same(checkpoint.load(directory, jnp.float32)[1], want)

    def test_home_directory(self, copy, monkeypatch):
        directory = copy(SINGLE)
        monkeypatch.setenv("HOME", str(directory.parent))
        config, _ = checkpoint.load("~/model", jnp.float32)
        assert config.vocab_size == 131


class TestWrongTensors:
    """Each is named, with what it may have been meant for."""

    NORM = "model.layers.1.post_attention_layernorm.weight"

    def test_missing(self, copy):
        directory = copy(SINGLE)
        edit(directory, lambda tensors: tensors.pop(self.NORM))
        message = load_fails(directory, str(directory), f"missing {self.NORM!r}", "nearest")
        assert "'model.layers.0.post_attention_layernorm.weight'" in message
        assert "unexpected" not in message

    def test_missing_from_a_shard(self, copy):
        directory = copy(SHARDED)
        file = "model-00001-of-00004.safetensors"
        names = list(safetensors.numpy.load_file(directory / file))
        edit(directory, lambda tensors: tensors.pop(names[0]), file)
        load_fails(directory, f"missing {names[0]!r}")

    def test_extra(self, copy):
        directory = copy(SINGLE)
        extra = "model.layers.1.self_attn.q_proj.bias"
        edit(directory, lambda tensors: tensors.update({extra: np.zeros(240, "f4")}))
        message = load_fails(directory, f"unexpected {extra!r}", "nearest")
        assert "'model.layers.1.self_attn.q_proj.weight'" in message
        assert "missing" not in message

    def test_one_layer_too_many(self, copy):
        directory = copy(SINGLE)
        fields = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 1}))
        message = load_fails(directory, "unexpected 'model.layers.1.input_layernorm.weight'")
        # Nine tensors a layer, of which eight are shown.
        assert message.count("unexpected") == 8 and message.endswith("; and 1 more")

    def test_renamed(self, copy):
        directory = copy(SINGLE)

        def rename(tensors):
            tensors["model.layers.1.post_attention_norm.weight"] = tensors.pop(self.NORM)

        edit(directory, rename)
        load_fails(
            directory,
            f"missing {self.NORM!r}, nearest names there: "
            "['model.layers.1.post_attention_norm.weight']",
            "unexpected 'model.layers.1.post_attention_norm.weight', nearest names expected: "
            f"['{self.NORM}']",
        )

    @pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "lm_head.weight"])
    def test_shape(self, copy, name):
        directory = copy(SINGLE)
        rows, columns = safetensors.numpy.load_file(directory / "model.safetensors")[name].shape

        def transpose(tensors):
            tensors[name] = np.ascontiguousarray(tensors[name].T)

        edit(directory, transpose)
        load_fails(
            directory,
            f"{name!r} has shape ({columns}, {rows}), config.json asks for ({rows}, {columns})",
        )

    def test_untied_head_missing(self, copy):
        directory = copy(SINGLE)
        edit(directory, lambda tensors: tensors.pop("lm_head.weight"))
        load_fails(directory, "missing 'lm_head.weight'")

    @pytest.mark.parametrize("dtype", [np.int64, np.float64, np.int8, np.bool_])
    def test_dtype(self, copy, dtype):
        directory = copy(SINGLE)

        def cast(tensors):
            tensors[self.NORM] = tensors[self.NORM].astype(dtype)

        edit(directory, cast)
        kind = {"int64": "I64", "float64": "F64", "int8": "I8", "bool": "BOOL"}[
            np.dtype(dtype).name
        ]
        load_fails(
            directory,
            f"model.safetensors: tensor {self.NORM!r} has dtype {kind}; supported: F32, F16, BF16",
        )


class TestDamagedFiles:
    @pytest.mark.parametrize("keep", [0, 5, 30, 2000, -1], ids=lambda keep: f"keep {keep}")
    def test_truncated(self, copy, keep):
        directory = copy(SINGLE)
        file = directory / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:keep])
        load_fails(directory, f"{file} is damaged or truncated", "again")

    def test_truncated_shard(self, copy):
        directory = copy(SHARDED)
        file = directory / "model-00003-of-00004.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        load_fails(directory, f"{file} is damaged or truncated")

    @pytest.mark.parametrize(
        "content",
        [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"<!DOCTYPE html>"],
        ids=["git lfs", "html"],
    )
    def test_what_a_failed_download_leaves(self, copy, content):
        directory = copy(SINGLE)
        (directory / "model.safetensors").write_bytes(content)
        load_fails(directory, "is damaged or truncated", "download or copy it again")

    def test_index_names_a_missing_file(self, copy):
        directory = copy(SHARDED)
        (directory / "model-00002-of-00004.safetensors").unlink()
        load_fails(
            directory,
            f"{str(directory)!r} lacks 'model-00002-of-00004.safetensors', which {INDEX} lists",
            error=FileNotFoundError,
        )

    @pytest.mark.parametrize(
        "content",
        [
            b'{"weight_map": {',
            b"{}",
            b"[]",
            b'{"weight_map": []}',
            b'{"weight_map": {"lm_head.weight": 1}}',
            b"\x80\x02",
        ],
        ids=["cut", "no map", "list", "map is a list", "map to numbers", "binary"],
    )
    def test_index(self, copy, content):
        directory = copy(SHARDED)
        (directory / INDEX).write_bytes(content)
        load_fails(directory, f"{directory / INDEX} is not a safetensors index")

    def test_directory_missing(self, tmp_path):
        load_fails(
            tmp_path / "absent",
            f"model directory {str(tmp_path / 'absent')!r} does not exist",
            error=FileNotFoundError,
        )

    def test_file_for_a_directory(self):
        file = FIXTURES / SINGLE / "model.safetensors"
        load_fails(file, "model directory", "is no directory", error=FileNotFoundError)

    def test_no_config(self, copy):
        directory = copy(SINGLE)
        (directory / "config.json").unlink()
        load_fails(directory, f"{str(directory)!r} has no config.json", error=FileNotFoundError)

    def test_no_weights(self, copy):
        directory = copy(SINGLE)
        (directory / "model.safetensors").unlink()
        load_fails(
            directory,
            f"{str(directory)!r} has no weights",
            "*.safetensors",
            "params/",
            error=FileNotFoundError,
        )

    def test_config_is_not_json(self, copy):
        directory = copy(SINGLE)
        (directory / "config.json").write_text("{'architectures': None}")
        load_fails(
            directory, f"{directory / 'config.json'} is not valid JSON", error=ModelConfigError
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An Orbax checkpoint of the tied Qwen3 fixture, its config and parameters; left as it is."""
    directory = tmp_path_factory.mktemp("orbax") / "new" / "model"
    config, params = checkpoint.load(FIXTURES / "qwen3_gqa5_hd48_tied", jnp.float32)
    checkpoint.save_orbax(directory, config, params)
    return directory, config, params


class TestOrbax:
    @pytest.fixture
    def damaged(self, saved, tmp_path):
        shutil.copytree(saved[0], tmp_path / "model")
        return tmp_path / "model"

    def test_round_trip_is_exact(self, saved):
        directory, config, params = saved
        loaded_config, loaded = checkpoint.load(directory, jnp.float32)
        assert loaded_config == config
        same(loaded, params)

    @pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "f16"])
    def test_conversion_rounds_to_nearest(self, saved, dtype):
        directory, _, params = saved
        _, loaded = checkpoint.load(directory, jnp.dtype(dtype))
        same(loaded, jax.tree.map(lambda x: np.asarray(x).astype(dtype), params))

    def test_saved_in_bfloat16(self, saved, tmp_path):
        _, config, params = saved
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        checkpoint.save_orbax(tmp_path, config, half)
        same(checkpoint.load(tmp_path, jnp.bfloat16)[1], half)
        full = jax.tree.map(lambda x: x.astype(jnp.float32), half)
        same(checkpoint.load(tmp_path, jnp.float32)[1], full)

    def test_saving_again_replaces(self, saved, damaged):
        _, config, params = saved
        changed = jax.tree.map(lambda x: x + 1, params)
        checkpoint.save_orbax(damaged, config, changed)
        same(checkpoint.load(damaged, jnp.float32)[1], changed)

    def test_relative_directory(self, saved, tmp_path, monkeypatch):
        _, config, params = saved
        monkeypatch.chdir(tmp_path)
        checkpoint.save_orbax("here", config, params)
        same(checkpoint.load("here", jnp.float32)[1], params)
        assert sorted(path.name for path in tmp_path.joinpath("here").iterdir()) == [
            "config.json",
            "params",
        ]

    @pytest.mark.parametrize(
        ("fields", "part"),
        [
            (
                {"num_hidden_layers": 3},
                "missing 'layers_2/attention/k_norm/scale', nearest names there: "
                "['layers_1/attention/k_norm/scale',",
            ),
            ({"num_hidden_layers": 1}, "unexpected 'layers_1/attention/k_norm/scale'"),
            ({"tie_word_embeddings": False}, "missing 'lm_head'"),
            (
                {"intermediate_size": 40},
                "'layers_0/mlp/down_proj/weight' has shape (36, 32), config.json asks for (36, 40)",
            ),
        ],
        ids=["missing", "extra", "head", "shape"],
    )
    def test_another_model(self, damaged, fields, part):
        path = damaged / "config.json"
        fields |= {"layer_types": None}
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        load_fails(damaged, str(damaged / "params"), part)


def delete(file):
    file.unlink()


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# Which files of an Orbax checkpoint.
DAMAGED = {
    "metadata": lambda params: [params / "_METADATA"],
    "manifest": lambda params: [params / "manifest.ocdbt"],
    "tree": lambda params: list((params / "d").iterdir()),
    "weights": lambda params: [
        max((params / "ocdbt.process_0" / "d").iterdir(), key=lambda file: file.stat().st_size)
    ],
    "all": lambda params: [path for path in params.rglob("*") if path.is_file()],
}
LOAD_EACH = """
import json, sys
import jax.numpy as jnp
from jpaged.models import checkpoint
for directory in sys.argv[1:]:
    try:
        checkpoint.load(directory, jnp.float32)
        error = None
    except Exception as e:
        error = type(e).__name__, str(e)
    print("RESULT", json.dumps(error))
"""


@pytest.fixture(scope="module")
def orbax_errors(saved, tmp_path_factory):
    """The directory, and what loading it gave, for each kind of damage.

    Loaded in another process: Orbax leaves tasks behind that fail after the test has ended.
    """
    root = tmp_path_factory.mktemp("damaged")
    directories = {"none": root / "none"}
    shutil.copytree(saved[0], directories["none"])
    for name, files in DAMAGED.items():
        for damage in (delete, truncate):
            directory = directories[name, damage] = root / f"{name}_{damage.__name__}d"
            shutil.copytree(saved[0], directory)
            for file in files(directory / "params"):
                damage(file)
    run = subprocess.run(
        [sys.executable, "-c", LOAD_EACH, *map(str, directories.values())],
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(directories), run.stderr
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    return dict(zip(directories, zip(directories.values(), results, strict=True), strict=True))


def test_orbax_without_damage(orbax_errors):
    assert orbax_errors["none"][1] is None


@pytest.mark.parametrize("damage", [delete, truncate])
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_orbax(orbax_errors, name, damage):
    directory, error = orbax_errors[name, damage]
    assert error is not None
    kind, message = error
    assert kind == "CheckpointError"
    assert str(directory / "params") in message
    assert re.search(r"damaged|truncated|incomplete|not a readable", message)
    # No insides of Python or TensorStore, but a remedy.
    assert "NoneType" not in message and len(message) < 500
    assert re.search(r"again|anew", message)
