# SPDX-License-Identifier: Apache-2.0
"""Prompts as people give them: arguments, a file, or standard input."""

import codecs
import io
import os
import pathlib
import re
import select
import sys
from collections.abc import Sequence
from typing import BinaryIO

_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_prompts(given: Sequence[str], path: str | None, flag: str = "--prompts_file") -> list[str]:
    """Returns the prompts of --prompt, or of a file, or of standard input.

    Args:
      given: of --prompt.
      path: of the file; - is standard input, and so is None where nothing is given.
      flag: which names the file.

    Raises:
      ValueError: if there are none, one is empty or no text, or the file cannot be read; the
        message is one line.
    """
    if given and path is not None:
        raise ValueError(f"--prompt and {flag} exclude each other; give one of them")
    if given:
        if not all(given):
            raise ValueError("a --prompt is empty; a prompt needs at least a character")
        alone = len(given) == 1
        prompts = []
        for number, prompt in enumerate(given, 1):
            own = "--prompt" if alone else f"--prompt number {number}"
            prompts.append(decode_flag(own, prompt))
            if "\0" in prompt:
                raise ValueError(f"{own} has a NUL character, which no text has")
        return prompts
    if path == "":
        raise ValueError(f"{flag} is empty; name a file, or - for standard input")
    if path is not None and path != "-":
        try:
            data = pathlib.Path(path).expanduser().read_bytes()
        except OSError as e:
            raise ValueError(f"{flag}={path}: {e.strerror}") from e
        except (ValueError, RuntimeError) as e:  # a NUL character, or no such home directory
            raise ValueError(f"{flag}={path!r}: {e}") from e
        return parse_prompts(data, path)
    if sys.stdin is None:
        raise ValueError(
            "no prompt, and standard input is closed: give --prompt=... or --prompts_file=FILE"
        )
    if path is None and sys.stdin.isatty():
        raise ValueError("no prompt: give --prompt=..., --prompts_file=FILE, or standard input")
    try:
        data = _read_all(sys.stdin.buffer)
    except (OSError, io.UnsupportedOperation) as e:
        raise ValueError(
            f"standard input cannot be read: {getattr(e, 'strerror', None) or e}; give "
            "--prompt=... or --prompts_file=FILE"
        ) from e
    return parse_prompts(data, "standard input")


def _read_all(stream: BinaryIO) -> bytes:
    """Reads to the end, also what another process has set not to block."""
    parts = [stream.read()]
    if not os.get_blocking(stream.fileno()):
        # None, or less than all, is what was there; only nothing at all is the end.
        while parts[-1] != b"":
            select.select([stream], [], [])
            parts.append(stream.read())
    return b"".join(part for part in parts if part)


def parse_prompts(data: bytes, name: str) -> list[str]:
    r"""Returns the prompts of a file in UTF-8, one a line.

    Lines end with "\n" or "\r\n"; other separators, such as a form feed or a lone "\r", are part of
    a prompt. A byte order mark, and empty lines at the end, are not.

    Args:
      data: what the file holds.
      name: of the file, for messages.

    Raises:
      ValueError: if it is no such file; the message names the line.
    """
    for mark, encoding in _OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise ValueError(f"{name} is {encoding} by its byte order mark; save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        column = e.start - (data.rfind(b"\n", 0, e.start) + 1) + 1
        raise ValueError(
            f"{name}: line {line} is not UTF-8 (byte 0x{data[e.start]:02x} at position {column}); "
            "save the file as UTF-8"
        ) from None
    text = text.replace("\r\n", "\n").rstrip("\n")
    lines = text.split("\n") if text else []
    for number, line in enumerate(lines, 1):
        if not line:
            raise ValueError(f"{name}: line {number} is empty; a prompt needs at least a character")
        if "\0" in line:
            raise ValueError(f"{name}: line {number} has a NUL character; save the file as UTF-8")
    if not lines:
        raise ValueError(f"{name} has no prompts; put one on each line")
    return lines


def decode_flag(flag: str, value: str) -> str:
    """Returns a flag's value as the text that it is in UTF-8, whatever the locale.

    Python keeps bytes of the command line that the locale cannot decode as lone surrogates.

    Raises:
      ValueError: if it is no UTF-8.
    """
    if not any("\ud800" <= char <= "\udfff" for char in value):
        return value
    try:
        return os.fsencode(value).decode()
    except UnicodeDecodeError as e:
        what, at = f"byte 0x{e.object[e.start]:02x}", e.start
    except UnicodeEncodeError as e:
        what, at = f"lone surrogate {value[e.start]!a}", e.start
    raise ValueError(f"{flag} is not UTF-8 ({what} at position {at + 1}); give it as UTF-8")


def parse_token_ids(prompt: str) -> list[int]:
    """Returns the token ids that a prompt is for a model without a tokenizer.

    They are decimal numbers of ASCII digits, with blanks or one comma between them.

    Raises:
      ValueError: if it is something else.
    """
    return _ids(
        prompt,
        f"prompt {prompt!r:.80}: the model has no tokenizer.json, so its prompts are token ids, "
        "such as --prompt='1 15 27'",
    )


def parse_ids(flag: str, text: str) -> tuple[int, ...]:
    """Returns the token ids of a flag's value, written as those of a prompt.

    Args:
      flag: what the message begins with.
      text: the ids.

    Raises:
      ValueError: if there are none, or something else.
    """
    return tuple(_ids(text, f"{flag!r:.80} must have token ids, such as '10 45'"))


def _ids(text: str, says: str) -> list[int]:
    pieces = re.split(r"[ \t]*,[ \t]*|[ \t]+", text.strip(" \t"))
    for piece in pieces:
        if not re.fullmatch(r"[0-9]{1,10}", piece):
            raise ValueError(f"{says}, and {piece!r:.40} is none")
    return list(map(int, pieces))
