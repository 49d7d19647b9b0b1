# SPDX-License-Identifier: Apache-2.0
"""Rows for systems around jpaged, and what `jpaged batch` makes of them."""

import json
import re

from tests.scripts.programs import ended

PROMPTS = ("Once upon a time", "The dog", "Lily and Tom were in the garden, and")
# So small that rows wait for each other, and are preempted.
CONFIG = {"max_num_seqs": 4, "page_size": 4, "num_pages": 25}
PARAMS = {"max_tokens": 12, "temperature": 0.9}
SEED = 7
WRONG = [
    {"custom_id": "zero", "prompt": "a", "max_tokens": 0},
    {"custom_id": "unknown", "prompt": "a", "max_token": 3},
    {"custom_id": "neither"},
    {"custom_id": "no template", "messages": [{"role": "user", "content": "Hello"}]},
    {"custom_id": "url", "url": "/v1/embeddings", "body": {}},
    {"custom_id": "long", "prompt": "a" * 4000},
]


def rows(number):
    """Good rows of every form, which differ in what they ask for."""
    found = []
    for i in range(number):
        fields = {"prompt": PROMPTS[i % 3]}
        fields |= [{}, {"n": 2}, {"logprobs": 2}, {"seed": i}, {"stop": [" was"]}][i % 5]
        if i % 4 == 3:
            request = {"model": "mine", "max_tokens": 5 + i % 7, **fields}
            fields = {"method": "POST", "url": "/v1/completions", "body": request}
        found.append({"custom_id": f"r{i}", **fields})
    return found


def batch_records(directory, given, code=0):
    """The lines that `jpaged batch` writes for rows, by custom_id."""
    source, path = directory / "requests.jsonl", directory / "batch.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in given))
    flags = [f"--{name}={value}" for name, value in {**CONFIG, **PARAMS, "seed": SEED}.items()]
    done = ended("jpaged", "batch", f"--input={source}", f"--output={path}", *flags)
    assert done.returncode == code, done.stderr
    lines = path.read_text().splitlines()
    assert len(lines) == len(given)
    return {json.loads(line)["custom_id"]: line for line in lines}


def without_line(record):
    """A record whose error names no line, as where there are none."""
    return re.sub(r'"message":"line \d+: ', '"message":"', record)
