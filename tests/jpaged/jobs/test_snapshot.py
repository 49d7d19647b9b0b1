# SPDX-License-Identifier: Apache-2.0
"""Rows that ran when a job was stopped go on from a snapshot; what cannot be read is ignored."""

import dataclasses
import json
import logging
import math
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged import Completion
from jpaged.jobs import Snapshot, run
from jpaged.jobs.inputs import open_input
from jpaged.jobs.openai import RowReader
from jpaged.jobs.output import OutputFile
from jpaged.jobs.snapshot import remove_snapshot, snapshot_path
from tests.jpaged.jobs.rows import encode, written

JOB = {"manifest": 1, "input": "abc"}
ROWS = [
    {"prompt": [i + 1, 2, 3], "max_tokens": 8 + i, "n": 1 + i % 2, "custom_id": f"r{i}"}
    | ({"logprobs": 2} if i % 3 else {})
    | ({"best_of": 3} if i == 5 else {})
    | ({"beam_width": 2, "n": 1} if i == 6 else {})
    for i in range(9)
]


class KilledError(Exception):
    """Stands for a signal 9: nothing is written any more."""


@pytest.fixture
def source(tmp_path):
    return written(tmp_path / "in.jsonl", ROWS)


def go_on(source, path, engine, *, every_s=0.0, job=JOB, sync_rows=1, **options):
    """Runs what is left of a job with snapshots. Returns: the report, and tokens generated."""
    lines = open_input([str(source)])
    before = engine.stats().totals.num_generated_tokens
    with OutputFile(path, lines.check(), encode, sync_rows=sync_rows) as output:
        rows = (RowReader().row(line) for line in lines if output.lacks(line.row_id))
        with Snapshot(snapshot_path(path), job, output.lacks, every_s=every_s) as snapshot:
            report = run(rows, output, engine, snapshot=snapshot, **options)
        output.sync()
        if output.is_done:
            output.sort()
    return report, engine.stats().totals.num_generated_tokens - before


@pytest.fixture(scope="module")
def whole(tmp_path_factory, engine):
    """What comes of the job in one, and the tokens that takes."""
    directory = tmp_path_factory.mktemp("whole")
    source = directory / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    _, number = go_on(source, directory / "out.jsonl", engine, every_s=1e9)
    assert not snapshot_path(directory / "out.jsonl").exists()
    return (directory / "out.jsonl").read_bytes(), number


def known(path):
    """Tokens that a snapshot has of rows without a record, and these rows."""
    there = {json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()}
    with Snapshot(snapshot_path(path), JOB, lambda row_id: True) as snapshot:
        samples = {row["custom_id"]: snapshot.progress(row["custom_id"]) for row in ROWS}
    left = {row_id: own for row_id, own in samples.items() if own and row_id not in there}
    return sum(len(sample.token_ids) for own in left.values() for sample in own), set(left)


def killed(source, path, engine, num_steps, **options):
    """Leaves what a signal 9 would, after some steps."""
    count = 0
    kept = path.with_name("kept")

    def copied():
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        try:
            for each in path.parent.glob(f"{path.name}*"):
                shutil.copy(each, kept)
        except FileNotFoundError:  # a snapshot that was under way is whole now, and has its name
            return False
        return True

    def step():
        nonlocal count
        count += 1
        if count == num_steps:
            # A snapshot may be under way: it has the name of none until it is whole.
            while not copied():
                pass
            raise KilledError

    with pytest.raises(KilledError):
        go_on(source, path, engine, on_step=step, **options)
    for each in path.parent.glob(f"{path.name}*"):
        each.unlink()
    for each in kept.iterdir():
        each.rename(path.with_name(each.name))


def test_killed_it_goes_on_from_the_tokens_there_are(source, tmp_path, engine, whole):
    want, number = whole
    path = tmp_path / "out.jsonl"
    for num_steps in (3, 5, 7):  # after each other
        killed(source, path, engine, num_steps)
    there = len(path.read_bytes().splitlines())
    tokens, rows = known(path)
    assert tokens > 20 and len(rows) > 2 and "r6" not in rows  # it is searched, and begins anew
    report, generated = go_on(source, path, engine)
    assert report.num_done + there == len(ROWS)
    assert path.read_bytes() == want
    assert generated <= number - tokens
    remove_snapshot(path)
    assert sorted(tmp_path.iterdir()) == sorted([source, path, tmp_path / "kept"])


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("ordered", [False, True])
def test_killed_at_every_step(source, tmp_path, engine, whole, ordered):
    want, _ = whole
    for num_steps in range(1, 32):
        path = tmp_path / f"{num_steps}.jsonl"
        killed(source, path, engine, num_steps, ordered=ordered)
        go_on(source, path, engine, ordered=ordered)
        assert path.read_bytes() == want, num_steps


def test_a_stop_loses_no_token(source, tmp_path, engine, whole):
    want, number = whole
    path = tmp_path / "out.jsonl"
    calls = iter(range(100))
    # Too seldom to have one before.
    report, first = go_on(source, path, engine, every_s=1e9, stop=lambda: next(calls) > 11)
    assert report.stopped and report.num_left
    tokens, _ = known(path)
    _, second = go_on(source, path, engine, every_s=1e9)
    assert path.read_bytes() == want
    # All but of the search, of which 2 beams of 14 tokens are done again at most, count once.
    assert tokens > 0 and first + second <= number + 2 * 14


def test_what_ended_is_kept_until_it_is_on_disk(source, tmp_path, engine):
    path = tmp_path / "out.jsonl"
    killed(source, path, engine, 16, sync_rows=100)
    assert not path.read_bytes()
    _, rows = known(path)
    assert {"r0", "r1"} <= rows  # the shortest, which have ended


def ignored(caplog):
    return [r.getMessage() for r in caplog.records if "is ignored" in r.getMessage()]


def test_what_is_damaged_or_of_another_job_is_ignored(source, tmp_path, engine, whole, caplog):
    want, _ = whole
    path = tmp_path / "out.jsonl"
    killed(source, path, engine, 12)
    snapshot = snapshot_path(path)
    data = snapshot.read_bytes()
    for damaged in [data[:n] for n in (0, 7, 31, 32, 40, 200, len(data) - 1)] + [
        data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] for place in (3, 33, 90, -9)
    ]:
        snapshot.write_bytes(damaged)
        caplog.clear()
        with Snapshot(snapshot, JOB, bool) as found:
            assert found.num_rows == found.num_tokens == 0 and not found.progress("r3")
        (line,) = ignored(caplog)
        assert "damaged" in line
    snapshot.write_bytes(data)
    caplog.clear()
    with Snapshot(snapshot, JOB | {"input": "abd"}, bool) as found:
        assert found.num_rows == 0
    (line,) = ignored(caplog)
    assert f"{snapshot} is ignored, so rows that ran begin anew: it is of another job" in line
    caplog.clear()
    there = len(path.read_bytes().splitlines())
    report, _ = go_on(source, path, engine, job=JOB | {"input": "abd"})
    assert len(ignored(caplog)) == 1
    assert report.num_done + there == len(ROWS) and path.read_bytes() == want


def test_rows_that_cannot_have_come_to_that_begin_anew(source, tmp_path, engine, whole, caplog):
    path = tmp_path / "out.jsonl"
    ids = open_input([str(source)]).check()
    wrong = Completion("", [96] * 40, 0.0, None, None)
    with Snapshot(snapshot_path(path), JOB, lambda row_id: ids.index(row_id) is not None) as it:
        it.take([("r0", [wrong]), ("elsewhere", [wrong])])
    go_on(source, path, engine)
    assert path.read_bytes() == whole[0]
    (line,) = [r.getMessage() for r in caplog.records if "begins anew" in r.getMessage()]
    assert line.startswith("row 'r0' begins anew, not from its snapshot: request")


def test_a_full_disk_costs_a_warning(source, tmp_path, engine, whole, caplog):
    path = tmp_path / "out.jsonl"
    target = snapshot_path(path).with_name("out.jsonl.snapshot.writing")
    fills = 0

    def step():
        nonlocal fills
        if fills < 5 and not target.is_symlink():
            target.unlink(missing_ok=True)
            target.symlink_to("/dev/full")
            fills += 1

    caplog.set_level(logging.WARNING)
    go_on(source, path, engine, on_step=step)
    assert fills == 5
    lines = [r.getMessage() for r in caplog.records if "cannot be written" in r.getMessage()]
    assert len(lines) == 1 and "No space left on device: the job goes on" in lines[0]
    assert path.read_bytes() == whole[0]
    assert snapshot_path(path).exists()  # those after it came through


texts = st.text(max_size=5)
floats = st.floats(width=32)
completions = st.builds(
    Completion,
    text=texts,
    token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=4),
    cumulative_logprob=st.floats(),
    logprobs=st.none(),
    finish_reason=st.sampled_from([None, "stop", "length", "error"]),
    error=st.none() | texts,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(texts, st.lists(completions, min_size=1, max_size=3), max_size=4), st.data())
def test_it_reads_what_it_wrote(tmp_path_factory, rows, data):
    path = tmp_path_factory.mktemp("snapshot") / "a"
    for own in rows.values():
        for index, completion in enumerate(own):
            if data.draw(st.booleans()):
                values = st.dictionaries(st.integers(0, 2**31 - 1), floats, max_size=3)
                count = len(completion.token_ids)
                logprobs = data.draw(st.lists(values, min_size=count, max_size=count))
                own[index] = dataclasses.replace(completion, logprobs=logprobs)
    with Snapshot(path, JOB, lambda row_id: True) as snapshot:
        # As it was a while before, and as it is.
        snapshot.take((i, [cut(c, data) for c in own]) for i, own in rows.items())
        snapshot.take(rows.items())
    with Snapshot(path, JOB, lambda row_id: True) as snapshot:
        for row_id, own in rows.items():
            found = snapshot.progress(row_id)
            if any(completion.token_ids for completion in own):
                assert list(map(comparable, found)) == list(map(comparable, own))
            else:
                assert found == []
        assert snapshot.num_tokens == sum(len(c.token_ids) for own in rows.values() for c in own)


def cut(completion, data):
    count = data.draw(st.integers(0, len(completion.token_ids)))
    return dataclasses.replace(
        completion,
        token_ids=completion.token_ids[:count],
        logprobs=completion.logprobs and completion.logprobs[:count],
        finish_reason=None,
    )


def comparable(completion):
    """With NaN equal to itself; the text of what goes on is made of its tokens."""
    number = completion.cumulative_logprob
    text = "" if completion.finish_reason is None else completion.text
    logprobs = [list(map(str, values.items())) for values in completion.logprobs or ()]
    return (
        "nan" if math.isnan(number) else number, text, completion.token_ids, logprobs,
        completion.finish_reason, completion.error,
    )  # fmt: skip


def test_rows_with_a_result_leave_it(tmp_path):
    done = set()
    with Snapshot(tmp_path / "s", JOB, lambda row_id: row_id not in done, every_s=0) as snapshot:
        sample = Completion("", [5, 6], -1.0, None, None)
        snapshot.take([("a", [sample]), ("b", [sample])])
        done.add("a")
        snapshot.take([])
    with Snapshot(tmp_path / "s", JOB, lambda row_id: True) as again:
        assert again.progress("a") == [] and again.progress("b") == [sample]
        assert (again.num_rows, again.num_tokens) == (1, 2)
