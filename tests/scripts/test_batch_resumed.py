# SPDX-License-Identifier: Apache-2.0
"""scripts/batch.py run again on another day, and beside the model's files; shards of a launcher."""

import datetime
import json
import shutil

import pytest

from jpaged.models import DEMO
from tests.chatting import chatty_model
from tests.scripts.programs import ended

SMALL = ("--max_num_seqs=4", "--page_size=4", "--num_pages=80", "--max_tokens=6")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def batch(source, output, *flags, code=0, **changes):
    command = ("jpaged", "batch", f"--input={source}", f"--output={output}", *SMALL, *flags)
    done = ended(*command, **changes)
    assert done.returncode == code, done.stderr
    return output.read_bytes() if code == 0 else done.stderr


def manifest_of(output):
    return output.with_name(f"{output.name}.manifest.json")


@pytest.mark.slow
def test_a_job_that_goes_on_tomorrow_is_of_the_day_that_it_began(tmp_path):
    template = "{{ strftime_now('%A, %d %B %Y') }}: {{ messages[0].content }}"
    model = chatty_model(tmp_path / "model", template)
    rows = [{"custom_id": f"r{i}", "messages": [{"role": "user", "content": f"The {i}"}]}
            for i in range(6)]  # fmt: skip
    source, path = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    flag = f"--model={model}"
    today = datetime.date.today()
    batch(source, path, flag)
    assert json.loads(manifest_of(path).read_text())["date"] in {
        day.isoformat() for day in (today, datetime.date.today())
    }
    path, other = tmp_path / "then.jsonl", tmp_path / "other.jsonl"
    want = batch(source, path, flag, "--date=2001-02-03")
    assert batch(source, other, flag, "--date=2001-12-25") != want
    lines = want.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))
    # The same day is told, though no flag says it.
    assert batch(source, path, flag) == want
    assert batch(source, path, flag, "--date=20010203") == want
    said = batch(source, path, flag, "--date=2001-02-04", code=2)
    assert "date was '2001-02-03', and is '2001-02-04'" in said and "--mix goes on" in said
    said = batch(source, path, flag, "--date=tomorrow", code=2)
    assert "--date='tomorrow' must be a day, such as 2026-11-28" in said


@pytest.mark.slow
def test_an_output_beside_the_models_files_is_no_part_of_the_model(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "The dog"}, {"prompt": "Once"}])
    path = model / "out.jsonl"
    want = batch(source, path, f"--model={model}")
    path.write_bytes(want.splitlines(keepends=True)[0])
    assert batch(source, path, f"--model={model}") == want
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert "model.sha256 was" in batch(source, path, f"--model={model}", code=2)


def launched(number, own):
    """The variables of Slurm, from which jax knows it."""
    return {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "nowhere", "SLURM_NTASKS": str(number),
        "SLURM_PROCID": str(own), "SLURM_LOCALID": "0",
    }  # fmt: skip


@pytest.mark.slow
def test_processes_of_a_launcher_take_a_shard_each(tmp_path):
    rows = [{"custom_id": f"r{i}", "prompt": "The dog", "n": 1 + i % 2} for i in range(8)]
    source, whole = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "whole.jsonl"
    want, path = batch(source, whole), tmp_path / "out.jsonl"
    for own in range(2):
        command = ("jpaged", "batch", f"--input={source}", f"--output={path}", *SMALL)
        done = ended(*command, "--distributed", **launched(2, own))
        assert done.returncode == 0, done.stderr
        assert path.with_name(f"out.jsonl.{own}-of-2").stat().st_size > 0
    assert batch(source, path, "--num_shards=2", "--merge") == want


def test_distributed_needs_a_launcher_and_stands_alone(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "Once"}])
    said = batch(source, tmp_path / "out.jsonl", "--distributed", code=2)
    assert "no launcher that jax knows has started this process" in said
    for flags in (["--num_shards=2", "--shard=0"], ["--num_shards=2", "--merge"], ["--shard=0"]):
        said = batch(source, tmp_path / "out.jsonl", "--distributed", *flags, code=2)
        assert "--distributed says what --num_shards and --shard would" in said
    assert not (tmp_path / "out.jsonl").exists()
