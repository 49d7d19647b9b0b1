# SPDX-License-Identifier: Apache-2.0
"""Requests that were served somewhere, from files that their owners have published."""

import csv
import datetime
import gzip
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

import numpy as np

from jpaged.simulation.workload import Item, Workload

# Tokens of a prompt that one of Mooncake's hashes stands for.
_BLOCK_TOKENS = 512
_AZURE_FIELDS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE_FIELDS = ("timestamp", "input_length", "output_length")


def read_trace(
    path: str,
    *,
    num_requests: int | None = None,
    max_model_len: int,
    vocab_size: int,
    time_scale: float = 1.0,
    num_samples: int = 1,
) -> Workload:
    """Reads requests with the times at which they came.

    Two formats are known, by the first line. Azure's (Patel et al. 2024, "Splitwise") is CSV with
    the columns TIMESTAMP, ContextTokens and GeneratedTokens. Mooncake's (Qin et al. 2025) has a
    JSON object a line, with `timestamp` in milliseconds, `input_length`, `output_length` and maybe
    `hash_ids`: prompts begin alike as far as these are equal, each standing for 512 tokens.

    Args:
      path: of the file; compressed if its name ends in ".gz".
      num_requests: how many, from the first on; None takes all.
      max_model_len: a prompt is cut to leave room for one token, then its output to what is left.
      vocab_size: token ids are below it. Prompts are equal where the file says so, and otherwise
        differ from their first token on, as far as there are so many ids.
      time_scale: what times are multiplied by; 0 has all come at once.
      num_samples: of each request.

    Returns:
      The workload; the first request comes at 0. Requests without a prompt or output token are
      given one.

    Raises:
      ValueError: if the file cannot be read, is none of these, or has no requests; one line, which
        names the line of the file.
    """
    try:
        with _open(path) as file:
            rows = list(itertools.islice(_rows(file, path), num_requests))
    except (OSError, EOFError, UnicodeDecodeError) as e:
        raise ValueError(f"trace={path!r}: {getattr(e, 'strerror', None) or e}") from e
    if not rows:
        raise ValueError(f"trace={path!r} has no requests")
    rows.sort(key=lambda row: row[0])
    start, num_cut, items = rows[0][0], 0, []
    for number, (time_s, given_prompt, given_output, hashes) in enumerate(rows):
        prompt = min(max(given_prompt, 1), max_model_len - 1)
        output = min(max(given_output, 1), max_model_len - prompt)
        num_cut += prompt < given_prompt or output < given_output
        tokens = _prompt(number, prompt, hashes, vocab_size)
        items.append(Item(tokens, output, num_samples, (time_s - start) * time_scale))
    return Workload(items, num_cut)


# When a request came, in seconds, its tokens in and out, and hashes of its prompt's blocks.
_Row = tuple[float, int, int, Sequence[int]]


def _open(path: str) -> TextIO:
    where = pathlib.Path(path).expanduser()
    if where.suffix == ".gz":
        return gzip.open(where, "rt", encoding="utf-8", newline="")
    return where.open(encoding="utf-8", newline="")


def _rows(file: TextIO, path: str) -> Iterator[_Row]:
    first = file.readline()
    lines = itertools.chain([first], file)
    if first.lstrip("\ufeff").startswith("{"):
        return _checked(lines, path, 1, _mooncake_row)
    header = next(csv.reader([first]), [])
    if tuple(name.strip("\ufeff ") for name in header[:3]) != _AZURE_FIELDS:
        raise ValueError(
            f"trace={path!r} is none that is known: its first line must be "
            f"{','.join(_AZURE_FIELDS)}, or a JSON object with {', '.join(_MOONCAKE_FIELDS)}"
        )
    return _checked(file, path, 2, _azure_row)


def _checked(lines: Iterable[str], path: str, start: int, parse: Any) -> Iterator[_Row]:
    for number, line in enumerate(lines, start):
        if not line.strip():
            continue
        try:
            row = parse(line)
            if min(row[1:3]) < 0:
                raise ValueError("a length is below 0")
        except (KeyError, TypeError, ValueError) as e:
            what = f"no field {e}" if isinstance(e, KeyError) else e
            raise ValueError(f"trace={path!r}: line {number}: {what}") from e
        yield row


def _azure_row(line: str) -> _Row:
    fields = next(csv.reader([line]))
    if len(fields) < len(_AZURE_FIELDS):
        raise ValueError(f"has {len(fields)} columns, not {len(_AZURE_FIELDS)}")
    # Python's times have six digits of a second, the file's seven.
    whole, _, fraction = fields[0].partition(".")
    time = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    return time.timestamp() + float(f"0.{fraction or 0}"), int(fields[1]), int(fields[2]), ()


def _mooncake_row(line: str) -> _Row:
    row = json.loads(line)
    time, prompt, output = (row[name] for name in _MOONCAKE_FIELDS)
    hashes = row.get("hash_ids", ())
    for value in (prompt, output, *hashes):
        if type(value) is not int:
            raise ValueError(f"{value!r} is no whole number")
    return time / 1e3, prompt, output, hashes


def _prompt(number: int, length: int, hashes: Sequence[int], vocab_size: int) -> list[int]:
    """Tokens of a prompt that begins like others as far as hashes are equal.

    A block's first two tokens tell its hash; without hashes a prompt's tell its number.
    """
    tokens = np.zeros((-(-length // _BLOCK_TOKENS), _BLOCK_TOKENS), np.int64)
    # What a file has no hash for is like nothing else: below 0, where no hash is.
    own = [*hashes[: len(tokens)], *(-1 - number for _ in range(len(tokens) - len(hashes)))]
    tokens[:, 0], tokens[:, 1] = np.divmod(np.array(own, np.int64) % vocab_size**2, vocab_size)
    return tokens.reshape(-1)[:length].tolist()
