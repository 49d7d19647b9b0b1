# SPDX-License-Identifier: Apache-2.0
"""Budgets of size, so that the code stays small enough to read in one sitting.

The host side of PagedAttention is what this project explains: pool, table, sequence, scheduler and
engine together are to be read in an evening, hence 1,775 lines, comments and blank lines included.
A file of more than 500 lines has a second subject that wants a file of its own; the demo corpus,
which is tables of words and sentences, is left out. A change that breaks a budget simplifies
something, or argues in CHANGELOG.md for the number that it puts here.
"""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
CORE = ["page_pool.py", "page_table.py", "sequence.py", "scheduler.py", "engine.py"]
MAX_CORE_LINES = 1775
MAX_FILE_LINES = 500

FILES = sorted(
    path
    for package in ("scripts", "jpaged", "models", "pallas_kernels")
    for path in (ROOT / package).rglob("*.py")
    if not path.name.startswith("demo_")
)


def num_lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_core_can_be_read_in_one_sitting():
    lines = {name: num_lines(ROOT / "jpaged" / name) for name in CORE}
    assert sum(lines.values()) <= MAX_CORE_LINES, lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_has_one_subject(path):
    assert num_lines(path) <= MAX_FILE_LINES
