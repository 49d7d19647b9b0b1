# SPDX-License-Identifier: Apache-2.0
"""What CONTRIBUTING.md names is there."""

import importlib
import pathlib
import re

import pytest

TEXT = (pathlib.Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text()
ROWS = [line.split("|")[1:-1] for line in TEXT.splitlines() if line.startswith("| a ")]
NAMES = [name for row in ROWS for cell in row for name in re.findall(r"`(jpaged\.[\w.]+)`", cell)]


def test_every_place_is_named():
    assert [row[0].strip() for row in ROWS] == [
        "a token gets its page",
        "a page is copied",
        "a beam is chosen",
        "a shape is padded",
        "a weight is named",
    ]
    assert len(NAMES) == 8 and all(re.search("`jpaged", row[1]) for row in ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_the_place_exists(name):
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        break
    for attribute in parts[count:]:
        found = getattr(found, attribute)
    assert callable(found)
