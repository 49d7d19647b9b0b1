# SPDX-License-Identifier: Apache-2.0
"""Processes of jax.distributed, where jax knows the devices of all: each serves on its own."""

import socket
import subprocess
import sys

import pytest

from tests.jpaged.jobs.rows import written
from tests.jpaged.jobs.test_shards import ROWS, Job
from tests.jpaged.tiny import tiny_engine
from tests.scripts.programs import ROOT, environment

SETTINGS = {"deterministic": True, "num_pages": 9, "page_size": 4, "max_num_batched_tokens": 32}
CODE = f"""
import pathlib, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from tests.jpaged.jobs.test_distributed import Job, tiny_engine
assert len(jax.devices()) == 2 and len(jax.local_devices()) == 1
engine = tiny_engine(**{SETTINGS})
job = Job(pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4]))
job.run(engine, jax.process_index(), jax.process_count())
print(engine.stats().totals.num_generated_tokens)
"""


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_each_process_does_its_shard(tmp_path):
    source = written(tmp_path / "in.jsonl", ROWS)
    whole, job = Job(source, tmp_path / "whole.jsonl"), Job(source, tmp_path / "out.jsonl")
    whole.run(tiny_engine(**SETTINGS))
    address = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, address, str(own), str(source), str(job.output)],
            cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for own in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            stdout, stderr = process.communicate(timeout=300)
            assert process.returncode == 0, stderr
            assert int(stdout) > 0
    finally:
        for process in processes:
            process.kill()
    assert job.merge(2) == 1  # the bad row
    assert job.output.read_bytes() == whole.output.read_bytes()
