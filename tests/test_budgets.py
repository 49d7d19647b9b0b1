# SPDX-License-Identifier: Apache-2.0
"""Budgets of size, so that the code stays small enough to read.

A folder is what a newcomer reads to change one thing, so each has a budget: what it has, and room
for a tenth more. The memory management is what this project explains: pool, table, sequence,
scheduler and engine together are to be read in an evening, hence 1,710 lines. A file of more than
400 lines has a second subject that wants a file of its own. Comments and blank lines count, and the
tables of the demo's corpus do not. A change that breaks a budget simplifies something, or argues in
CHANGELOG.md for the number that it puts here.
"""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_FOLDER_LINES = {
    # Tokenizers and chat templates of GGUF files; what is read of a model without its weights;
    # scales of pages; what compiles an engine's first steps before it is there; scores; prompts on
    # disk; a fork's mode of log-probabilities.
    "jpaged": 4250,
    # Groups of layers: groups, bundles, cells, prefixes that a window can start from; and
    # tokens that are scored, not drawn, and sequences that resume from tokens. Pages on disk: their
    # files, and which are worth it. Priorities, victims, and room to the end. What requests ask of
    # steps beside tokens, as a plan that they are held to.
    "jpaged/host": 7350,
    "jpaged/host/growth": 500,
    # Steps compiled ahead of time, their options, memory that is not this machine's, and bursts.
    # Threads that compile while weights are read. What pages depend on, as a digest.
    # Log-probabilities of what tokens are drawn from.
    "jpaged/device": 2600,
    # Rows, inputs, records, output and manifest of batch jobs, their shards and snapshots, and what
    # those share that answer as they do. Which kernels a default stands for.
    "jpaged/jobs": 1950,
    # Systems that run it, a file each, the engine that callers share, and a model of
    # lm-evaluation-harness.
    "jpaged/integrations": 1200,
    "jpaged/planning": 700,
    # Records of runs and their page, lines of JSON, metrics.
    "jpaged/telemetry": 850,
    # Latency tails.
    "jpaged/simulation": 1550,
    # Profiles: a window of steps, the trace read back, kinds of kernels, the floor, the page; and
    # perplexity through pages.
    "jpaged/measure": 1200,
    # Reading a part at a time, and the way back: to safetensors, to Orbax, onto any mesh. Of GGUF
    # files headers, and metadata as a config.json.
    # Read by threads, and straight to where layers are stacked; scales of a float8 cache too. What
    # keeps a TPU from copying queries' weights, and devices from sending each other an embedding.
    "models": 5150,
    "models/families": 1650,
    # With what is read off the text of programs. Kernels for CPUs, in LLVM's language.
    "pallas_kernels": 8300,
    # With `convert`, `plan`, `warmup`, `calibrate`, `batch`, `view` and `score`, the twelfth
    # program; a job before it runs.
    "scripts": 4200,
    # With the figures of a GPU in one run, transformers' beside them, and those of a kernel that is
    # not in use yet.
    "scripts/kernels": 1700,
    # With loading beside safetensors' own, what a job costs beside its engine, and what snapshots
    # and prompts on disk do.
    "scripts/measure": 1750,
    # A program a peer, and how they are driven.
    "scripts/measure/peers": 1000,
    "scripts/demo": 400,
    # With what lm-evaluation-harness's own model makes of tasks.
    "scripts/fixtures": 1800,
}
CORE = [
    *(f"host/{name}.py" for name in ("page_pool", "page_table", "sequence", "scheduler")),
    "engine.py",
]
MAX_CORE_LINES = 1710
MAX_FILE_LINES = 400
TABLES = {f"scripts/demo/{name}.py" for name in ("corpus", "facts", "genres", "tales", "words")}

LINES = {
    name: len(path.read_text(encoding="utf-8").splitlines())
    for floor in ("scripts", "jpaged", "models", "pallas_kernels")
    for path in sorted((ROOT / floor).rglob("*.py"))
    if (name := path.relative_to(ROOT).as_posix()) not in TABLES
}


def folder_of(name):
    """The closest folder with a budget."""
    parents = map(str, pathlib.PurePosixPath(name).parents)
    return next(parent for parent in parents if parent in MAX_FOLDER_LINES)


def test_the_core_can_be_read_in_one_sitting():
    lines = {name: LINES[f"jpaged/{name}"] for name in CORE}
    assert sum(lines.values()) <= MAX_CORE_LINES, lines


@pytest.mark.parametrize("folder", MAX_FOLDER_LINES)
def test_a_folder_stays_small(folder):
    lines = {name: count for name, count in LINES.items() if folder_of(name) == folder}
    assert 0 < sum(lines.values()) <= MAX_FOLDER_LINES[folder], lines


@pytest.mark.parametrize("name", LINES)
def test_a_file_has_one_subject(name):
    assert LINES[name] <= MAX_FILE_LINES
