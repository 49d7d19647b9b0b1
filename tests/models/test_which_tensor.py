# SPDX-License-Identifier: Apache-2.0
"""Which tensor is meant where a directory holds more than one: the rule of models.checkpoint."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jpaged.models import checkpoint
from jpaged.models.json_fields import ModelConfigError
from tests.models.test_checkpoint import (
    FIXTURES,
    INDEX,
    SHARDED,
    SINGLE,
    TIED,
    at,
    edit,
    load_fails,
    same,
    tensors_of,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def copy(tmp_path):
    def make(name, **fields):
        directory = tmp_path / "model"
        shutil.copytree(FIXTURES / name, directory)
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return directory

    return make


def save(directory, file, tensors):
    (directory / file).parent.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, directory / file, metadata={"format": "pt"})


def noise(tensor):
    return np.random.default_rng(0).normal(size=tensor.shape).astype(tensor.dtype)


def loads_like(directory, name):
    same(
        checkpoint.load(directory, jnp.float32)[1], checkpoint.load(FIXTURES / name, jnp.float32)[1]
    )


class TestTiedHead:
    """transformers 5.24 ties what is equal, keeps what differs, takes a head for an embedding."""

    def test_another_head_is_used(self, copy, caplog):
        directory = copy(TIED)
        tensors = tensors_of(directory)
        tensors[HEAD] = noise(tensors[EMBEDDING])
        save(directory, "model.safetensors", tensors)
        config, params = checkpoint.load(directory, jnp.float32)
        assert not config.tie_word_embeddings
        np.testing.assert_array_equal(params["lm_head"], tensors[HEAD])
        np.testing.assert_array_equal(params["embedding"], tensors[EMBEDDING])
        assert "tie_word_embeddings" in caplog.text

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_the_same_head_is_tied(self, copy, dtype, caplog):
        directory = copy(TIED)
        edit(directory, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING]}))
        config, params = checkpoint.load(directory, dtype)
        want_config, want = checkpoint.load(FIXTURES / TIED, dtype)
        assert config == want_config and config.tie_word_embeddings
        same(params, want)
        assert not caplog.records

    def test_head_alone(self, copy):
        directory = copy(TIED)
        edit(directory, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
        assert checkpoint.load(directory, jnp.float32)[0].tie_word_embeddings
        loads_like(directory, TIED)

    def test_neither(self, copy):
        directory = copy(TIED)
        edit(directory, lambda tensors: tensors.pop(EMBEDDING))
        load_fails(directory, f"missing {EMBEDDING!r}")

    def test_head_of_another_shape(self, copy):
        directory = copy(TIED)
        edit(directory, lambda tensors: tensors.update({HEAD: np.zeros((3, 40), "f4")}))
        load_fails(directory, f"{HEAD!r} has shape (3, 40), config.json asks for (160, 40)")

    def test_orbax(self, copy, tmp_path):
        config, params = checkpoint.load(FIXTURES / TIED, jnp.float32)
        other = params | {"lm_head": jnp.asarray(noise(params["embedding"]))}
        alone = {"lm_head": params["embedding"]} | params
        del alone["embedding"]
        for name, stored, tied, want in (
            ("same", params | {"lm_head": params["embedding"]}, True, params),
            ("other", other, False, other),
            ("alone", alone, True, params),
        ):
            checkpoint.save_orbax(tmp_path / name, config, stored)
            loaded_config, loaded = checkpoint.load(tmp_path / name, jnp.float32)
            assert loaded_config.tie_word_embeddings == tied
            same(loaded, want)


class TestIndex:
    def test_its_assignment_wins(self, copy):
        directory = copy(SHARDED)
        weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
        for file in set(weight_map.values()):
            # Each file gets a stale copy of every tensor of the others.
            tensors = tensors_of(directory)
            stale = {n: noise(t) for n, t in tensors.items() if weight_map[n] != file}
            edit(directory, lambda tensors, stale=stale: tensors.update(stale), file)
        loads_like(directory, SHARDED)

    def test_what_it_does_not_list_is_not_looked_at(self, copy):
        directory = copy(SHARDED)
        extra = {"mtp.weight": np.zeros(3, "i4"), "model.layers.9.mlp.up_proj.weight": np.ones(2)}
        edit(directory, lambda tensors: tensors.update(extra), "model-00002-of-00004.safetensors")
        loads_like(directory, SHARDED)

    def test_unexpected_tensor_that_it_lists(self, copy):
        directory = copy(SHARDED)
        file = "model-00002-of-00004.safetensors"
        edit(directory, lambda tensors: tensors.update({"mtp.weight": np.zeros(3, "f4")}), file)
        index = json.loads((directory / INDEX).read_text())
        index["weight_map"]["mtp.weight"] = file
        (directory / INDEX).write_text(json.dumps(index))
        load_fails(directory, "unexpected 'mtp.weight'")

    def test_tensor_that_its_file_lacks(self, copy):
        directory = copy(SHARDED)
        index = json.loads((directory / INDEX).read_text())
        one, two = "model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"
        name = next(n for n, file in index["weight_map"].items() if file == one)
        index["weight_map"][name] = two
        (directory / INDEX).write_text(json.dumps(index))
        load_fails(directory, f"missing {name!r}, which {INDEX} says is in {two!r}")

    def test_folders_and_links(self, copy, tmp_path):
        """A hub's cache links to files elsewhere; folders below the model's are its own."""
        directory = copy(SHARDED)
        file, moved = "model-00001-of-00004.safetensors", tmp_path / "blob"
        shutil.move(directory / file, moved)
        (directory / file).symlink_to(moved)
        loads_like(directory, SHARDED)
        (directory / "sub").mkdir()
        (directory / file).rename(directory / "sub" / file)
        index = (directory / INDEX).read_text().replace(file, f"sub/{file}")
        (directory / INDEX).write_text(index)
        loads_like(directory, SHARDED)

    @pytest.mark.parametrize(
        "name", ["../blob.safetensors", "a/../../blob.safetensors", "{root}/blob.safetensors", ""]
    )
    def test_files_outside(self, copy, tmp_path, name):
        directory = copy(SHARDED)
        shutil.copy(directory / "model-00001-of-00004.safetensors", tmp_path / "blob.safetensors")
        name = name.replace("{root}", str(tmp_path))
        index = json.loads((directory / INDEX).read_text())
        index["weight_map"][HEAD] = name
        (directory / INDEX).write_text(json.dumps(index))
        load_fails(directory, INDEX, repr(name), "outside the directory")

    def test_file_of_another_kind(self, copy):
        directory = copy(SHARDED)
        index = json.loads((directory / INDEX).read_text())
        index["weight_map"][HEAD] = "pytorch_model.bin"
        (directory / INDEX).write_text(json.dumps(index))
        load_fails(directory, "names 'pytorch_model.bin', which is no .safetensors file")


class TestSeveralFiles:
    def test_model_safetensors_counts_alone(self, copy):
        """As in transformers 5.24, also beside an index."""
        directory = copy(SINGLE)
        stale = {name: noise(tensor) for name, tensor in tensors_of(directory).items()}
        save(directory, "a.safetensors", stale)
        save(directory, "model-00001-of-00001.safetensors", stale)
        (directory / "consolidated.safetensors").write_bytes(b"damaged")
        loads_like(directory, SINGLE)
        index = {"weight_map": dict.fromkeys(stale, "model-00001-of-00001.safetensors")}
        (directory / INDEX).write_text(json.dumps(index))
        loads_like(directory, SINGLE)

    def test_index_counts_before_other_files(self, copy):
        directory = copy(SHARDED)
        stale = {name: noise(tensor) for name, tensor in tensors_of(directory).items()}
        save(directory, "consolidated.safetensors", stale)
        loads_like(directory, SHARDED)

    def test_one_tensor_in_two_files(self, copy):
        directory = copy(SHARDED)
        (directory / INDEX).unlink()
        one, two = "model-00001-of-00004.safetensors", "x.safetensors"
        tensors = dict(safetensors.numpy.load_file(directory / one))
        save(directory, two, tensors)
        loads_like(directory, SHARDED)
        name = sorted(tensors)[-1]
        for other in (
            noise(tensors[name]),
            tensors[name].astype("f2"),
            tensors[name].astype("i8"),
            tensors[name][:1].copy(),
        ):
            save(directory, two, tensors | {name: other})
            load_fails(directory, repr(one), repr(two), f"different tensors {name!r}", INDEX)

    def test_what_config_json_names(self, copy):
        directory = copy(SINGLE, transformers_weights="mine.safetensors")
        (directory / "model.safetensors").rename(directory / "mine.safetensors")
        loads_like(directory, SINGLE)
        stale = {name: noise(tensor) for name, tensor in tensors_of(directory).items()}
        save(directory, "model.safetensors", stale)
        loads_like(directory, SINGLE)

    def test_the_index_that_config_json_names(self, copy):
        directory = copy(SHARDED, transformers_weights="mine.safetensors.index.json")
        (directory / INDEX).rename(directory / "mine.safetensors.index.json")
        save(directory, "model.safetensors", {"a": np.zeros(1)})
        loads_like(directory, SHARDED)

    @pytest.mark.parametrize(
        ("name", "part", "error"),
        [
            ("../model.safetensors", "outside the directory", checkpoint.CheckpointError),
            ("model.bin", "no .safetensors file", checkpoint.CheckpointError),
            ("absent.safetensors", "lacks 'absent.safetensors'", FileNotFoundError),
            (5, "transformers_weights=5 must be of type str", ModelConfigError),
        ],
    )
    def test_what_config_json_cannot_name(self, copy, name, part, error):
        directory = copy(SINGLE, transformers_weights=name)
        load_fails(directory, "config.json", part, error=error)

    def test_orbax_beside_safetensors(self, copy):
        directory = copy(SINGLE)
        config, params = checkpoint.load(directory, jnp.float32)
        checkpoint.save_orbax(directory, config, params)
        load_fails(directory, "params/ (Orbax)", "'model.safetensors'", "move one of them out")
        (directory / "model.safetensors").unlink()
        loads_like(directory, SINGLE)


BUFFERS = [
    "model.rotary_emb.inv_freq",
    "rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.layers.0.self_attn.rotary_emb.original_inv_freq",
    "model.layers.1.self_attn.masked_bias",
    "model.layers.1.self_attn.bias",
    "model.layers.1.attn.bias",
    "model.position_ids",
]


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_not_looked_at(copy, name):
    directory = copy(SINGLE)
    edit(directory, lambda tensors: tensors.update({name: np.zeros((1, 1, 4, 4), np.bool_)}))
    loads_like(directory, SINGLE)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.o_proj.bias", "lm_head.bias", "model.layers.1.mlp.bias"]
)
def test_biases_are_no_buffers(copy, name):
    directory = copy(SINGLE)
    edit(directory, lambda tensors: tensors.update({name: np.zeros(3, "f4")}))
    load_fails(directory, f"unexpected {name!r}")


class TestSizes:
    """Refused by arithmetic, before anything is allocated or grows with config.json."""

    HUGE = (
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**9},
        {"hidden_size": 10**9},
        {"intermediate_size": 2**31 - 1},
        {"head_dim": 10**9},
        {"num_attention_heads": 10**9},
    )

    @pytest.mark.parametrize("fields", HUGE, ids=str)
    def test_safetensors(self, copy, fields):
        directory = copy(SINGLE, **fields)
        ((field, value),) = fields.items()
        load_fails(
            directory,
            "config.json asks for ",
            f"{field}={value}",
            " parameters",
            f"{directory} holds 96660 in 21 tensors of 2 layers",
        )

    def test_orbax(self, tmp_path):
        config, params = checkpoint.load(FIXTURES / SINGLE, jnp.float32)
        checkpoint.save_orbax(tmp_path, config, params)
        path = tmp_path / "config.json"
        written = path.read_text()
        for fields in self.HUGE:
            path.write_text(json.dumps(json.loads(written) | fields))
            ((field, value),) = fields.items()
            load_fails(tmp_path, f"{field}={value}", "params holds 96660 in 21 tensors")


@pytest.mark.parametrize(
    "dtype", [jnp.int8, jnp.uint8, jnp.int32, jnp.bool_, jnp.complex64, jnp.float8_e4m3fn, jnp.int4]
)
@pytest.mark.parametrize("path", ["embedding", "layers_1/attention/k_proj/weight"])
def test_dtypes_of_orbax(tmp_path, dtype, path):
    config, params = checkpoint.load(FIXTURES / SINGLE, jnp.float32)
    *parents, last = path.split("/")
    place = params
    for parent in parents:
        place = place[parent]
    place[last] = jnp.round(place[last] * 7).astype(dtype)
    checkpoint.save_orbax(tmp_path, config, params)
    load_fails(tmp_path, f"tensor {path!r} has dtype {jnp.dtype(dtype).name}", "supported: float32")


def test_every_tensor_has_its_own_value():
    """The checks above would pass on a fixture of equal tensors; it is none."""
    for name in (SINGLE, SHARDED, TIED):
        params = checkpoint.load(FIXTURES / name, jnp.float32)[1]
        leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
        assert len(set(leaves)) == len(leaves)
        assert at(params, EMBEDDING).ndim == 2
