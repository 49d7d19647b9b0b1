# SPDX-License-Identifier: Apache-2.0
import gzip
import json

import pytest

from jpaged.simulation.traces import read_trace

_AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109\r
2023-11-16 18:15:47.5,5000,0
"""


def _mooncake(timestamp, prompt, output, *hashes):
    row = {"timestamp": timestamp, "input_length": prompt, "output_length": output}
    return json.dumps(row | ({"hash_ids": list(hashes)} if hashes else {})) + "\n"


@pytest.fixture
def read(tmp_path):
    def read(text, name="trace", **settings):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return read_trace(str(path), **{"max_model_len": 2048, "vocab_size": 50} | settings)

    return read


def _lengths(work):
    return [(len(item.prompt_token_ids), item.num_output_tokens) for item in work.items]


class TestAzure:
    @pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
    def test_times_and_lengths(self, read, name):
        work = read(_AZURE, name)
        # By hand; in order of time, the third line cut to leave room for the token it has not.
        times = [item.arrival_s for item in work.items]
        assert times == pytest.approx([0, 0.81941, 4.314579], abs=1e-6)
        assert _lengths(work) == [(374, 44), (2047, 1), (396, 109)]
        assert work.num_cut == 1

    def test_the_first_ones_at_half_the_rate(self, read):
        work = read(_AZURE, num_requests=2, time_scale=2.0, num_samples=3)
        assert [item.arrival_s for item in work.items] == pytest.approx([0, 8.629158], abs=1e-6)
        assert [item.num_samples for item in work.items] == [3, 3]
        assert [item.arrival_s for item in read(_AZURE, time_scale=0.0).items] == [0, 0, 0]

    def test_prompts_differ_from_the_start(self, read):
        prompts = [item.prompt_token_ids for item in read(_AZURE).items]
        assert len({tuple(prompt[:2]) for prompt in prompts}) == 3
        assert all(0 <= token < 50 for prompt in prompts for token in prompt)


class TestMooncake:
    def test_prompts_begin_alike_as_far_as_hashes_are_equal(self, read):
        first, second, third = (
            item.prompt_token_ids
            for item in read(
                _mooncake(0, 1100, 7, 0, 14, 3)
                + _mooncake(250, 1600, 8, 0, 14, 4, 9)
                + _mooncake(1250, 1100, 9, 0, 15, 3)
            ).items
        )
        assert first[:1024] == second[:1024] and first[1024:1026] != second[1024:1026]
        assert first[:512] == third[:512] and first[512:514] != third[512:514]

    def test_times_are_milliseconds(self, read):
        work = read(_mooncake(250, 9, 7, 1) + _mooncake(1500, 600, 8, 1, 2))
        assert [item.arrival_s for item in work.items] == [0, 1.25]
        assert _lengths(work) == [(9, 7), (600, 8)]

    def test_blocks_without_a_hash_are_like_no_other(self, read):
        prompts = [i.prompt_token_ids for i in read(_mooncake(0, 600, 7, 5) * 2).items]
        assert prompts[0][:512] == prompts[1][:512] and prompts[0][512:] != prompts[1][512:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is none that is known: its first line must be TIMESTAMP"),
        ("time,in,out\n1,2,3\n", "is none that is known"),
        (_AZURE.splitlines()[0], "has no requests"),
        (_AZURE + "2023-11-16 18:15:47,5\n", "line 5: has 2 columns, not 3"),
        (_AZURE + "yesterday,5,6\n", "line 5: Invalid isoformat string: 'yesterday'"),
        (_AZURE + "2023-11-16 18:15:47,5,-6\n", "line 5: a length is below 0"),
        (_AZURE + "2023-11-16 18:15:47,many,6\n", "line 5: invalid literal"),
        (_mooncake(0, 9, 7) + "{}\n", "line 2: no field 'timestamp'"),
        (_mooncake(0, 9, 7) + '{"timestamp": 1\n', "line 2: Expecting"),
        (_mooncake(0, 9, 7) + _mooncake(0, "9", 7), "line 2: '9' is no whole number"),
        (_mooncake(0, 9, 7) + _mooncake(0, 9, True), "line 2: True is no whole number"),
        (_mooncake("0", 9, 7), "line 1: unsupported operand"),
    ],
)
def test_what_is_no_trace_is_refused(read, text, message):
    with pytest.raises(ValueError, match=message) as e:
        read(text)
    assert "\n" not in str(e.value)


def test_files_that_cannot_be_read(read, tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        read_trace(str(tmp_path / "none"), max_model_len=9, vocab_size=9)
    (tmp_path / "bad.gz").write_bytes(gzip.compress(_AZURE.encode())[:40])
    with pytest.raises(ValueError, match="ended before"):
        read_trace(str(tmp_path / "bad.gz"), max_model_len=9, vocab_size=9)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="can't decode"):
        read_trace(str(tmp_path / "binary"), max_model_len=9, vocab_size=9)
