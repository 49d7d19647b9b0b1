# SPDX-License-Identifier: Apache-2.0
import codecs
import errno
import io
import os
import threading
import time

import pytest

from jpaged.scripts.prompts import parse_prompts, parse_token_ids, read_prompts


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
    assert parse_token_ids(" 0\t7 ,  8 ") == [0, 7, 8]


@pytest.mark.parametrize(
    ("prompt", "piece"),
    [
        ("one", "one"),
        ("1 x", "x"),
        ("1.5", "1.5"),
        ("1_0", "1_0"),
        ("2 +5", "+5"),
        ("-0", "-0"),
        ("0x1F", "0x1F"),
        ("1,,2", ""),
        ("1, ,2", ""),
        ("1,", ""),
        (",1", ""),
        (" ", ""),
        ("3 \u0661\u0662", "\u0661\u0662"),
        ("1\u00a02", "1\u00a02"),
        ("1\r", "1\r"),
        ("9" * 5000, "9" * 39),
    ],
)
def test_what_is_no_token_id(prompt, piece):
    with pytest.raises(ValueError, match=r"no tokenizer\.json, so its prompts are token ids") as e:
        parse_token_ids(prompt)
    assert f"and {piece!r:.40} is none" in str(e.value)


class TestStandardInput:
    def read(self, monkeypatch, descriptor):
        with io.TextIOWrapper(open(descriptor, "rb")) as stream:
            monkeypatch.setattr("sys.stdin", stream)
            return read_prompts([], "-")

    def test_one_that_does_not_block(self, monkeypatch):
        """Nothing there at first, then half a character, then the rest."""
        descriptor, writer = os.pipe()
        os.set_blocking(descriptor, False)
        text = "caf\u00e9\nb\n".encode()

        def write():
            for part in (text[:4], text[4:]):
                time.sleep(0.05)
                os.write(writer, part)
            time.sleep(0.05)
            os.close(writer)

        thread = threading.Thread(target=write)
        thread.start()
        assert self.read(monkeypatch, descriptor) == ["caf\u00e9", "b"]
        thread.join()

    def test_one_that_cannot_be_read(self, monkeypatch):
        """Such as one that is open for writing only."""

        class WriteOnly:
            buffer = property(lambda self: self)

            def read(self):
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))

        monkeypatch.setattr("sys.stdin", WriteOnly())
        with pytest.raises(ValueError, match="input cannot be read: Bad file descriptor; give --"):
            read_prompts([], "-")


def test_a_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts").write_text("a\n")
    assert read_prompts([], "~/prompts") == ["a"]
    with pytest.raises(ValueError, match="--prompts_file='~nobody_of_this_name/x': "):
        read_prompts([], "~nobody_of_this_name/x")


def test_what_has_a_nul_character():
    with pytest.raises(ValueError, match=r"--prompts_file='a\\x00b': embedded null"):
        read_prompts([], "a\0b")
    with pytest.raises(ValueError, match="--prompt number 2 has a NUL character"):
        read_prompts(["a", "b\0"], None)
