# SPDX-License-Identifier: Apache-2.0
"""Prompts as people give them: arguments, a file, or standard input."""

import codecs
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jpaged import SamplingParams

_PARAMETERS = [field.name for field in dataclasses.fields(SamplingParams)]
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_prompts(given: Sequence[str], path: str | None) -> list[str]:
    """Returns the prompts of --prompt, or of --prompts_file, or of standard input.

    Raises:
      ValueError: if there are none, one is empty or no text, or the file cannot be read; the
        message is one line.
    """
    if given and path is not None:
        raise ValueError("--prompt and --prompts_file exclude each other; give one of them")
    if given:
        if not all(given):
            raise ValueError("a --prompt is empty; a prompt needs at least a character")
        alone = len(given) == 1
        return [
            decode_flag("--prompt" if alone else f"--prompt number {number}", prompt)
            for number, prompt in enumerate(given, 1)
        ]
    if path == "":
        raise ValueError("--prompts_file is empty; name a file, or - for standard input")
    if path is not None and path != "-":
        return parse_prompts(_read(path), path)
    if sys.stdin is None:
        raise ValueError(
            "no prompt, and standard input is closed: give --prompt=... or --prompts_file=FILE"
        )
    if path is None and sys.stdin.isatty():
        raise ValueError("no prompt: give --prompt=..., --prompts_file=FILE, or standard input")
    return parse_prompts(sys.stdin.buffer.read(), "standard input")


def read_json_lines(
    path: str, params: SamplingParams
) -> list[tuple[str | list[int], SamplingParams]]:
    """Returns the prompts of a file with a JSON object a line, each with its parameters.

    An object has a "prompt", text or token ids, and any parameters by the names of
    `SamplingParams`; null is the default of one.

    Args:
      path: of the file.
      params: what counts where a line has no other.

    Raises:
      ValueError: if it is no such file; the message names line and field.
    """
    lines = parse_prompts(_read(path), path)
    return [_prompt_of(f"{path}: line {i}", line, params) for i, line in enumerate(lines, 1)]


def _prompt_of(
    where: str, line: str, params: SamplingParams
) -> tuple[str | list[int], SamplingParams]:
    try:
        fields = json.loads(line, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"{where} is no JSON that can be read: {e}") from None
    if not isinstance(fields, dict) or "prompt" not in fields:
        raise ValueError(f'{where} must be a JSON object with a prompt, such as {{"prompt": "Hi"}}')
    prompt = fields.pop("prompt")
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not prompt or not (isinstance(prompt, str) or is_ids):
        raise ValueError(f"{where}: prompt={prompt!r:.80} must be text or token ids, not empty")
    if unknown := [name for name in fields if name not in _PARAMETERS]:
        raise ValueError(
            f"{where} has the field {unknown[0]!r:.80}, which is no parameter; there are prompt, "
            f"{', '.join(_PARAMETERS)}"
        )
    try:
        return prompt, dataclasses.replace(params, **fields)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r:.80} is there twice")
    return found


def _read(path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as e:
        raise ValueError(f"--prompts_file={path}: {e.strerror}") from e


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

    Raises:
      ValueError: if it is something else.
    """
    try:
        return list(_ids(prompt))
    except ValueError:
        raise ValueError(
            f"prompt {prompt!r:.80}: the model has no tokenizer.json, so its prompts are token "
            "ids, such as --prompt='1 15 27'"
        ) from None


def parse_ids(flag: str, text: str) -> tuple[int, ...]:
    """Returns the token ids that a flag's value has, with spaces or commas between them.

    Args:
      flag: what the message begins with.
      text: the ids.

    Raises:
      ValueError: if there are none, or something else.
    """
    try:
        ids = _ids(text)
    except ValueError:
        ids = ()
    if not ids:
        raise ValueError(f"{flag!r:.80} must have token ids, such as '10 45'")
    return ids


def _ids(text: str) -> tuple[int, ...]:
    return tuple(int(token) for token in text.replace(",", " ").split())
