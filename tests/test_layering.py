# SPDX-License-Identifier: Apache-2.0
"""Each layer imports itself and what lies below it: scripts, jpaged, models, pallas_kernels."""

import ast
import pathlib
import subprocess
import sys

import pytest

import pallas_kernels
from jpaged import page_pool

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAYERS = ["scripts", "jpaged", "models", "pallas_kernels"]  # from the top
FOLDERS = {*LAYERS, "tests", "docs", "constraints"}
# What installing and packaging leave behind; .gitignore has them too.
LEFTOVERS = ["build", "dist", "*.egg-info", "__pycache__", "device_check_results"]

FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))

# The scheduler and its books must be usable where there is no jax.
JAX_FREE = [
    "jpaged",
    "jpaged.page_pool",
    "jpaged.page_table",
    "jpaged.params",
    "jpaged.sequence",
    "jpaged.scheduler",
    "jpaged.batch",
]


def imported_packages(source):
    """Top-level packages that a module imports anywhere, functions and TYPE_CHECKING included."""
    packages = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import hides its layer"
            packages.add(node.module.partition(".")[0])
    return packages


def test_the_imports_of_a_module_are_found_wherever_they_stand():
    source = """
import a.b, c as d
from e.f import g
if TYPE_CHECKING:
    from h import i
def function():
    import j
"""
    assert imported_packages(source) == {"a", "c", "e", "h", "j"}


def test_there_is_something_to_check():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_downward(path):
    layer = LAYERS.index(path.relative_to(ROOT).parts[0])
    above = {*LAYERS[:layer], "tests"}
    assert not imported_packages(path.read_text(encoding="utf-8")) & above


def test_the_books_need_no_jax():
    code = f"""
import importlib, sys
for name in {JAX_FREE!r}:
    importlib.import_module(name)
    found = [m for m in ("jax", "jaxlib", "flax", "models", "pallas_kernels") if m in sys.modules]
    assert not found, f"{{name}} imports {{found}}"
from jpaged import SamplingParams
assert "jax" not in sys.modules, "SamplingParams imports jax"
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_host_and_device_reserve_the_same_page():
    """The scheduler may not import the kernels, so the number stands in both."""
    assert page_pool.NULL_PAGE == pallas_kernels.NULL_PAGE


def test_there_are_no_other_folders():
    folders = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir()
        and not path.name.startswith(".")
        and not any(path.match(pattern) for pattern in LEFTOVERS)
    }
    assert folders == FOLDERS
