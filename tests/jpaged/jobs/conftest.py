# SPDX-License-Identifier: Apache-2.0
"""What tests of jobs share."""

import os

import pytest

from tests.jpaged.tiny import tiny_engine


@pytest.fixture(scope="module")
def engine():
    """A pool so small that requests are preempted."""
    return tiny_engine(deterministic=True, num_pages=9, page_size=4, max_num_batched_tokens=32)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """What is synced changes nothing that a test can see, and a busy disk takes seconds for it."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
