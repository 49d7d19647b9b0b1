# SPDX-License-Identifier: Apache-2.0
"""Shards: whatever their number, merged they have the bytes of a job in one."""

import dataclasses
import hashlib
import json

import pytest

from jpaged import EngineConfig, SamplingParams
from jpaged.jobs import run
from jpaged.jobs.inputs import RowIds, digest_of, open_input
from jpaged.jobs.manifest import (
    ManifestError,
    asked_for,
    check_same,
    manifest_path,
    model_identity,
    read_manifest,
    run_with,
    write_manifest,
)
from jpaged.jobs.openai import RowReader
from jpaged.jobs.output import OutputFile
from jpaged.jobs.shards import (
    ShardsMissingError,
    merge,
    open_output,
    shard_entry,
    shard_path,
)
from jpaged.pallas_kernels import dispatch
from tests.jpaged.jobs.rows import encode

ROWS = [
    {"prompt": [i + 1, 2], "max_tokens": 2 + i % 3, "n": 1 + i % 2, "custom_id": f"r{i}"}
    for i in range(9)
]
ROWS[4] = {"custom_id": "bad", "prompt": [1], "max_tokens": 0}
CONFIG = EngineConfig(num_pages=9)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


class Job:
    """What `jpaged batch` does, with an engine that is there already."""

    def __init__(self, source, output, seed=0, **params):
        self.params = SamplingParams(**params)
        self.input, self.output = open_input([str(source)]), output
        self.ids = self.input.check()
        self.asked = asked_for(
            input_sha256=self.input.sha256,
            num_rows=len(self.ids),
            model=source,
            params=self.params,
            options={},
            seed=seed,
        )

    def run(self, engine, shard=None, num_shards=1, rows=None, config=CONFIG):
        path, ids, manifest = self.output, self.ids, self.asked | run_with(config)
        if shard is not None:
            path, ids = shard_path(path, shard, num_shards), ids.shard(shard, num_shards)
            manifest |= shard_entry(shard, num_shards)
        before = read_manifest(path)
        with open_output(path, ids, encode) as output:
            if before is None:
                write_manifest(path, manifest)
            lines = [line for line in self.input if output.lacks(line.row_id)]
            run(map(RowReader(params=self.params).row, lines[:rows]), output, engine)
            output.sync()
            if output.is_done:
                output.sort()

    def merge(self, num_shards, **options):
        return merge(self.output, self.ids, num_shards, self.asked, **options)


def test_a_row_is_of_the_shard_that_its_id_says():
    names = [f"row {i}" for i in range(100)]
    ids = RowIds(b"".join(map(digest_of, names)))
    digests = [hashlib.blake2b(name.encode(), digest_size=16).digest() for name in names]
    want = [int.from_bytes(digest[8:], "little") % 3 for digest in digests]
    assert ids.shards(3).tolist() == want and set(want) == {0, 1, 2}
    for shard in range(3):
        own = ids.shard(shard, 3)
        mine = [name for name, its in zip(names, want, strict=True) if its == shard]
        assert [own.index(name) for name in mine] == list(range(len(own)))
        assert all(own.index(name) is None for name in set(names) - set(mine))


def test_merged_they_are_the_job_in_one(source, tmp_path, engine):
    whole = Job(source, tmp_path / "whole.jsonl")
    whole.run(engine)
    # Of 20 shards some have no row: nobody need run them.
    for number in (1, 2, 3, 20):
        job = Job(source, tmp_path / f"of{number}.jsonl")
        for shard in range(number):
            if len(job.ids.shard(shard, number)):
                job.run(engine, shard, number, rows=1)
                job.run(engine, shard, number)
        assert job.merge(number) == 1  # the bad row
        assert job.output.read_bytes() == whole.output.read_bytes()
        assert read_manifest(job.output) == read_manifest(whole.output)
        assert job.merge(number) == 1  # once more
        assert job.output.read_bytes() == whole.output.read_bytes()


def test_a_job_goes_on_with_another_priority(source, tmp_path, engine):
    """On which no byte depends; other parameters are another job."""
    whole, path = Job(source, tmp_path / "whole.jsonl"), tmp_path / "out.jsonl"
    whole.run(engine)
    Job(source, path, priority=5).run(engine, rows=4)
    again, other = (Job(source, path, priority=-3, temperature=t) for t in (None, 0.5))
    before = read_manifest(path)
    check_same(path, before, again.asked | run_with(CONFIG), mix=False)
    with pytest.raises(ManifestError, match=r"parameters\.temperature was None, and is 0\.5: name"):
        check_same(path, before, other.asked | run_with(CONFIG), mix=True)
    again.run(engine)
    assert path.read_bytes() == whole.output.read_bytes()
    assert read_manifest(path) == read_manifest(whole.output)


def test_it_refuses_shards_that_are_not_done(source, tmp_path, engine):
    job = Job(source, tmp_path / "out.jsonl")
    job.run(engine, 0, 2, rows=1)
    with pytest.raises(ShardsMissingError, match=r"shard 0 has 1 of its \d rows; shard 1 has not"):
        job.merge(2)
    assert not job.output.exists() and not manifest_path(job.output).exists()
    path = shard_path(job.output, 0, 2)
    with OutputFile(path, job.ids.shard(0, 2), encode):
        with pytest.raises(ValueError, match="is being written by another process"):
            job.merge(2)


def test_it_refuses_shards_of_other_jobs(source, tmp_path, engine):
    job = Job(source, tmp_path / "out.jsonl")
    job.run(engine, 0, 2)
    Job(source, job.output, seed=1).run(engine, 1, 2)
    with pytest.raises(ManifestError, match=r"parameters\.seed was 1, and is 0"):
        job.merge(2, mix=True)
    for path in (shard_path(job.output, 1, 2), manifest_path(shard_path(job.output, 1, 2))):
        path.unlink()
    job.run(engine, 1, 2, config=EngineConfig(num_pages=10))
    with pytest.raises(ManifestError, match=r"engine\.num_pages was 10, and is 9.*--mix goes on"):
        job.merge(2)
    job.output.write_text("mine\n")
    with pytest.raises(ValueError, match="has no manifest beside it"):
        job.merge(2, mix=True)
    job.output.unlink()
    assert job.merge(2, mix=True) == 1


def test_what_may_be_mixed_and_what_not(source, tmp_path):
    job = Job(source, tmp_path / "out.jsonl")
    now = job.asked | run_with(CONFIG)
    before = now | {"device": {"platform": "tpu", "kind": "v5"}}
    with pytest.raises(ManifestError, match=r"device\.platform was 'tpu', and is 'cpu'.*--mix"):
        check_same(job.output, before, now, mix=False)
    check_same(job.output, before, now, mix=True)
    before = now | {"input": {"sha256": "0", "rows": 9}}
    with pytest.raises(ManifestError, match=r"input\.sha256 was '0'") as caught:
        check_same(job.output, before, now, mix=True)
    assert "--mix" not in str(caught.value)


def test_what_a_job_writes_is_no_part_of_its_model(tmp_path):
    for name in ("config.json", "model.safetensors", "out.safetensors"):
        (tmp_path / name).write_text(name)
    output = tmp_path / "out"
    want = model_identity(tmp_path, output)
    for name in (
        *("out", "out.manifest.json", "out.manifest.json.writing", "out.snapshot", "out.sorting"),
        *("out.snapshot.writing", "out.1-of-3", "out.1-of-3.manifest.json", "out.merging"),
    ):
        (tmp_path / name).write_text(name)
        assert model_identity(tmp_path, output) == want, name
    assert model_identity(tmp_path) != want
    # Names that begin alike are not enough, nor are equal ones elsewhere.
    (tmp_path / "inner").mkdir()
    found = [want]
    for name in ("out.safetensors", "config.json", "inner/out"):
        (tmp_path / name).write_text("other")
        found.append(model_identity(tmp_path, output))
    assert len(set(found)) == 4


@pytest.mark.parametrize(("was", "now"), [("cpu", "xla"), ("xla", "cpu")])
def test_a_default_backend_is_what_it_stands_for(source, tmp_path, monkeypatch, was, now):
    """On a machine without llvmlite the same settings have other kernels, and other last bits."""
    job, found = Job(source, tmp_path / "out.jsonl"), []
    for backend in (was, now):
        monkeypatch.setattr(dispatch, "_backend_of_cpus", lambda backend=backend: backend)
        found.append(job.asked | run_with(CONFIG))
    with pytest.raises(ManifestError, match=f"engine.backend was '{was}', and is '{now}'.*--mix"):
        check_same(job.output, *found, mix=False)
    check_same(job.output, *found, mix=True)
    wide, narrow = (
        found[0] | {"device": found[0]["device"] | {"vector_lanes": lanes}} for lanes in (16, 8)
    )
    with pytest.raises(ManifestError, match=r"device\.vector_lanes was 16, and is 8"):
        check_same(job.output, wide, narrow, mix=False)
    monkeypatch.setattr(dispatch, "_backend_of_cpus", lambda: was)
    named = dataclasses.replace(CONFIG, backend="xla")
    assert run_with(named)["engine"]["backend"] == "xla"
