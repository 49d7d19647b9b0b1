# SPDX-License-Identifier: Apache-2.0
"""jpaged score as a user runs it."""

import functools
import json
import os
import pty

import pytest

from jpaged import Engine, EngineConfig
from tests.scripts.programs import ended, start

run = functools.partial(ended, "jpaged", "score")
SETTINGS = ("--page_size=4", "--max_num_seqs=8", "--max_model_len=64")


@pytest.fixture(scope="module")
def engine():
    return Engine.load("demo", EngineConfig(page_size=4, max_num_seqs=8, max_model_len=64))


def test_a_file_of_completions(tmp_path, engine):
    rows = [
        {"prompt": "Once upon ", "completions": ["a time", "a xylophone"]},
        {"prompt": [5, 6, 7], "completion": [8, 9]},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(f"--input={file}", *SETTINGS)
    assert done.returncode == 0, done.stderr
    found = {(f["line"], f["completion"]): f for f in map(json.loads, done.stdout.splitlines())}
    assert set(found) == {(1, 0), (1, 1), (2, 0)}
    assert found[1, 0]["logprob"] > found[1, 1]["logprob"]
    # The space before is the completion's.
    assert engine.tokenizer.decode(found[1, 0]["token_ids"]) == " a time"
    expected = {
        (1, 0): engine.score("Once upon", [" a time"]),
        (1, 1): engine.score("Once upon", [" a xylophone"]),
        (2, 0): engine.score([5, 6, 7], [[8, 9]]),
    }
    for place, (score,) in expected.items():
        own = found[place]
        assert own["token_ids"] == score.token_ids and own["is_greedy"] == score.is_greedy
        assert own["logprobs"] == pytest.approx(score.logprobs, abs=1e-4)
        assert own["logprob"] == pytest.approx(sum(score.logprobs), abs=1e-4)
    assert "3 completions scored" in done.stderr


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "a"}', "line 1: it must have either a completion or completions"),
        ('{"prompt": "a", "completion": "b"}\n[]', r"line 2: [] must be an object such as"),
        ('{"prompt": "a", "completion": ""}', "line 1: completion='' must be text or token ids"),
        ('{"prompt": "a", "completion": [1]}', "must both be text, or both token ids"),
        ('{"prompt": "a", "completions": []}', "completions=[] must be a list of at least one"),
        ('{"prompt": "a", "completion": "b", "n": 1}', "line 1: unknown field 'n'"),
        ('{"prompt": "a"', "line 1: it is not valid JSON"),
        ("", "standard input has no prompts"),
        ('{"prompt": [1], "completion": [99999]}', "pair 1: token id 99999 is outside"),
    ],
)
def test_refusals(lines, message):
    done = run(*SETTINGS, stdin=lines)
    assert done.returncode == 2 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("jpaged score: ") and message in last


def test_a_terminal_is_no_input():
    parent, child = pty.openpty()
    try:
        process = start("jpaged", "score", stdin=child)
        _, errors = process.communicate(timeout=60)
    finally:
        os.close(parent)
        os.close(child)
    assert process.returncode == 2 and b"nothing to score: give --input=FILE" in errors


def test_a_file_that_is_not_there(tmp_path):
    done = run(f"--input={tmp_path / 'gone'}")
    assert done.returncode == 2 and f"--input={tmp_path / 'gone'}: No such file" in done.stderr
