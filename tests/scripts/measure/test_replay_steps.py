# SPDX-License-Identifier: Apache-2.0
"""Steps that the generation script recorded, run again by a program of its own."""

import json

from tests.scripts.programs import run, run_report

PROGRAM = "jpaged.scripts.measure.replay_steps"


def test_the_tokens_of_a_generation(tmp_path):
    steps, tokens = tmp_path / "steps.jsonl.gz", tmp_path / "tokens.jsonl"
    asked = ["--prompt=A tale", "--max_tokens=9", "--seed=1", "--n=2", "--ignore_eos"]
    printed = run(
        "jpaged", "generate", *asked, "--output=json", f"--record_steps={steps}", "--num_pages=9"
    )
    answer = json.loads(printed)
    report = run_report(PROGRAM, f"--steps={steps}", f"--tokens={tokens}")
    found = [json.loads(line)["samples"] for line in tokens.read_text().splitlines()]
    for index, sample in enumerate(answer["outputs"]):
        own = [token for step in found for _, place, token in step if place == index]
        assert own[:9] == sample["token_ids"]
    assert report["num_steps"] == len(found) >= 9
    assert report["num_samples"] == sum(map(len, found))


def test_what_holds_no_steps(tmp_path):
    assert "No such file" in run(PROGRAM, f"--steps={tmp_path / 'none'}", code=2)
    (tmp_path / "other").write_text("{}\n")
    assert "holds no steps" in run(PROGRAM, f"--steps={tmp_path / 'other'}", code=2)
