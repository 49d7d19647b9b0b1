# SPDX-License-Identifier: Apache-2.0
"""Programs keep long prompts for the next process."""

import json
import re

import pytest

from tests.chatting import chatty_model
from tests.scripts.programs import ended

LONG = "Once upon a time there was a little dog who lived in a big house by the sea. " * 4
DETERMINISTIC = ("--deterministic", "--max_num_batched_tokens=64")
SMALL = ("--page_size=4", "--num_pages=200", "--max_num_seqs=2", "--max_tokens=4")


def kept(tmp_path):
    return len(list((tmp_path / "kept").rglob("*.kv")))


def generate(*flags):
    command = ("jpaged", "generate", "--prompt", LONG + "One day", "--output=json", *SMALL)
    done = ended(*command, "--seed=1", *DETERMINISTIC, *flags)
    assert done.returncode == 0, done.stderr
    (output,) = map(json.loads, done.stdout.splitlines())
    found = re.search(r"\((\d+) tokens from disk\)", done.stderr)
    return output["outputs"], int(found[1]) if found else 0


@pytest.mark.slow
def test_generate_twice(tmp_path):
    flag = f"--prompt_cache={tmp_path / 'kept'}"
    want, _ = generate()
    assert generate(flag) == (want, 0)
    count = kept(tmp_path)
    assert count > 10
    assert generate(flag) == (want, 4 * count)
    assert generate(flag, "--prompt_cache_min_pages=200") == (want, 0)


@pytest.mark.slow
def test_batch_finds_what_a_batch_left(tmp_path):
    rows = [{"custom_id": f"r{i}", "prompt": f"{LONG}The {i}"} for i in range(4)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def batch(name, *flags):
        path = tmp_path / name
        metrics = tmp_path / f"{name}.prom"
        command = ("jpaged", "batch", f"--input={source}", f"--output={path}", *SMALL)
        done = ended(*command, f"--metrics_file={metrics}", *flags)
        assert done.returncode == 0, done.stderr
        (hits,) = re.findall(r"external_prefix_cache_hits_total\S* (\d+)", metrics.read_text())
        return path.read_bytes(), int(hits)

    flag = f"--prompt_cache={tmp_path / 'kept'}"
    want, _ = batch("without")
    assert batch("first", flag) == (want, 0)
    assert batch("second", flag) == (want, 4 * kept(tmp_path))


@pytest.mark.slow
def test_chat_finds_what_a_chat_left(tmp_path):
    model = chatty_model(tmp_path / "model")
    command = ("jpaged", "chat", f"--model={model}", f"--system={LONG}", *SMALL)
    found = []
    for _ in range(2):
        done = ended(
            *command, f"--prompt_cache={tmp_path / 'kept'}", "--seed=1", stdin="Hello\nAnd then?\n"
        )
        assert done.returncode == 0, done.stderr
        found.append(list(map(int, re.findall(r"\((\d+) of them on disk\)", done.stderr))))
    assert not found[0] and found[1] and found[1][0] > 40


def test_what_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = ended("jpaged", "generate", "--prompt=x", f"--prompt_cache={tmp_path / 'file'}", *SMALL)
    assert done.returncode == 2 and not done.stdout
    assert f"prompt_cache={tmp_path / 'file'}: File exists; name another directory" in done.stderr
    done = ended("jpaged", "generate", "--prompt=x", "--prompt_cache=y", "--noprefix_cache")
    assert done.returncode == 2 and "needs the prefix cache" in done.stderr
