# SPDX-License-Identifier: Apache-2.0
"""Imports run downward: each floor knows itself and those below it, each room those it may.

The floors are scripts, jpaged, models, pallas_kernels. On jpaged's, the front (the engine and what
it reads and writes) stands on two rooms that do not know each other: `host`, which needs no jax,
and `device`. `telemetry` is what runs tell of the host's side, `simulation` the host's side without
a device, and `planning` says what an engine would take of one. `measure` stands on the front,
as it runs engines, and on `simulation`, whose workloads it has them serve: no part of either; what
a step cannot be faster than it takes from `models`. `jobs` stands on the front likewise: it has an
engine run rows; and `integrations` on it, which have other systems do so, or evaluate with it.
"""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

from jpaged import pallas_kernels
from jpaged.host import page_pool

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What a module may import of this project, by the folder that it is in: that folder, and these.
MAY_IMPORT = {
    "pallas_kernels": set(),
    "models": {"pallas_kernels"},
    "jpaged/host": set(),
    "jpaged/telemetry": {"jpaged/host"},
    "jpaged/simulation": {"jpaged/host", "jpaged/telemetry"},
    "jpaged/device": {"jpaged/host", "models", "pallas_kernels"},
    "jpaged": {"jpaged/host", "jpaged/telemetry", "jpaged/device", "models", "pallas_kernels"},
    "jpaged/planning": {"jpaged/host", "jpaged/device", "models", "pallas_kernels"},
    "jpaged/jobs": {"jpaged", "jpaged/host", "models", "pallas_kernels"},
    "jpaged/integrations": {"jpaged", "jpaged/host", "jpaged/jobs", "models"},
    "jpaged/measure": {
        *("jpaged", "jpaged/host", "jpaged/simulation"),
        *("jpaged/device", "models", "pallas_kernels"),
    },
    "scripts": {
        *("jpaged", "jpaged/host", "jpaged/device", "jpaged/simulation", "jpaged/measure"),
        *("jpaged/jobs", "jpaged/planning", "jpaged/telemetry", "models", "pallas_kernels"),
    },
}
FLOORS = ("pallas_kernels", "models", "jpaged", "scripts")
FOLDERS = {*FLOORS, "tests", "docs", "constraints"}
# What installing and packaging leave behind; .gitignore has them too.
LEFTOVERS = ["build", "dist", "*.egg-info", "__pycache__", "device_check_results"]
FILES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


def folder_of(path):
    """The folder of `MAY_IMPORT` that a file, given from the root, is in."""
    parts = pathlib.PurePath(path).parts
    room = "/".join(parts[:2])
    return room if room in MAY_IMPORT else parts[0]


def imports_of(source):
    """Modules that a module imports anywhere, functions and TYPE_CHECKING included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import hides its floor"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_folders(source):
    """The folders of this project that a module imports from."""
    for name in imports_of(source):
        first, _, rest = name.partition(".")
        assert first not in {*FLOORS, "tests"} - {"jpaged"}, f"{name}: write jpaged.{name}"
        if first == "jpaged":
            path = rest.replace(".", "/")
            yield folder_of(path if path.partition("/")[0] in FLOORS else f"jpaged/{path}")


def test_the_imports_of_a_module_are_found_wherever_they_stand():
    source = """
import a.b, c as d
from e.f import g
if TYPE_CHECKING:
    from h import i
def function():
    import j
"""
    assert set(imports_of(source)) == {"a.b", "c", "e.f.g", "h.i", "j"}
    source = "from jpaged.models.config import A\nfrom jpaged.host import b\nfrom jpaged import c"
    assert set(imported_folders(source)) == {"models", "jpaged/host", "jpaged"}


def test_there_is_something_to_check():
    assert {folder_of(path.relative_to(ROOT)) for path in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_downward(path):
    folder = folder_of(path.relative_to(ROOT))
    found = set(imported_folders(path.read_text(encoding="utf-8")))
    assert found <= {folder, *MAY_IMPORT[folder]}


def test_the_host_needs_no_jax():
    names = [
        "jpaged",
        *(f"jpaged.{path.stem}" for path in (ROOT / "jpaged").glob("*.py") if path.stem == "cli"),
        *(
            ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for room in ("host", "telemetry", "simulation")
            for path in sorted((ROOT / "jpaged" / room).rglob("*.py"))
        ),
    ]
    assert len(names) > 15
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    found = [m for m in ("jax", "jaxlib", "flax", "tokenizers") if m in sys.modules]
    assert not found, f"{{name}} imports {{found}}"
from jpaged import SamplingParams
assert "jax" not in sys.modules, "SamplingParams imports jax"
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


def module_of(path):
    """The name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "jpaged" else ("jpaged", *parts))


def test_no_module_imports_itself_through_others():
    sources = {module_of(path): path.read_text(encoding="utf-8") for path in FILES}
    graph = {}
    for module, source in sources.items():
        # Of "from a.b import c", c is a module or something that a.b has.
        names = ((name, name.rpartition(".")[0]) for name in imports_of(source))
        found = (next((n for n in pair if n in sources), None) for pair in names)
        graph[module] = {name for name in found if name} - {module}
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")
    assert len(order) == len(sources)


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
