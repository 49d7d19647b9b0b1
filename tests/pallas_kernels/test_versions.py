# SPDX-License-Identifier: Apache-2.0
"""What differs between the versions of jax: each of its ways, whichever of them is installed."""

import pathlib
import re

import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.pallas_kernels import versions

ROOT = pathlib.Path(__file__).parents[2]


def load_0_10(ref, idx, *, layout=None, optimized=True):
    return ref, idx, layout, optimized


def load_0_11(ref, idx=None, *, layout=None, optimized=True):
    assert idx is None, "deprecated"
    return ref, (), layout, optimized


def load_0_12(ref, *, layout=None, optimized=True):
    return ref, (), layout, optimized


@pytest.mark.parametrize("load", [load_0_10, load_0_11, load_0_12])
def test_load(load, monkeypatch):
    monkeypatch.setattr(plgpu, "load", load)
    assert versions.mosaic_load("ref", "layout") == ("ref", (), "layout", False)


def test_store_by_assignment(monkeypatch):
    monkeypatch.delattr(plgpu, "store", raising=False)
    ref = {}
    versions.mosaic_store(ref, "numbers")
    assert ref == {...: "numbers"}


def test_store_by_a_function(monkeypatch):
    stored = []
    monkeypatch.setattr(
        plgpu,
        "store",
        lambda ref, numbers, *, optimized=True: stored.append((ref, numbers, optimized)),
        raising=False,
    )
    versions.mosaic_store("ref", "numbers")
    assert stored == [("ref", "numbers", False)]


def test_races_are_noted_and_not_raised():
    modes = [versions.tpu_interpreter().mode]
    if versions.interprets_mosaic():
        modes.append(versions.mosaic_interpreter().mode)
    for mode in modes:
        assert mode.detect_races and getattr(mode, "on_race", "warn") == "warn"


def test_nothing_else_asks_for_the_version():
    """Nor imports what is private to jax."""
    asks = re.compile(r"jax\._src|jax\.__version_info__|hasattr\((pltpu|plgpu|pl|plt|jax)\b")
    sources = [
        path
        for package in ("jpaged", "models", "pallas_kernels", "scripts", "tests")
        for path in (ROOT / package).rglob("*.py")
        if path.name not in ("versions.py", "test_versions.py")
    ]
    assert len(sources) > 50
    assert [path for path in sources if asks.search(path.read_text(encoding="utf-8"))] == []
