# SPDX-License-Identifier: Apache-2.0
"""Models in a bucket: gs://bucket/... is a folder here, for etils and for TensorStore alike."""

import importlib.util
import pathlib

import jax.numpy as jnp
import pytest
from etils import epath
from orbax.checkpoint._src.path import gcs_utils

from jpaged import Engine, EngineConfig
from jpaged.host.checks import directory
from jpaged.models import DEMO, checkpoint, find
from jpaged.models.convert import convert
from jpaged.models.merged import merge_projections
from jpaged.models.paths import path_of
from jpaged.scripts.conversations import chat_template_of
from tests.models.test_checkpoint import same

ADDRESS = "gs://bucket/model"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that the bucket is."""
    folder = tmp_path / "bucket"
    folder.mkdir()

    def local(path):
        path = str(path)
        return path.replace("gs://bucket", str(folder)) if path.startswith("gs://") else path

    def one(function, path, *args, **options):
        return function(local(path), *args, **options)

    def found(function, path):
        return [name.replace(str(folder), "gs://bucket") for name in function(local(path))]

    def two(function, path, other, **options):
        return function(local(path), local(other), **options)

    monkeypatch.setattr(
        gcs_utils, "get_kvstore_for_gcs", lambda path: {"driver": "file", "path": local(path)}
    )
    names = ("exists", "isdir", "listdir", "makedirs", "mkdir", "open", "remove", "rmtree", "stat")
    mocks = dict.fromkeys(names, one) | dict.fromkeys(("copy", "rename", "replace"), two)
    with epath.testing.mock_epath(glob=found, **mocks):
        yield folder


def test_an_orbax_checkpoint_is_served_from_a_bucket(bucket):
    convert(DEMO, bucket / "model", form="orbax")
    (bucket / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (bucket / "model" / "generation_config.json").write_text('{"temperature": 0.5}')
    engine = Engine.load(ADDRESS, EngineConfig(max_model_len=64, num_pages=16))
    same(engine._runner.params, merge_projections(checkpoint.load(DEMO, jnp.float32)[1]))
    assert engine.defaults.params.temperature == 0.5
    tokenizer = Engine.load(DEMO, EngineConfig(max_model_len=64, num_pages=16)).tokenizer
    ids = tokenizer.encode("Hello", add_special_tokens=False).ids
    conversation = [{"role": "user", "content": "Hello"}]
    assert engine.chat_prompt(conversation) == ids
    assert chat_template_of(find(ADDRESS)).render(conversation) == "Hello"


def test_what_is_saved_to_a_bucket(bucket):
    config, params = checkpoint.load(DEMO, jnp.bfloat16)
    checkpoint.save_orbax(ADDRESS, config, params)
    assert (bucket / "model" / "params").is_dir()
    again, loaded = checkpoint.load(ADDRESS, jnp.bfloat16)
    assert again == config
    same(loaded, params)


def test_a_model_of_a_bucket_is_converted(bucket, tmp_path):
    convert(DEMO, bucket / "model", form="orbax")
    convert(ADDRESS, tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == (
        DEMO / "tokenizer.json"
    ).read_bytes()
    same(checkpoint.load(tmp_path / "new", jnp.float32)[1], checkpoint.load(DEMO, jnp.float32)[1])
    with pytest.raises(ValueError, match="must be a directory of this machine"):
        convert(DEMO, ADDRESS)


def test_what_a_bucket_does_not_serve(bucket):
    with pytest.raises(FileNotFoundError, match="'gs://bucket/model' does not exist"):
        Engine.load(ADDRESS)
    convert(DEMO, bucket / "model")
    with pytest.raises(ValueError, match=r"has no params/ \(Orbax\), the one form that"):
        Engine.load(ADDRESS)


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is there")
def test_what_is_missing_is_named():
    with pytest.raises(FileNotFoundError) as raised:
        find(ADDRESS)
    assert str(raised.value).startswith(
        f"{ADDRESS}: Please install gcsfs to access Google Storage: pip install gcsfs for gs://"
    )
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("address", ["file:///tmp/x", "C://models/x", "http://x/y", "://x"])
def test_other_addresses_are_refused(address, tmp_path):
    with pytest.raises(ValueError, match="is no address that is known: those of buckets begin"):
        find(address)
    with pytest.raises(ValueError, match="is no address that is known"):
        checkpoint.load(address, jnp.float32)


def test_a_folder_that_looks_like_an_address_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:" / "model").mkdir(parents=True)
    assert path_of(find("odd://model")).is_dir()


def test_a_path_that_cannot_look_at_disks_is_taken():
    assert isinstance(directory("x", pathlib.PurePosixPath("a/b")), pathlib.Path)


def test_a_bucket_serves_no_gguf(bucket):
    with pytest.raises(ValueError, match="buckets serve no GGUF files: copy it to a disk"):
        checkpoint.load("gs://bucket/model.gguf", jnp.float32)


def test_a_bucket_that_cannot_be_reached():
    def fail(function, path):
        raise PermissionError("no\ncredentials")

    with epath.testing.mock_epath(exists=fail):
        with pytest.raises(FileNotFoundError, match="cannot be reached: PermissionError: no cred"):
            find(ADDRESS)
