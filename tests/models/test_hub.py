# SPDX-License-Identifier: Apache-2.0
"""Models by name, from a hub of this machine; a process each, as its library reads HF_* once."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from jpaged.models import DEMO, find, hub
from tests.models.hub_server import COMMIT
from tests.models.hub_server import hub as serving
from tests.scripts.programs import environment

ROOT = pathlib.Path(__file__).resolve().parents[2]
HF_CASE = ROOT / "tests" / "fixtures" / "hf" / "llama_gqa5_hd48_untied"
SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
# What is not read: other forms of the weights, and papers.
ASIDE = {
    "README.md": b"# a model\n",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"again",
    "original/model.safetensors": b"again",
    "original/model.safetensors.index.json": b"{ }",
    "onnx/model.onnx": b"other",
    "tokenizer.model": b"other",
}


def run(code, tmp_path, endpoint="http://127.0.0.1:1", **env):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"from jpaged.models import find, hub\n{code}"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint} | env,
    )  # fmt: skip
    return done


def found(tmp_path, endpoint, name="org/name", **env):
    done = run(f"print(find({name!r}))", tmp_path, endpoint, **env)
    assert done.returncode == 0, done.stderr
    return pathlib.Path(done.stdout.strip())


def refused(tmp_path, endpoint="http://127.0.0.1:1", name="org/name", **env):
    code = f"try: find({name!r})\nexcept FileNotFoundError as e: print(e)"
    done = run(code, tmp_path, endpoint, **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and len(done.stdout) < 500
    assert done.stdout.startswith(f"{name!r} is no directory here, and could not be had from the ")
    assert done.stdout.endswith("To load a model from a directory, pass the directory's path\n")
    return done.stdout


def names_in(directory):
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


def test_downloads_what_is_read_and_nothing_else(tmp_path):
    # Each its own, as the cache holds equal files once.
    read = {name: json.dumps({"name": name}).encode() for name in SMALL} | {
        "chat_template.jinja": b"x",
        "additional_chat_templates/tool_use.jinja": b"y",
        "special_tokens_map.json": b"{}",
        "model.safetensors": b"weights",
    }
    with serving({"org/name": read | ASIDE}) as (endpoint, sent):
        directory = found(tmp_path, endpoint)
        assert directory.name == COMMIT and names_in(directory) == set(read)
        assert (directory / "model.safetensors").read_bytes() == b"weights"
        assert sorted(sent) == sorted(read)
        # Again: nothing is sent.
        assert found(tmp_path, endpoint) == directory and len(sent) == len(read)
    # Without a network, and where there shall be none, the cache serves.
    assert found(tmp_path, endpoint) == directory
    assert found(tmp_path, endpoint, HF_HUB_OFFLINE="1") == directory


def test_an_index_says_which_files_count(tmp_path):
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "parts/model-2-of-2.safetensors"}}
    read = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1-of-2.safetensors": b"a",
        "parts/model-2-of-2.safetensors": b"b",
    }
    other = {"other-1-of-1.safetensors": b"c"} | ASIDE
    with serving({"org/name": read | other}) as (endpoint, sent):
        assert names_in(found(tmp_path, endpoint)) == set(read) == set(sent)


@pytest.mark.parametrize("named", ["b.safetensors", "b.safetensors.index.json"])
def test_what_config_json_names_counts(tmp_path, named):
    index = {"weight_map": {"a": "b.safetensors"}}
    read = {
        "config.json": json.dumps({"transformers_weights": named}).encode(),
        "b.safetensors": b"b",
        "b.safetensors.index.json": json.dumps(index).encode(),
    }
    other = {"a.safetensors": b"a", "c.safetensors": b"c"}
    with serving({"org/name": read | other}) as (endpoint, _):
        assert names_in(found(tmp_path, endpoint)) == set(read)


def test_refusals_say_why_and_what_else_to_do(tmp_path):
    with serving({}, gated=["org/gated"]) as (endpoint, _):
        assert "the hub has no such model, or it is private" in refused(tmp_path, endpoint)
        text = refused(tmp_path, endpoint, "org/gated")
        assert "its licence is to be accepted on the hub's page of org/gated" in text
        assert "HF_TOKEN" in text
    assert "no network, and its cache does not hold the model (ConnectError" in refused(tmp_path)
    text = refused(tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set, and its cache does not hold the model" in text


def test_without_the_package(tmp_path):
    code = "import sys; sys.modules['huggingface_hub'] = None\n"
    code += "try: find('org/name')\nexcept FileNotFoundError as e: print(e)"
    text = run(code, tmp_path).stdout
    assert "the package huggingface_hub is not there" in text and text.count("\n") == 1


def test_a_path_that_exists_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda name: f"downloaded {name}")
    assert find("org/name") == "downloaded org/name"
    assert find("demo") == DEMO
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "demo").mkdir()
    assert find("org/name") == "org/name" and find("demo") == "demo"
    (tmp_path / "org" / "link").symlink_to("gone")
    assert find("org/link") == "org/link"


def test_what_is_no_name_is_a_path():
    paths = ["a", "./a/b", "../b", "/a/b", "~/b", "a/b/c", "a//b", "a/b/", ".a/b", "a/.b", "a b/c"]
    for path in [*paths, "ä/b", "a/b\n", "", pathlib.Path("a/b")]:
        assert not hub.is_name(path), path
        assert find(path) == path
    for name in ["Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B", "a_b/c.d", "0/1"]:
        assert hub.is_name(name)


def test_nothing_is_imported_for_a_path(tmp_path):
    code = f"import sys; find({str(tmp_path)!r}); find('demo'); print('huggingface_hub' in sys."
    assert run(code + "modules)", tmp_path).stdout == "False\n"


@pytest.mark.slow
def test_the_program_takes_a_name(tmp_path):
    model = {file.name: file.read_bytes() for file in HF_CASE.iterdir() if file.is_file()}
    command = [
        *(sys.executable, "-m", "jpaged", "generate", "--prompt=1 2 3", "--max_tokens=2"),
        *("--temperature=0", "--num_pages=16", "--output=json", "--model"),
    ]
    outputs = []
    with serving({"org/name": model}) as (endpoint, _):
        for name in ("org/name", str(HF_CASE), "org/other"):
            done = subprocess.run(
                [*command, name], cwd=ROOT, capture_output=True, text=True, timeout=300,
                env=environment(HF_HOME=str(tmp_path / "hf"), HF_ENDPOINT=endpoint),
            )  # fmt: skip
            outputs.append(done)
    assert outputs[0].returncode == outputs[1].returncode == 0, outputs[0].stderr
    ids = [json.loads(done.stdout)["outputs"][0]["token_ids"] for done in outputs[:2]]
    assert ids[0] == ids[1]
    assert outputs[2].returncode == 2
    assert outputs[2].stderr.startswith("jpaged generate: 'org/other' is no directory here")
    assert outputs[2].stderr.count("\n") == 1
