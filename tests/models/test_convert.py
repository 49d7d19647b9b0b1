# SPDX-License-Identifier: Apache-2.0
"""Models that are converted: the same bits, under the names that they had."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jpaged import Engine, SamplingParams
from jpaged.models import DEMO, checkpoint
from jpaged.models import convert as converting
from jpaged.models.convert import convert
from tests.models.test_checkpoint import FIXTURES, INDEX, edit, same, tensors_of
from tests.models.test_families import CASES, config_of, expected

NIGHTLY = [pytest.mark.nightly, pytest.mark.slow]
PACKED = "gpt_oss_mxfp4"
EXPERTS, FUSED, VIEWS = "mixtral_experts", "phi3_part_of_a_head", "gpt_oss_sinks"


def equal_tensors(directory, other):
    """By name, to the bit."""
    got, want = tensors_of(directory), tensors_of(other)
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


def config_fields(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("case", sorted(set(CASES) - {PACKED}))
def test_safetensors_are_what_they_were(case, tmp_path):
    convert(FIXTURES / case, tmp_path / "new")
    equal_tensors(tmp_path / "new", FIXTURES / case)
    assert config_fields(tmp_path / "new") == config_fields(FIXTURES / case)


@pytest.mark.parametrize(
    "case",
    [
        EXPERTS,
        FUSED,
        *(pytest.param(case, marks=NIGHTLY) for case in sorted(set(CASES) - {PACKED, FUSED})),
    ],
)
def test_to_orbax_and_back(case, tmp_path):
    convert(FIXTURES / case, tmp_path / "orbax", form="orbax")
    files = sorted(path.name for path in (tmp_path / "orbax").iterdir())
    assert files == ["config.json", "generation_config.json", "params"]
    config, params = checkpoint.load(tmp_path / "orbax", jnp.float32)
    want_config, want = checkpoint.load(FIXTURES / case, jnp.float32)
    assert config == want_config
    same(params, want)
    convert(tmp_path / "orbax", tmp_path / "back")
    equal_tensors(tmp_path / "back", FIXTURES / case)


@pytest.mark.parametrize("form", ["safetensors", "orbax"])
def test_packed_weights_are_written_as_what_they_stand_for(form, tmp_path):
    written = convert(FIXTURES / PACKED, tmp_path / "new", form=form)
    # Beside float32 in the fixture.
    assert written.dtypes == {"bfloat16", "float32"}
    config, params = checkpoint.load(tmp_path / "new", jnp.float32)
    want_config, want = checkpoint.load(FIXTURES / PACKED, jnp.float32)
    assert config == dataclasses.replace(want_config, packing=None)
    same(params, want)
    if form == "safetensors":
        names = {name.removesuffix("_blocks") for name in tensors_of(FIXTURES / PACKED)}
        names = {name for name in names if not name.endswith("_scales")}
        assert set(tensors_of(tmp_path / "new")) == names


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize(("case", "form"), [(FUSED, "orbax"), (VIEWS, "safetensors")])
def test_tokens_are_those_that_transformers_recorded(case, form, tmp_path):
    convert(FIXTURES / case, tmp_path / "new", form=form)
    record = expected(case)
    engine = Engine.load(tmp_path / "new", config_of(case, scan_layers=True))
    outputs = engine.generate(record["prompts"], SamplingParams(max_tokens=24, temperature=0))
    assert [output.outputs[0].token_ids for output in outputs] == record["continuations"]


@pytest.mark.parametrize("form", ["safetensors", "orbax"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "f16"])
def test_another_dtype_rounds_to_nearest(dtype, form, tmp_path):
    written = convert(FIXTURES / EXPERTS, tmp_path / "new", form=form, dtype=np.dtype(dtype))
    assert written.dtypes == {np.dtype(dtype).name}
    assert written.num_bytes == 2 * written.num_params
    convert(tmp_path / "new", tmp_path / "back")
    got, want = tensors_of(tmp_path / "back"), tensors_of(FIXTURES / EXPERTS)
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name], tensor.astype(dtype))
    assert config_fields(tmp_path / "back")["dtype"] == np.dtype(dtype).name


def test_files_of_a_bounded_size(tmp_path):
    convert(FIXTURES / EXPERTS, tmp_path / "new", max_shard_bytes=2**16)
    equal_tensors(tmp_path / "new", FIXTURES / EXPERTS)
    files = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    index, tensors = json.loads((tmp_path / "new" / INDEX).read_text()), {}
    for file in files:
        part = safetensors.numpy.load_file(tmp_path / "new" / file)
        assert sum(tensor.nbytes for tensor in part.values()) <= 2**16
        tensors |= dict.fromkeys(part, file)
        with safetensors.safe_open(tmp_path / "new" / file, "numpy") as reader:
            assert reader.metadata() == {"format": "pt"}
    assert index["weight_map"] == tensors
    sizes = [tensor.nbytes for tensor in tensors_of(FIXTURES / EXPERTS).values()]
    assert index["metadata"] == {"total_size": sum(sizes)}
    same(
        checkpoint.load(tmp_path / "new", jnp.float32)[1],
        checkpoint.load(FIXTURES / EXPERTS, jnp.float32)[1],
    )


def test_what_comes_with_a_model_is_copied(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "notes.txt").write_text("not for others")
    convert(model, tmp_path / "new")
    files = {
        str(path.relative_to(tmp_path / "new")): path
        for path in (tmp_path / "new").rglob("*")
        if path.is_file()
    }
    copied = {"tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"}
    assert set(files) == {"config.json", "model.safetensors"} | copied
    assert all(files[name].read_bytes() == (model / name).read_bytes() for name in copied)
    # Whoever may read one may read all.
    assert len({path.stat().st_mode for path in files.values()}) == 1


def test_what_config_json_says_of_other_files_is_left_out(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(FIXTURES / FUSED, model)
    (model / "model.safetensors").rename(model / "own.safetensors")
    fields = config_fields(model) | {"transformers_weights": "own.safetensors"}
    (model / "config.json").write_text(json.dumps(fields))
    convert(model, tmp_path / "new")
    assert config_fields(tmp_path / "new") == config_fields(FIXTURES / FUSED)
    equal_tensors(tmp_path / "new", FIXTURES / FUSED)


class TestOutput:
    """It is there whole, or as it was."""

    def test_a_directory_that_is_there(self, tmp_path):
        new = tmp_path / "new"
        new.mkdir()
        convert(FIXTURES / FUSED, new)
        with pytest.raises(FileExistsError, match="is there; name another, or let it be replaced"):
            convert(FIXTURES / VIEWS, new)
        equal_tensors(new, FIXTURES / FUSED)
        convert(FIXTURES / VIEWS, new, overwrite=True)
        equal_tensors(new, FIXTURES / VIEWS)
        assert [path.name for path in tmp_path.iterdir()] == ["new"]

    def test_what_is_no_model_is_not_replaced(self, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").touch()
        (tmp_path / "file").touch()
        with pytest.raises(FileExistsError, match=r"no model directory .* so it is not replaced"):
            convert(FIXTURES / FUSED, tmp_path / "mine", overwrite=True)
        with pytest.raises(FileExistsError, match="is no directory"):
            convert(FIXTURES / FUSED, tmp_path / "file", overwrite=True)
        assert (tmp_path / "mine" / "thesis.tex").exists()

    def test_a_disk_of_its_own_is_not_replaced(self, tmp_path, monkeypatch):
        (tmp_path / "disk").mkdir()
        monkeypatch.setattr(converting.os.path, "ismount", lambda path: path.name == "disk")
        with pytest.raises(FileExistsError, match=r"a disk of its own, .* a directory on it"):
            convert(FIXTURES / FUSED, tmp_path / "disk")

    def test_an_old_model_comes_back_if_the_new_one_cannot_take_its_place(
        self, tmp_path, monkeypatch
    ):
        new, rename = tmp_path / "new", pathlib.Path.rename
        convert(FIXTURES / VIEWS, new)

        def fail(path, target):
            if path.name.endswith(".partial"):
                raise OSError("busy")
            return rename(path, target)

        monkeypatch.setattr(pathlib.Path, "rename", fail)
        with pytest.raises(OSError, match="busy"):
            convert(FIXTURES / FUSED, new, overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["new"]
        equal_tensors(new, FIXTURES / VIEWS)

    @pytest.mark.parametrize("place", [".", "new", ".."])
    def test_not_in_the_model_nor_around_it(self, place, tmp_path):
        model = tmp_path / "around" / "model"
        shutil.copytree(FIXTURES / FUSED, model)
        with pytest.raises(ValueError, match="must be neither in the model nor around it"):
            convert(model, model / place, overwrite=True)

    def test_a_disk_without_room(self, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(converting.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ValueError, match=r"needs 0\.0 GB, and its disk has 0\.0 GB left"):
            convert(FIXTURES / FUSED, tmp_path / "new")

    @pytest.mark.parametrize("form", ["safetensors", "orbax"])
    def test_a_model_that_is_damaged_leaves_nothing(self, form, tmp_path):
        model, new = tmp_path / "model", tmp_path / "new"
        convert(FIXTURES / VIEWS, new)
        shutil.copytree(FIXTURES / FUSED, model)

        def damage(tensors):
            tensors["model.norm.weight"][0] = np.nan

        edit(model, damage)
        with pytest.raises(checkpoint.CheckpointError, match=r"'model\.norm\.weight' holds NaN"):
            convert(model, new, form=form, overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]
        equal_tensors(new, FIXTURES / VIEWS)

    @pytest.mark.parametrize(
        ("error", "raised", "says"),
        [
            (
                safetensors.SafetensorError("No space\nleft"),
                OSError,
                "cannot be written: No space ",
            ),
            (KeyboardInterrupt(), KeyboardInterrupt, None),
        ],
        ids=["disk", "interrupt"],
    )
    def test_what_is_cut_short_leaves_nothing(self, error, raised, says, tmp_path, monkeypatch):
        def fail(tensors, file, metadata):
            file.write_bytes(b"half")
            raise error

        monkeypatch.setattr(converting.safetensors.numpy, "save_file", fail)
        with pytest.raises(raised, match=says):
            convert(FIXTURES / FUSED, tmp_path / "new")
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"form": "gguf"}, "form='gguf' must be one of safetensors, orbax"),
        ({"dtype": np.float64}, "dtype=float64 must be one of float32, float16, bfloat16"),
        ({"dtype": np.int8}, "dtype=int8 must be"),
    ],
)
def test_what_cannot_be_written_is_refused_first(tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        convert(tmp_path / "no model", tmp_path / "new", **options)


def test_folders_are_not_copied(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(FIXTURES / FUSED, model)
    (model / "LICENSES").mkdir()
    (model / "LICENSE").write_text("free")
    convert(model, tmp_path / "new")
    assert (tmp_path / "new" / "LICENSE").read_text() == "free"
    assert not (tmp_path / "new" / "LICENSES").exists()


def test_a_head_beside_a_tied_config_stays(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(FIXTURES / "llama3_rope_hd80_tied", model)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    edit(model, add)
    convert(model, tmp_path / "orbax", form="orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    equal_tensors(tmp_path / "back", model)
    config, params = checkpoint.load(tmp_path / "back", jnp.float32)
    assert not config.tie_word_embeddings
    assert not jax.numpy.array_equal(params["lm_head"], params["embedding"])
