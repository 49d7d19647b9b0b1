# SPDX-License-Identifier: Apache-2.0
import codecs

import pytest

from jpaged import SamplingParams
from jpaged.scripts.prompts import parse_prompts, parse_token_ids, read_json_lines, read_prompts


@pytest.mark.parametrize(
    ("data", "prompts"),
    [
        (b"a", ["a"]),
        (b"a\n", ["a"]),
        (b"a\n\n\n", ["a"]),
        (b"a\r\nb\r\n\r\n", ["a", "b"]),
        (b"a\rb\n", ["a\rb"]),
        (b"a\r", ["a\r"]),
        (b"a\r\r\n b ", ["a\r", " b "]),
        (b"a\x0cb\x0bc\x1cd\n", ["a\x0cb\x0bc\x1cd"]),
        ("a\x85b\u2028c\u2029\n".encode(), ["a\x85b\u2028c\u2029"]),
        (b"\xef\xbb\xbfhello\r\n", ["hello"]),
        ("é\n🙂\n".encode("utf-8-sig"), ["é", "🙂"]),
        (b"a\xef\xbb\xbf\n", ["a\ufeff"]),
        (b" \n\t\n", [" ", "\t"]),
    ],
    ids=repr,
)
def test_one_a_line(data, prompts):
    assert parse_prompts(data, "f") == prompts


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "f has no prompts"),
        (b"\n\r\n", "f has no prompts"),
        (b"\xef\xbb\xbf\n", "f has no prompts"),
        (b"a\n\nb\n", "f: line 2 is empty"),
        (b"\r\na\n", "f: line 1 is empty"),
        ("a\ncafé\n".encode("latin-1"), r"f: line 2 is not UTF-8 \(byte 0xe9 at position 4\)"),
        (b"a\nb\xf0\x9f", r"f: line 2 is not UTF-8 \(byte 0xf0 at position 2\)"),
        (b"\xed\xa0\x80\n", r"f: line 1 is not UTF-8 \(byte 0xed at position 1\)"),
        (b"\xef\xbb\xbfa\xff", r"f: line 1 is not UTF-8 \(byte 0xff at position 2\)"),
        ("hello\n".encode("utf-16"), "f is UTF-16 by its byte order mark"),
        (codecs.BOM_UTF16_BE + "hello\n".encode("utf-16-be"), "f is UTF-16"),
        ("hello\n".encode("utf-32"), "f is UTF-32"),
        ("hello\n".encode("utf-16-le"), "f: line 1 has a NUL character"),
        (b"a\nb\0\n", "f: line 2 has a NUL character"),
    ],
    ids=repr,
)
def test_what_is_no_prompts_file(data, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_prompts(data, "f")
    assert "\n" not in str(error.value)


def test_from_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_prompts([], str(file)) == ["one", "two"]
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(
            ValueError, match=r"--prompts_file=.*: (Is a|No such file or) directory"
        ):
            read_prompts([], str(path))


@pytest.mark.parametrize(
    ("given", "path", "message"),
    [
        (["a", ""], None, "a --prompt is empty"),
        (["a"], "f", "exclude each other"),
        (["a"], "", "exclude each other"),
        ([], "", "--prompts_file is empty"),
        (["\udcff\udcfe"], None, r"--prompt is not UTF-8 \(byte 0xff at position 1\)"),
        (["a", "b\ud800"], None, r"--prompt number 2 is not UTF-8 \(lone surrogate '\\ud800' at"),
    ],
)
def test_wrong_flags(given, path, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(given, path)


def test_token_ids():
    assert parse_token_ids("1 15, 27,3") == [1, 15, 27, 3]
    for prompt in ("one", "1 x", "1.5", "9" * 5000):
        with pytest.raises(ValueError, match=r"no tokenizer\.json, so its prompts are token ids"):
            parse_token_ids(prompt)


def test_json_lines(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "caf\\u00e9"}\n'
        '{"prompt": [1, 2], "temperature": null, "seed": 7, "stop": "x", "logit_bias": {"5": -1}}\n'
        '{"max_tokens": 3, "prompt": "b", "beam_width": 2, "early_stopping": "never"}\r\n\n',
        encoding="utf-8",
    )
    own = SamplingParams(max_tokens=9, seed=1)
    assert read_json_lines(str(file), own) == [
        ("café", own),
        ([1, 2], SamplingParams(max_tokens=9, seed=7, stop=("x",), logit_bias={5: -1.0})),
        ("b", SamplingParams(max_tokens=3, seed=1, beam_width=2, early_stopping="never")),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "topp": 1}', "has the field 'topp', which is no parameter; there are"),
        ('{"prompt": "a", "top_p": 2}', "top_p=2.0 must be above 0 and at most 1"),
        ('{"prompt": "a", "top_p": "1"}', "top_p='1' must be a number"),
        ('{"prompt": "a", "temperature": NaN}', "temperature=nan must be finite"),
        ('{"prompt": "a", "beam_width": 2, "presence_penalty": 1}', "no meaning in beam search"),
        ('{"prompt": "a", "n": 1, "n": 2}', "the field 'n' is there twice"),
        ('{"prompt": "a", "logit_bias": {"5": 1, "5": 2}}', "the field '5' is there twice"),
        ('{"prompt": "a"', "is no JSON that can be read"),
        ("a", "is no JSON that can be read"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"prompt": "a", "n": ' + "9" * 5000 + "}", "is no JSON that can be read"),
        ('{"n": 1}', "must be a JSON object with a prompt"),
        ("[1]", "must be a JSON object with a prompt"),
        ('{"prompt": ""}', "prompt='' must be text or token ids, not empty"),
        ('{"prompt": []}', "must be text or token ids, not empty"),
        ('{"prompt": [1.5]}', "must be text or token ids, not empty"),
        ('{"prompt": [true]}', "must be text or token ids, not empty"),
        ('{"prompt": null}', "must be text or token ids, not empty"),
        ('{"prompt": {"a": 1}}', "must be text or token ids, not empty"),
    ],
)
def test_what_is_no_json_line(line, message, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError) as error:
        read_json_lines(str(file), SamplingParams())
    text = str(error.value)
    assert text.startswith(f"{file}: line 2") and message in text and "\n" not in text
