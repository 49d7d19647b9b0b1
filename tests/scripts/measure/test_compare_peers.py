# SPDX-License-Identifier: Apache-2.0
"""Peers are stood in for by a small program that talks as they do."""

import json
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
import tqdm

from jpaged.models import checkpoint
from jpaged.models.config import dense_config
from jpaged.models.rope import Llama3Scaling
from jpaged.scripts.measure.peers import random_model
from jpaged.scripts.measure.peers.loads import Load, make_load
from jpaged.scripts.measure.peers.process import PeerError, PeerProcess, PeerSpec
from jpaged.scripts.measure.peers.rounds import measure, report_of
from jpaged.simulation.lengths import LogNormal, Uniform
from tests.scripts.programs import ROOT, run

FAKE = """
    import sys
    sys.path[:0] = {root!r}
    from jpaged.scripts.measure.peers.worker import serve

    class Fake:
        versions, device, notes = {{"fake": "1"}}, "cpu", ["as quick as can be"]

        def __init__(self, job):
            print("loading", job["options"])  # peers print what they like
            self.shift = job["options"].get("shift", 0)

        def generate(self, prompts, output_lens):
            print("generating")
            {break_here}
            return [[ids[0] + self.shift] * n for ids, n in zip(prompts, output_lens)]

    serve(Fake)
"""
JOB = {"model": "there", "threads": 1, "rows": 2}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes peers of which `break_here` is a statement that runs for each batch."""
    monkeypatch.setattr("jpaged.scripts.measure.peers.process._ROOT", tmp_path)

    def make(name="fake", break_here="pass", **options):
        module = f"peer_{name}"
        code = textwrap.dedent(FAKE).format(root=[str(ROOT)], break_here=break_here)
        (tmp_path / f"{module}.py").write_text(code)
        return PeerSpec(
            name=name, python=sys.executable, flag="fake_python", module=module, options=options
        )

    return make


@pytest.fixture
def start(tmp_path):
    """Starts peers, and ends them."""
    started = []

    def begin(spec, timeout_s=60.0):
        started.append(PeerProcess(spec, JOB, tmp_path / "log", timeout_s))
        return started[-1]

    yield begin
    for process in started:
        process.close()


def test_lengths_are_those_of_every_round_and_tokens_are_not():
    lengths = LogNormal(70, 0.8)
    load = make_load("ragged", 16, 48, lengths, lengths, max_model_len=512, seed=0)
    assert (len(load.prompt_lens), len(load.output_lens)) == (48, 48)
    assert load.max_model_len <= 512 and len(set(load.prompt_lens)) > 20
    assert 40 < np.mean(load.prompt_lens) < 110 and 40 < np.mean(load.output_lens) < 110
    rng = np.random.default_rng(0)
    first, second = load.prompts(rng, 1000), load.prompts(rng, 1000)
    assert [len(ids) for ids in first] == [len(ids) for ids in second] == load.prompt_lens
    assert all(a[:16] != b[:16] for a, b in zip(first, second, strict=True) if len(a) > 3)
    equal = make_load("equal-3", 3, 3, Uniform(5, 5), Uniform(7, 7), max_model_len=12, seed=0)
    assert (equal.prompt_lens, equal.output_lens) == ([5] * 3, [7] * 3)
    with pytest.raises(ValueError, match="12 tokens at least, more than max_model_len=11"):
        make_load("equal-3", 3, 3, Uniform(5, 5), Uniform(7, 7), max_model_len=11, seed=0)


def _config(family, **more):
    return dense_config(
        family=family, vocab_size=64, hidden_size=24, intermediate_size=32, num_layers=2,
        num_q_heads=4, num_kv_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=10000.0,
        max_position_embeddings=64, bos_token_id=0, eos_token_ids=(0,), **more,
    )  # fmt: skip


SCALING = Llama3Scaling(factor=8.0, original_max_position=16)


@pytest.mark.parametrize(
    "config",
    [
        _config("LlamaForCausalLM", tie_word_embeddings=True, rope_scaling=SCALING),
        _config("Qwen3ForCausalLM", tie_word_embeddings=False, qk_norm=True),
    ],
    ids=["llama", "qwen3"],
)
def test_both_files_have_the_same_model(config, tmp_path):
    tensors = random_model.random_tensors(config, "float32", seed=1)
    random_model.write_hf(tmp_path, config, tensors, "float32")
    file = tmp_path / "model.gguf"
    random_model.write_gguf(file, config, tensors, "float32")
    theirs, from_hf = checkpoint.load(tmp_path, np.dtype(np.float32))
    ours, from_gguf = checkpoint.load(file, np.dtype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, from_hf, from_gguf)
    frequencies = [
        model.pattern[0].attention.rope.frequencies(length=64) for model in (theirs, ours)
    ]
    np.testing.assert_allclose(*frequencies, rtol=1e-6)
    assert theirs.pattern[0].attention.rope.theta == ours.pattern[0].attention.rope.theta
    (layer,), (other,) = theirs.pattern, ours.pattern
    assert (layer.mlp, layer.attention.head_dim) == (other.mlp, other.attention.head_dim)


def test_a_peer_answers_though_it_prints(fake, start, tmp_path):
    peer = start(fake(shift=5))
    assert peer.loaded.pop("load_s") >= 0
    assert peer.loaded == {
        "versions": {"fake": "1"}, "device": "cpu", "notes": ["as quick as can be"],
    }  # fmt: skip
    seconds, tokens = peer.generate([[1, 2], [3]], [2, 1])
    assert seconds >= 0 and tokens == [[6, 6], [8]]
    assert "generating" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("break_here", "message"),
    [
        ("raise ValueError('no room\\nat all')", "fake failed: ValueError: no room at all"),
        ("import os; print('oh'); sys.stdout.flush(); os._exit(3)", "with code 3; .* last: oh"),
        ("output_lens = output_lens[1:]", "gave 1 tokens in 1 answers, not 3 in 2"),
        ("import time; time.sleep(60)", "no answer within 1 s; raise --timeout_s"),
    ],
)
def test_what_goes_wrong_with_a_peer_is_one_line(fake, start, break_here, message):
    peer = start(fake(break_here=break_here), timeout_s=60.0)
    if "sleep" in break_here:
        peer._timeout_s = 1.0  # what it has loaded within is not what is tested
    with pytest.raises(PeerError, match=message) as e:
        peer.generate([[1, 2], [3]], [2, 1])
    assert "\n" not in str(e.value)


def test_an_interpreter_that_is_not_there_is_named(start):
    spec = PeerSpec(name="vllm", python="/no/such/python", flag="vllm_python", module="m")
    with pytest.raises(PeerError, match="--vllm_python=/no/such/python: No such file"):
        start(spec)


def test_a_peer_that_is_not_installed_is_named(start):
    spec = PeerSpec(name="vllm", python=sys.executable, flag="vllm_python", module="not_there")
    with pytest.raises(PeerError, match=r"vllm \(--vllm_python=.* code 1; .*not_there"):
        start(spec)


def test_peers_take_turns_and_one_that_fails_is_left_out(fake, tmp_path, monkeypatch):
    monkeypatch.setattr("jpaged.scripts.measure.peers.rounds._SETTLE_S", 0)
    specs = [fake("first"), fake("same"), fake("other", shift=1), fake("ill", "raise OSError(7)")]
    load = Load(name="equal-2", rows=2, prompt_lens=[3, 4], output_lens=[2, 4])
    with tqdm.tqdm(disable=True) as bar:
        report = measure(
            load, specs, JOB, vocab_size=50, seed=0, repeats=2, logs=tmp_path, timeout_s=60, bar=bar
        )
    assert (report["prompt_tokens"], report["output_tokens"]) == (7, 6)
    assert report["errors"] == {"ill": "ill failed: OSError: 7"}
    peers = report["peers"]
    assert list(peers) == ["first", "same", "other"]
    assert peers["same"]["agreement"] == {"requests": 1, "tokens": 1}
    assert peers["other"]["agreement"] == {"requests": 0, "tokens": 0}
    assert peers["first"]["ratio"] == {"cold": 1, "median": 1, "min": 1, "max": 1}
    json.dumps(report)


def test_the_ratio_is_the_median_of_rounds():
    def rounds(seconds, last):
        return [(second, [[1, 2, 3, last], [5, 6]]) for second in seconds]

    found = report_of(rounds([8, 3, 4, 10], last=9), rounds([4, 2, 1, 10], last=4), num_tokens=6)
    assert found["cold_s"] == 8 and found["cold_tokens_per_s"] == 0.75
    assert found["warm_s"] == {"median": 4, "min": 3, "max": 10}
    assert found["tokens_per_s"] == {"median": 1.5, "min": 0.6, "max": 2}
    # Of 3 / 2, 4 / 1 and 10 / 10; that of the medians would be 4 / 2.
    assert found["ratio"] == {"cold": 2, "median": 1.5, "min": 1, "max": 4}
    assert found["agreement"] == {"requests": 0.5, "tokens": 5 / 6}
    alone = report_of(rounds([8, 3], last=9), [], num_tokens=6)
    assert "ratio" not in alone and "agreement" not in alone


ENDED = """
import os
from jpaged.scripts.flags import run
from jpaged.scripts.measure import compare_peers
done = {"num_requests": 1, "rows": 1, "prompt_tokens": 64, "output_tokens": 8, "peers": {}}
done["errors"] = {"fake": "fake failed"}
answers = iter([done])
compare_peers.measure = lambda *_, **__: next(answers, None) or os._exit(9)
compare_peers._write_model = lambda *_, **__: None
run(compare_peers.main)
"""


def test_a_load_is_there_though_the_next_does_not_end(tmp_path):
    (tmp_path / "ended.py").write_text(ENDED)
    command = [sys.executable, tmp_path / "ended.py", "--loads=equal-1,equal-2"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert found.returncode == 9, found.stderr
    assert "\nequal-1: 1 requests, 1 at once, 64 + 8 tokens\n" in found.stdout
    assert found.stdout.endswith("  left out: fake failed\n")


def test_bad_usage_is_one_line():
    said = run("scripts.measure.compare_peers", "--loads=equal-0", code=2)
    assert "--loads has 'equal-0': choose equal-N, N >= 1, or ragged" in said
    assert said.count("\n") == 1, said
