# SPDX-License-Identifier: Apache-2.0
"""`jpaged warmup` as users run it, and what is left to compile after it."""

import os
import subprocess
import sys

import pytest

from tests.scripts.programs import ROOT, environment, run

SETTINGS = ("--max_num_seqs=4", "--max_num_batched_tokens=32", "--num_pages=65")
# Prints cache misses and hits of an engine's life, from another process.
ANSWER = """
import collections, sys, jax
from jpaged import Engine, EngineConfig, SamplingParams
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.split("/")[-1]]))
config = dict(max_num_seqs=4, max_num_batched_tokens=32, num_pages=65, step_shapes=sys.argv[2])
engine = Engine.load("demo", EngineConfig(compilation_cache_dir=sys.argv[1], **config))
params = SamplingParams(max_tokens=4, temperature=0.7, repetition_penalty=1.1)
engine.generate(["Once upon a time", "A fox"], params)
print(seen["cache_misses"], seen["cache_hits"], engine.stats().num_compilations)
"""
# Several refusals cost one start: what each says, a line each.
REFUSING = """
import shlex, sys
from absl import app, flags
from absl.testing import flagsaver
from jpaged.scripts import warmup
for line in sys.stdin.read().splitlines():
    with flagsaver.flagsaver():
        flags.FLAGS(["warmup", *shlex.split(line)])
        try:
            warmup.main(["warmup"])
        except app.UsageError as e:
            print(" ".join(str(e).split()))
"""


@pytest.mark.slow
@pytest.mark.nightly
def test_the_next_process_compiles_nothing_wherever_the_directory_is(tmp_path):
    lines = run(
        "jpaged", "warmup", "--model=demo", "--prompt=Once upon a time", "--prompt=A fox",
        "--max_tokens=4", "--repetition_penalty=1.1", "--max_padding=0.2", *SETTINGS,
        f"--compilation_cache_dir={tmp_path}/here",
    ).splitlines()  # fmt: skip
    # Of 5 and 3 tokens: both are read at once, and have three more steps.
    found = [" ".join(line.split()) for line in lines[1:]]
    shapes = ["2 x 2 3 6 0.0%", "16 x 4 1 8 50.0%", "2 shapes 4 14 36.4%"]
    assert [line.rsplit(" ", 2)[0] for line in found] == shapes
    assert all(line.endswith(" s") and not line.endswith(" 0.00 s") for line in found)
    os.rename(tmp_path / "here", tmp_path / "there")
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(tmp_path / "there"), "2x2,16x4"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    misses, hits, compiled = map(int, done.stdout.split())
    assert misses == 0 and hits >= compiled > 4


def test_what_is_refused_and_what_is_only_planned(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Once", "max_tokens": -1}\n')
    common = f"--compilation_cache_dir={tmp_path}/xla --num_pages=65"
    lines = [
        "",
        "--model=demo --max_padding=0.1",
        "--model=demo --num_requests=4 --prompt=Once",
        f"--model=demo --prompts_file={tmp_path}/bad.jsonl",
        "--model=demo --num_requests=4 --prompt_len=x",
        "--model=demo --num_requests=4 --step_shapes=9",
        "--model=demo --prompt='Once upon a time' --max_model_len=4",
        "--model=demo --chat",
        "--model=demo --chat_template=x",
        "--model=demo --chat --prompt=Once",
        "--model=demo --num_requests=4 --prompt_len=5 --output_len=3 --dry_run",
        """--model=demo --chat --prompt='[{"role": "user", "content": "Once upon a time"}]' """
        """--chat_template="{{ messages[0]['content'] }}" --max_tokens=4 --dry_run""",
    ]
    done = subprocess.run(
        [sys.executable, "-c", REFUSING],
        input="\n".join(f"{line} {common}" for line in lines),
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    refusals = (
        "--model is missing",
        "--max_padding chooses shapes for a job: give --prompts_file",
        "--num_requests and prompts exclude each other",
        "bad.jsonl: line 1: max_tokens=-1 must be",
        "prompt lengths 'x': give a number",
        "step_shapes='9' must be TOKENSxROWS",
        "prompt 1: a prompt of 5 tokens leaves no room",
        "--chat is for prompts",
        "--chat_template is for conversations; give --chat too",
        "prompt 1: the conversation",
    )
    for text, wanted in zip(said, refusals, strict=False):
        assert wanted in text
    # Four prompts of 5 tokens and three tokens for each; nothing is compiled.
    tables = [" ".join(line.split()) for line in said[len(refusals) :]]
    assert tables[1:7] == [
        "1 x 1 0 0 - -",
        "2 x 2 0 0 - -",
        "4 x 4 2 8 0.0% -",
        "16 x 4 0 0 - -",
        "32 x 4 1 20 37.5% -",
        "5 shapes 3 28 30.0% -",
    ]
    # A conversation of 4 tokens: what marks the beginning of others is the template's to write.
    assert tables[8:] == [
        "1 x 1 3 3 0.0% -",
        "16 x 4 1 4 75.0% -",
        "2 shapes 4 7 63.2% -",
    ]
    assert "compiled nothing (--dry_run)" in done.stderr
