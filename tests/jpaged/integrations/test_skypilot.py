# SPDX-License-Identifier: Apache-2.0
"""The recipe for SkyPilot: what it runs gives the bytes of one run, also from machines that go."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import ClassVar

import pytest
import yaml

from tests.jpaged.integrations.rows import CONFIG, PARAMS, SEED, WRONG, batch_records, rows
from tests.scripts.programs import ROOT, ended, environment

RECIPE = ROOT / "jpaged" / "integrations" / "skypilot.yaml"
FLAGS = [f"--{name}={value}" for name, value in {**CONFIG, **PARAMS, "seed": SEED}.items()]


class Machine:
    """Runs the recipe as one of two machines, with directories for its disk and the bucket.

    Attributes:
      processes: what machines have started, for `bucket` to end.
    """

    processes: ClassVar[list[subprocess.Popen]] = []

    def __init__(self, tmp_path, bucket, rank):
        self.disk = tmp_path / f"disk{rank}"
        self.disk.mkdir()
        program = self.disk / "bin" / "jpaged"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m jpaged "$@"\n')
        program.chmod(0o755)
        recipe = yaml.safe_load(RECIPE.read_text())
        assert recipe["run"].count("bucket=/bucket\n") == 1
        self.script = recipe["run"].replace("bucket=/bucket\n", f"bucket={bucket}\n")
        given = {name: str(value) for name, value in recipe["envs"].items()}
        given |= {"FLAGS": " ".join([*FLAGS, "--sync_rows=1"]), "SAVE_S": "1"}
        sky = {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NUM_NODES": "2"}
        path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
        self.variables = environment(PATH=path, PYTHONPATH=str(ROOT)) | given | sky

    def start(self):
        process = subprocess.Popen(
            ["bash", "-c", self.script],
            cwd=self.disk, env=self.variables, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def run(self):
        """Runs it to its end. Returns: what it said."""
        process = self.start()
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        return said


@pytest.fixture
def bucket(tmp_path):
    """With the input of a job."""
    path = tmp_path / "bucket"
    path.mkdir()
    yield path
    for process in Machine.processes:  # of a test that failed
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    Machine.processes.clear()


def put_rows(bucket, given):
    (bucket / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))


def long_rows(number):
    """So long that a machine can be taken away meanwhile."""
    fields = {"prompt": "Once upon a time", "max_tokens": 60, "ignore_eos": True}
    return [{"custom_id": f"r{i}", **fields} for i in range(number)]


def wait_for_records(process, path, number):
    deadline = time.monotonic() + 200
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_two_machines_make_the_bytes_of_one(tmp_path, bucket):
    given = rows(10) + WRONG
    want = batch_records(tmp_path, given, code=1)
    put_rows(bucket, given)
    for rank in range(2):
        Machine(tmp_path, bucket, rank).run()
    names = {path.name for path in bucket.iterdir()}
    for rank in range(2):
        assert {f"results.jsonl.{rank}-of-2", f"results.jsonl.{rank}-of-2.manifest.json"} < names
    files = f"--input={bucket}/requests.jsonl", f"--output={bucket}/results.jsonl"
    done = ended("jpaged", "batch", *files, *FLAGS, "--num_shards=2", "--merge")
    assert done.returncode == 1, done.stderr  # as of one run: some rows have an error
    lines = (bucket / "results.jsonl").read_text().splitlines()
    assert lines == [want[row["custom_id"]] for row in given]


@pytest.mark.slow
def test_a_machine_that_is_taken_away_costs_little(tmp_path, bucket):
    put_rows(bucket, long_rows(40))
    machine, output = Machine(tmp_path, bucket, 0), bucket / "results.jsonl.0-of-2"
    process = machine.start()
    wait_for_records(process, output, 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = output.read_bytes()
    whole = kept[: kept.rindex(b"\n") + 1]
    shutil.rmtree(machine.disk)
    said = Machine(tmp_path, bucket, 0).run()
    number = whole.count(b"\n")
    assert f"{number} of " in said and "rows are done already" in said
    lines = output.read_bytes().splitlines()
    assert {*whole.splitlines()} < {*lines} and len(lines) > number


@pytest.mark.slow
def test_a_program_that_crashes_is_no_success(tmp_path, bucket):
    """Python ends with 1 then, as `jpaged batch` does where some rows have an error."""
    (bucket / "requests.jsonl").write_text('{"custom_id": "a", "prompt": "b"}\n')
    machine = Machine(tmp_path, bucket, 0)
    program = machine.disk / "bin" / "jpaged"
    program.write_text("#!/bin/sh\necho 'jpaged batch: 1 of 3 rows are done' >&2\nexit 1\n")
    process = machine.start()
    process.communicate(timeout=60)
    assert process.returncode == 1


def test_told_to_stop_it_ends_with_the_code_that_launches_it_again(tmp_path, bucket):
    put_rows(bucket, long_rows(150))
    machine, output = Machine(tmp_path, bucket, 1), bucket / "results.jsonl.1-of-2"
    machine.variables["FLAGS"] += " --grace_s=0"
    process = machine.start()
    wait_for_records(process, output, 1)
    process.terminate()
    _, said = process.communicate(timeout=120)
    recovery = yaml.safe_load(RECIPE.read_text())["resources"]["job_recovery"]
    assert process.returncode in recovery["recover_on_exit_codes"], said
    assert "run the same command again" in said
    disk = machine.disk / "jpaged_job" / output.name
    assert output.read_bytes() == disk.read_bytes() and disk.stat().st_size


def test_an_output_of_another_job_is_refused(tmp_path, bucket):
    put_rows(bucket, rows(2))
    (bucket / "results.jsonl.0-of-2").write_text("{}\n")
    process = Machine(tmp_path, bucket, 0).start()
    _, said = process.communicate(timeout=100)
    assert process.returncode == 2 and "has no manifest beside it" in said
    assert (bucket / "results.jsonl.0-of-2").read_text() == "{}\n"


TASK = """
import json, sys
import sky
overrides = {"BUCKET": "gs://their-bucket/job", "MODEL": "org/name"}
config = sky.utils.yaml_utils.read_yaml(sys.argv[1])
task = sky.Task.from_yaml_config(config, env_overrides=overrides)
sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
(mount,) = task.storage_mounts.items()
print(json.dumps({
    "nodes": task.num_nodes, "envs": task.envs, "spot": resources.use_spot,
    "recovery": resources.job_recovery, "mount": [mount[0], mount[1].source, mount[1].mode.name],
    "run": task.run, "setup": task.setup, "workdir": task.workdir,
}))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("sky") is None,
    reason="SkyPilot is not there: install the extra skypilot, or skypilot",
)
def test_skypilot_reads_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TASK, RECIPE],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
        env=os.environ | {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    task, recipe = json.loads(done.stdout.splitlines()[-1]), yaml.safe_load(RECIPE.read_text())
    assert (task["nodes"], task["spot"], task["workdir"]) == (2, True, ".")
    assert task["recovery"]["recover_on_exit_codes"] == [75]
    assert task["recovery"]["max_restarts_on_errors"] == 3
    assert task["mount"] == ["/bucket", "gs://their-bucket/job", "MOUNT"]
    assert task["envs"]["MODEL"] == "org/name" and task["envs"]["SAVE_S"] == "60"
    assert (task["run"], task["setup"]) == (recipe["run"], recipe["setup"])
