# SPDX-License-Identifier: Apache-2.0
"""Rows of jobs as tests write them, and their records."""

import json

from jpaged.jobs.openai import RecordMaker, encode_record


def written(path, rows):
    """A file of rows, a JSON object a line. Returns: its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encode(result):
    """The record of a result, as the output has it."""
    return encode_record(RecordMaker(None, "tiny").record(result))
