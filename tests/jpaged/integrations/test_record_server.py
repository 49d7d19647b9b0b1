# SPDX-License-Identifier: Apache-2.0
"""The records of a server are those of `jpaged batch`, byte for byte, whoever asks for them."""

import concurrent.futures
import json
import random

import pytest

from jpaged import EngineConfig, SamplingParams
from jpaged.integrations.record_server import RecordServer, ServerSettings
from tests.jpaged.integrations.rows import (
    CONFIG,
    PARAMS,
    SEED,
    WRONG,
    batch_records,
    rows,
    without_line,
)


@pytest.fixture(scope="module")
def server():
    server = RecordServer(ServerSettings(config=CONFIG, params=PARAMS, seed=SEED))
    yield server
    server.close()


@pytest.mark.slow
def test_records_are_those_of_a_batch(server, tmp_path):
    given = rows(24) + WRONG
    random.Random(0).shuffle(given)
    want = batch_records(tmp_path, given, code=1)
    for size, threads in ((1, 6), (7, 3), (len(given), 1)):
        random.Random(size).shuffle(given)
        groups = [given[i : i + size] for i in range(0, len(given), size)]
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            records = [record for part in pool.map(server.records, groups) for record in part]
        for row, record in zip(given, records, strict=True):
            is_wrong = row in WRONG
            assert (json.loads(record)["error"] is not None) == is_wrong
            line = want[row["custom_id"]]
            assert record == (without_line(line) if is_wrong else line)


def test_rows_are_lines_too(server):
    row = {"custom_id": "a", "prompt": "The dog", "max_tokens": 4}
    (record,) = server.records([row])
    line = json.dumps(row)
    assert server.records([line, f" {line}\n".encode()]) == [record, record]
    assert json.loads(record)["response"]["body"]["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "a"}, "custom_id is missing"),
        ({"custom_id": 5, "prompt": "a"}, "custom_id=5"),
        ({"custom_id": "", "prompt": "a"}, "custom_id=''"),
        ("", "it is empty"),
        ("{", "it is not valid JSON"),
        (b"\xff", "it is not UTF-8"),
        ("[1]", "must be a JSON object"),
        ([1], "must be a JSON object"),
        (None, "must be a JSON object"),
    ],
)
def test_what_is_no_row_is_an_error_record(server, row, says):
    record = json.loads(server.records([row])[0])
    assert record["response"] is None and record["error"]["code"] == "invalid_row"
    assert says in record["error"]["message"] and record["custom_id"] == ""
    assert json.loads(server.records([row], ["mine"])[0])["custom_id"] == "mine"


def test_a_prompt_without_a_custom_id_is_called_as_asked(server):
    named, called = server.records(
        [{"custom_id": "mine", "prompt": "The dog"}, {"prompt": "The dog"}], ["", "mine"]
    )
    assert named == called and json.loads(called)["error"] is None


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"config": {"max_seqs": 3}}, "config has 'max_seqs'; there are page_size,"),
        ({"config": {"max_num_seqs": 0}}, "max_num_seqs=0"),
        ({"config": 5}, "config=5 must be"),
        ({"params": {"max_token": 3}}, "unknown field 'max_token'"),
        ({"params": {"top_p": 2}}, "top_p=2"),
        ({"params": SamplingParams(seed=3)}, "params has seed=3"),
        ({"params": 5}, "params=5 must be"),
        ({"seed": "x"}, "seed='x'"),
        ({"model": ""}, "model='' must be"),
        ({"options": {"date": "tomorrow"}}, "options: date='tomorrow' must be a day"),
        ({"options": 5}, "options=5 must be"),
    ],
)
def test_settings_that_are_refused_before_anything_is_loaded(settings, says):
    with pytest.raises(ValueError) as caught:
        ServerSettings(**settings)
    assert says in str(caught.value)


def test_settings_are_those_of_a_batch_unless_they_are_whole():
    config = ServerSettings(config={"max_num_seqs": 32}).config
    assert (config.deterministic, config.max_num_batched_tokens) == (True, 128)
    config = ServerSettings(config={"deterministic": False}).config
    assert config == EngineConfig()
    assert ServerSettings(config=EngineConfig(max_num_seqs=9)).config.deterministic is False
