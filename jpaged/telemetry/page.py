# SPDX-License-Identifier: Apache-2.0
"""A record as one HTML page that needs nothing beside itself: no network, no other file."""

import dataclasses
import importlib.resources
import json
from typing import Any

from jpaged.telemetry.record import TOTALS, Record


def make_page(record: Record, title: str) -> str:
    """The page.

    Args:
      record: with a frame at least.
      title: what to call it, any text.

    Returns:
      HTML, in ASCII. What a record says of itself is data there, whatever it holds: it is put into
      the page as text alone, and no program but the page's own may run.
    """
    data: dict[str, Any] = {
        "title": title,
        "header": dataclasses.asdict(record.header),
        "totals": TOTALS,
        "frames": [frame.as_fields() for frame in record.frames],
        "preemptions": [dataclasses.asdict(note) for note in record.preemptions],
        "has_ended": record.has_ended,
    }
    # "</script>" and "<!--" would end what they stand in.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = _part("page.html")
    for mark, part in (("STYLE", _part("page.css")), ("PROGRAM", _part("page.js")), ("DATA", text)):
        before, found, after = page.partition(f"@{mark}@")
        assert found, mark
        page = before + part + after
    return page


def _part(name: str) -> str:
    return importlib.resources.files(__package__ or "").joinpath(name).read_text(encoding="ascii")
