# SPDX-License-Identifier: Apache-2.0
"""Jobs: what is stopped anywhere goes on to the same bytes; wrong rows are records."""

import bisect
import dataclasses
import gzip
import io
import itertools
import json
import math
import re
import resource

import jax
import pytest

from jpaged import Completion, RequestOutput, SamplingParams
from jpaged.jobs import Result, Row, run
from jpaged.jobs.inputs import open_input
from jpaged.jobs.openai import RecordMaker, RowReader
from jpaged.jobs.output import OutputError, OutputFile
from tests.jpaged.jobs.rows import encode, written

ROWS = [
    {"prompt": [i + 1, 2, 3], "max_tokens": 2 + i % 3, "n": 1 + i % 2, "custom_id": f"r{i}"}
    for i in range(12)
]


@pytest.fixture
def source(tmp_path):
    return written(tmp_path / "in.jsonl", ROWS)


def go_on(source, path, engine, sync_rows=2, **options):
    """Runs what is left of a job; sorts if all is done."""
    given = open_input([str(source)])
    ids = given.check()
    with OutputFile(path, ids, encode, sync_rows=sync_rows) as output:
        reader = RowReader()
        rows = (reader.row(line) for line in given if output.lacks(line.row_id))
        report = run(rows, output, engine, **options)
        output.sync()
        if output.is_done:
            output.sort()
    return report


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(89, id="some"),
        pytest.param(1, id="all", marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
)
def test_it_goes_on_from_every_byte(source, tmp_path, engine, step):
    whole = tmp_path / "whole.jsonl"
    go_on(source, whole, engine)
    data = whole.read_bytes()
    lines = data.splitlines(keepends=True)
    assert [json.loads(line)["custom_id"] for line in lines] == [row["custom_id"] for row in ROWS]
    path, results = tmp_path / "out.jsonl", {}
    for line in lines:
        results[json.loads(line)["custom_id"]] = line
    ends = list(itertools.accumulate(map(len, lines), initial=0))
    given = open_input([str(source)])
    ids = given.check()
    around = {end + by for end in ends for by in (-1, 0, 1)} & set(range(len(data) + 1))
    for length in sorted({*range(0, len(data), step), *around}):
        path.write_bytes(data[:length])
        with OutputFile(path, ids, lambda result: results[result.row.row_id]) as output:
            whole_lines = bisect.bisect_right(ends, length) - 1
            assert output.num_done == whole_lines
            assert output.num_dropped_bytes == length - ends[whole_lines]
            missing = [line.row_id for line in given if output.lacks(line.row_id)]
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


def test_time_to_end_is_used(source, tmp_path, engine):
    """What runs when it is stopped ends within the time for that, and what waits does not begin."""
    reports = []
    for grace_s in (0.0, 60.0):
        path = tmp_path / f"{grace_s}.jsonl"
        calls = iter(range(1000))
        options = {"grace_s": grace_s, "stop": lambda calls=calls: next(calls) > 3}
        reports.append(go_on(source, path, engine, **options))
        assert not engine.has_unfinished_requests
        engine.check_invariants()
    at_once, ended = reports
    assert at_once.stopped and ended.stopped
    # At most max_num_seqs sequences run, so not all of them.
    assert at_once.num_done < ended.num_done < len(ROWS)


@pytest.mark.parametrize("room", [0, 1, 700, 1500])
def test_a_full_disk_leaves_whole_records(source, tmp_path, engine, room):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    go_on(source, whole, engine)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OutputError, match="File too large") as caught:
            go_on(source, path, engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.is_full and not engine.has_unfinished_requests
    data = path.read_bytes()
    assert len(data) <= room and data[-1:] in (b"", b"\n") and (data or room < 700)
    go_on(source, path, engine)
    assert path.read_bytes() == whole.read_bytes()


def test_a_disk_that_is_full_when_sorting_keeps_the_records(source, tmp_path, engine):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    go_on(source, whole, engine)
    lines = whole.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(reversed(lines)))
    ids = open_input([str(source)]).check()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with OutputFile(path, ids, encode) as output:
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, hard))
        try:
            with pytest.raises(OutputError):
                output.sort()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"".join(reversed(lines))
    assert sorted(tmp_path.iterdir()) == sorted([source, whole, path])
    go_on(source, path, engine)
    assert path.read_bytes() == whole.read_bytes()


def test_a_device_that_fails_loses_no_result(source, tmp_path, engine, monkeypatch):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    go_on(source, whole, engine)
    calls, run_step = iter(range(1000)), engine._runner.run

    def fail(*args):
        if next(calls) == 6:
            raise jax.errors.JaxRuntimeError("INTERNAL: the device failed")
        return run_step(*args)

    given = []
    monkeypatch.setattr(OutputFile, "write", noted(OutputFile.write, given))
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", fail)
        with pytest.raises(jax.errors.JaxRuntimeError, match="the device failed"):
            go_on(source, path, engine, sync_rows=100)
    there = [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()]
    assert 0 < len(there) < len(ROWS) and there == given
    assert not engine.has_unfinished_requests
    go_on(source, path, engine)
    assert path.read_bytes() == whole.read_bytes()


def noted(write, given):
    def write_and_note(self, result):
        given.append(result.row.row_id)
        write(self, result)

    return write_and_note


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
    (b"[" * 100_000, "nested too deeply"),
    ({"custom_id": "j" * 513, "prompt": [1]}, "1 to 512 characters"),
    ({"custom_id": "\ud800", "prompt": [1]}, "half of a surrogate pair"),
    ({"custom_id": "k", "url": "/v1/completions", "body": 5}, "body=5"),
    ({"custom_id": "l", "url": "/v1/completions", "body": {}}, "prompt is missing"),
    ({"prompt": [1], "temperature": "hot"}, "temperature='hot'"),
    ({"prompt": [1], "stop": 5}, "stop=5"),
    ({"prompt": [1] * 500}, "500 tokens"),
]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(len(WRONG), id="each"),
        pytest.param(500, marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
)
def test_wrong_rows_are_records_and_good_ones_are_served(tmp_path, engine, number):
    assert len(WRONG) >= 30
    wrong = [WRONG[i % len(WRONG)] for i in range(number)]
    good = json.dumps({"prompt": [1, 2], "max_tokens": 2}).encode()
    lines = [with_id(row, i) for i, (row, _) in enumerate(wrong)]
    # Good ones among them, after every tenth; and empty lines at the end, which are none.
    lines = [part for i, line in enumerate(lines) for part in ([line, good][: 1 + (i % 10 == 9)])]
    source, path = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    source.write_bytes(gzip.compress(b"\n".join(lines) + b"\n\n"))
    report = go_on(source, path, engine)
    assert (report.num_done, report.num_errors) == (len(lines), number)
    says = iter(says for _, says in wrong)
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len(records) == len(lines)
    for place, (record, line) in enumerate(zip(records, lines, strict=True), 1):
        if line == good:
            assert record["response"]["body"]["usage"]["completion_tokens"] == 2
        else:
            message = record["error"]["message"]
            assert message.startswith(f"line {place}: ") and next(says) in message
            assert len(message) < 1000 and "\n" not in message


def with_id(row, number):
    """A row as a line; its custom_id, where that is one, is made its own."""
    if isinstance(row, bytes):
        return row
    if re.fullmatch("[a-z]", str(row.get("custom_id"))):
        row = row | {"custom_id": f"{row['custom_id']}{number}"}
    return json.dumps(row).encode()


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


def test_rows_that_come_later_join_those_that_run(engine):
    results = []

    class Sink:
        def write(self, result):
            results.append((result.row.row_id, result.output.outputs[0].token_ids))

        def tick(self):
            pass

    def of(name, length):
        params = SamplingParams(max_tokens=length, ignore_eos=True)
        return Row(row_id=name, prompt=[1, 2], params=params)

    def coming():
        yield of("long", 24)
        yield from [None] * 5
        assert not results and engine.has_unfinished_requests
        yield of("short", 3)
        while len(results) < 2:
            yield None
        yield of("last", 3)

    report = run(coming(), Sink(), engine)
    assert (report.num_done, report.num_left, report.stopped) == (3, 0, False)
    assert [name for name, _ in results] == ["short", "long", "last"]
    together = dict(results)
    results.clear()
    run([of("long", 24), of("short", 3), of("last", 3)], Sink(), engine)
    assert dict(results) == together


def test_standard_input_is_read_as_often_as_a_file(source):
    for data in (source.read_bytes(), gzip.compress(source.read_bytes())):
        given, file = open_input(["-"], io.BytesIO(data)), open_input([str(source)])
        assert len(given.check()) == len(file.check()) == len(ROWS)
        assert list(given) == list(given) == list(file)
        assert given.sha256 == file.sha256
    with pytest.raises(ValueError, match="standard input is closed"):
        open_input(["-"])


SAMPLE = Completion("ab", [5, 6], -math.inf, [{5: -0.5, 7: -1.5}, {6: -math.inf, 8: -0.25}], "stop")
OUTPUT = RequestOutput("0", [1, 2, 3], [SAMPLE], True, 0.0, 0.0)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_prompts_log_probabilities_are_beside_the_choices(kind):
    found = [None, {2: -0.25, 9: -1.5}, {3: -4.0}]
    row = Row(row_id="a", kind=kind, model="m")
    output = dataclasses.replace(OUTPUT, prompt_logprobs=found)
    body = json.loads(encode(Result(row, output, None)))["response"]["body"]
    assert body["prompt_logprobs"] == [None, {"2": -0.25, "9": -1.5}, {"3": -4.0}]
    body = json.loads(encode(Result(row, OUTPUT, None)))["response"]["body"]
    assert "prompt_logprobs" not in body


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_log_probabilities_have_the_form_of_openais(kind):
    row = Row(row_id="a", kind=kind, model="m", params=SamplingParams(logprobs=2))
    body = RecordMaker(None, "tiny").record(Result(row, OUTPUT, None))["response"]["body"]
    assert body["model"] == "m"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    (choice,) = body["choices"]
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")

    def entry(token, logprob):
        return {"token": token, "logprob": logprob, "bytes": [ord(token)]}

    if kind == "text":
        assert (body["object"], choice["text"]) == ("text_completion", "ab")
        assert choice["logprobs"] == {
            "tokens": ["5", "6"],
            "token_logprobs": [-0.5, -9999.0],
            "top_logprobs": [{"5": -0.5, "7": -1.5}, {"6": -9999.0, "8": -0.25}],
            "text_offset": [0, 1],
        }
    else:
        assert body["object"] == "chat.completion"
        assert choice["message"] == {"role": "assistant", "content": "ab"}
        assert choice["logprobs"] == {
            "content": [
                entry("5", -0.5) | {"top_logprobs": [entry("5", -0.5), entry("7", -1.5)]},
                entry("6", -9999.0) | {"top_logprobs": [entry("8", -0.25), entry("6", -9999.0)]},
            ]
        }


@pytest.mark.parametrize("top", [0, 1, 2])
def test_a_chat_has_as_many_likeliest_tokens_as_it_asked_for(top):
    """In order, and the token itself only where it is among them, as OpenAI has it."""
    row = Row(row_id="a", kind="chat", params=SamplingParams(logprobs=top))
    body = RecordMaker(None, "tiny").record(Result(row, OUTPUT, None))["response"]["body"]
    content = body["choices"][0]["logprobs"]["content"]
    assert [(entry["token"], entry["logprob"]) for entry in content] == [("5", -0.5), ("6", -9999)]
    found = [[likely["token"] for likely in entry["top_logprobs"]] for entry in content]
    assert found == [["5", "7"][:top], ["8", "6"][:top]]
