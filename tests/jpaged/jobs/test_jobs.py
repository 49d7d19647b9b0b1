# SPDX-License-Identifier: Apache-2.0
"""Jobs: what is stopped anywhere goes on to the same bytes; wrong rows are records."""

import errno
import gzip
import json
import os

import pytest

from jpaged import SamplingParams
from jpaged.jobs import Result, Row, run
from jpaged.jobs.inputs import open_input
from jpaged.jobs.openai import RecordMaker, RowReader, encode_record
from jpaged.jobs.output import OutputError, OutputFile
from tests.jpaged.tiny import tiny_engine

ROWS = [
    {"prompt": [i + 1, 2, 3], "max_tokens": 2 + i % 3, "n": 1 + i % 2, "custom_id": f"r{i}"}
    for i in range(12)
]


@pytest.fixture(scope="module")
def engine():
    """A pool so small that requests are preempted."""
    return tiny_engine(deterministic=True, num_pages=9, page_size=4, max_num_batched_tokens=32)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def encode(result):
    return encode_record(RecordMaker(None, "tiny").record(result))


def go_on(source, path, engine, **options):
    """Runs what is left of a job; sorts if all is done."""
    given = open_input([str(source)])
    ids = given.check()
    with OutputFile(path, ids, encode, sync_rows=2) as output:
        reader = RowReader()
        rows = (reader.row(line) for line in given if not output.has(line.row_id))
        report = run(rows, output, engine, **options)
        output.sync()
        if output.is_done:
            output.sort()
    return report


def test_it_goes_on_from_every_byte(source, tmp_path, engine, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    whole = tmp_path / "whole.jsonl"
    go_on(source, whole, engine)
    data = whole.read_bytes()
    assert [json.loads(line)["custom_id"] for line in data.splitlines()] == [
        row["custom_id"] for row in ROWS
    ]
    path, results = tmp_path / "out.jsonl", {}
    for line in data.splitlines(keepends=True):
        results[json.loads(line)["custom_id"]] = line
    given = open_input([str(source)])
    ids = given.check()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        with OutputFile(path, ids, lambda result: results[result.row.row_id]) as output:
            missing = [line.row_id for line in given if not output.has(line.row_id)]
            for row_id in reversed(missing):  # they end in another order
                output.write(Result(Row(row_id=row_id), None, None))
            output.sync()
            output.sort()
        assert path.read_bytes() == data, length


def test_stops_and_order_leave_no_trace(source, tmp_path, engine):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    go_on(source, whole, engine, ordered=True)
    calls = iter(range(100))
    report = go_on(source, path, engine, window=3, stop=lambda: next(calls) > 4)
    assert report.stopped and report.num_done < len(ROWS)
    go_on(source, path, engine)
    assert path.read_bytes() == whole.read_bytes()
    assert not engine.has_unfinished_requests
    engine.check_invariants()


def test_a_full_disk_leaves_whole_records(source, tmp_path, engine, monkeypatch):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    go_on(source, whole, engine)
    room, write = [700], os.write

    def limited(fd, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(fd, data[: room[0]])
        room[0] -= count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", limited)
        with pytest.raises(OutputError, match="No space left") as caught:
            go_on(source, path, engine)
    assert caught.value.is_full and path.read_bytes().endswith(b"\n")
    go_on(source, path, engine)
    assert path.read_bytes() == whole.read_bytes()


def test_two_processes_do_not_write_one_file(source, tmp_path):
    ids = open_input([str(source)]).check()
    with OutputFile(tmp_path / "out.jsonl", ids, encode):
        with pytest.raises(BlockingIOError):
            OutputFile(tmp_path / "out.jsonl", ids, encode)


def body(**fields):
    return {"url": "/v1/completions", "body": {"prompt": [1]} | fields}


WRONG = [
    (b"", "it is empty"),
    (b"{", "not valid JSON"),
    (b"\xff", "not UTF-8"),
    (b"[1]", "must be a JSON object"),
    (b'{"prompt": [1], "prompt": [2]}', "twice"),
    ({"custom_id": 5, "prompt": [1]}, "custom_id=5"),
    ({"custom_id": "", "prompt": [1]}, "custom_id=''"),
    ({"custom_id": "a"}, "prompt or messages"),
    ({"prompt": ""}, "prompt=''"),
    ({"prompt": [1.5]}, r"prompt=[1.5]"),
    ({"prompt": [999]}, "token id 999"),
    ({"prompt": [1], "max_token": 3}, "'max_token'"),
    ({"prompt": [1], "max_tokens": 0}, "max_tokens=0"),
    ({"prompt": [1], "top_p": 2}, "top_p=2"),
    ({"prompt": [1], "seed": -1}, "seed=-1"),
    (body(), "custom_id is missing"),
    (body(stream=True) | {"custom_id": "b"}, "stream=True"),
    (body(echo=True) | {"custom_id": "c"}, "echo=True"),
    (body(n=0) | {"custom_id": "d"}, "n=0"),
    (body(x=0) | {"custom_id": "e"}, "'x'"),
    (body() | {"custom_id": "f", "url": "/v1/embeddings"}, "url='/v1/embeddings'"),
    (body() | {"custom_id": "g", "method": "GET"}, "method='GET'"),
    (body() | {"custom_id": "h", "bodi": 1}, "'bodi'"),
    ({"custom_id": "i", "url": "/v1/chat/completions", "body": {}}, "messages is missing"),
    ({"messages": []}, "messages"),
]


def test_wrong_rows_are_records_and_good_ones_are_served(tmp_path, engine):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row, _ in WRONG]
    good = json.dumps({"prompt": [1, 2], "max_tokens": 2}).encode()
    source, path = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    source.write_bytes(gzip.compress(b"\n".join([*lines, good]) + b"\n\n"))
    report = go_on(source, path, engine)
    assert (report.num_done, report.num_errors) == (len(WRONG) + 1, len(WRONG))
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    for number, (record, (_, says)) in enumerate(zip(records, WRONG, strict=False), 1):
        message = record["error"]["message"]
        assert message.startswith(f"line {number}: ") and says in message
    assert records[-1]["response"]["body"]["usage"]["completion_tokens"] == 2


def test_ids_that_are_there_twice(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"custom_id": "x", "prompt": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n{"custom_id": "x", "prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"'x' is there twice, in .*a\.jsonl: line 1 and in .*2"):
        open_input([str(tmp_path / "*.jsonl")]).check()


def test_a_seed_is_of_job_and_row(engine):
    results = {}

    class Sink:
        def write(self, result):
            results[result.row.row_id] = result.output.outputs[0].token_ids

        def tick(self):
            pass

    params = SamplingParams(max_tokens=12, ignore_eos=True)
    rows = [Row(row_id=name, prompt=[1, 2], params=params) for name in "ab"]
    run(rows, Sink(), engine)
    first = dict(results)
    run(rows[::-1], Sink(), engine)
    assert results == first and first["a"] != first["b"]
    run(rows, Sink(), engine, seed=1)
    assert results["a"] != first["a"]
