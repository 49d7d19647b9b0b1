# SPDX-License-Identifier: Apache-2.0
"""What is written of results, whatever the stream and the numbers."""

import dataclasses
import errno
import io
import json
import math

import pytest
import tokenizers

from jpaged import RequestOutput
from jpaged.host.outputs import Completion
from jpaged.scripts.flags import OutputError
from jpaged.scripts.output import ResultWriter

COMPLETION = Completion("é 🙂", [1, 2], -1.5, None, "stop")


def output(*completions, **fields):
    return RequestOutput(
        **dict(
            request_id="x17",
            prompt_token_ids=[3],
            outputs=list(completions),
            finished=True,
            time_to_first_token_s=0.5,
            latency_s=1.0,
        )
        | fields
    )


def completion(**fields):
    return dataclasses.replace(COMPLETION, **fields)


def writer(encoding="utf-8", as_json=False, tokenizer=None, prompts=("one", "two")):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    return ResultWriter(prompts, tokenizer, as_json=as_json, stream=stream), stream.buffer


def strict(data):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(data, parse_constant=refuse)


@pytest.fixture
def tokenizer():
    return tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"zero": 0, "one": 1, "a b": 2, "\ufffd": 3}, unk_token="zero")
    )


class TestText:
    def test_is_written_at_once_with_the_number_of_the_prompt(self, tokenizer):
        results, data = writer(tokenizer=tokenizer)
        results.write(1, output(COMPLETION, completion(text="b", finish_reason="abort")))
        assert data.getvalue().decode() == (
            "=== prompt 2, sample 1\ntwoé 🙂\n\n=== prompt 2, sample 2 (aborted)\ntwob\n\n"
        )

    @pytest.mark.parametrize(
        ("encoding", "text"),
        [
            ("ascii", "\\xe9 \\U0001f642"),
            ("cp1252", "é \\U0001f642"),
            ("latin-1", "é \\U0001f642"),
            ("utf-16-le", "é 🙂"),
        ],
    )
    def test_what_the_encoding_lacks_is_escaped(self, tokenizer, encoding, text):
        results, data = writer(encoding, tokenizer=tokenizer)
        results.write(0, output(COMPLETION))
        assert data.getvalue().decode(encoding) == f"=== prompt 1, sample 1\none{text}\n\n"

    def test_without_a_tokenizer(self):
        results, data = writer(prompts=[[5, 6]])
        results.write(0, output(COMPLETION))
        assert data.getvalue() == b"=== prompt 1, sample 1\n5 6 1 2\n\n"

    def test_logprobs(self, tokenizer):
        logprobs = [{1: -0.25, 0: -2.0}, {2: -3.0, 3: -0.125}]
        results, data = writer(tokenizer=tokenizer)
        results.write(0, output(completion(logprobs=logprobs)))
        assert data.getvalue().decode().splitlines()[-3:] == [
            '  -0.2500 "one"  of  -0.2500 "one"  -2.0000 "zero"',
            '  -3.0000 "a b"  of  -3.0000 "a b"  -0.1250 "\ufffd"',
            "",
        ]

    def test_nothing_of_a_prompt_that_was_not_begun(self):
        results, data = writer()
        results.write(0, output(completion(token_ids=[], text="", finish_reason="abort")))
        assert data.getvalue() == b"" and results.num_aborted == 1


class TestJson:
    @pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252", "UTF_8", "shift-jis"])
    def test_is_json_in_any_encoding(self, encoding):
        results, data = writer(encoding, as_json=True)
        results.write(1, output(COMPLETION))
        line = data.getvalue().decode(encoding)
        assert line.endswith("}\n") and line.count("\n") == 1
        assert line.isascii() != encoding.upper().startswith("UTF")
        expected = dataclasses.asdict(output(COMPLETION)) | {"request_id": "1"}
        assert strict(line) == expected

    def test_numbers_that_json_has_not(self):
        wrong = completion(
            cumulative_logprob=math.nan,
            logprobs=[{1: -math.inf, 2: 0.5}, {2: math.nan}],
            score=math.inf,
        )
        results, data = writer(as_json=True)
        results.write(0, output(wrong))
        (sample,) = strict(data.getvalue())["outputs"]
        assert (sample["cumulative_logprob"], sample["score"]) == (None, None)
        assert sample["logprobs"] == [{"1": None, "2": 0.5}, {"2": None}]

    def test_an_aborted_prompt_is_not_finished(self):
        results, data = writer(as_json=True)
        results.write(0, output(completion(finish_reason="abort")))
        results.write(1, output())  # an aborted beam search
        lines = [strict(line) for line in data.getvalue().splitlines()]
        assert [line["finished"] for line in lines] == [False, False]
        assert lines[0]["outputs"][0]["finish_reason"] == "abort"
        assert (results.num_finished, results.num_aborted) == (0, 2)


def test_errors_are_said_and_counted(capsys):
    results, data = writer(as_json=True)
    wrong = completion(finish_reason="error", error="logits are NaN:\ntry bfloat16")
    results.write(1, output(wrong, wrong))
    results.write(0, output(COMPLETION))
    assert capsys.readouterr().err == "prompt 2: logits are NaN: try bfloat16\n"
    assert (results.num_finished, results.num_errors) == (1, 1)
    assert strict(data.getvalue().splitlines()[0])["outputs"][0]["error"].startswith("logits")
    assert results.written == {0, 1} and results.first_token_s == [0.5, 0.5]


class Disk(io.BytesIO):
    error: OSError | None = OSError(errno.ENOSPC, "No space left on device")

    def write(self, data):
        if self.error:
            raise self.error
        return super().write(data)


def test_what_cannot_be_written():
    disk = Disk()
    results = ResultWriter(["one"], None, as_json=True, stream=io.TextIOWrapper(disk))
    with pytest.raises(OutputError, match="No space left on device"):
        results.write(0, output(COMPLETION))
    disk.error = BrokenPipeError()
    with pytest.raises(BrokenPipeError):
        results.text("more")
    disk.error = None
