# SPDX-License-Identifier: Apache-2.0
"""What README.md says is so: its snippet runs, its tree is the tree, its commands exist."""

import fnmatch
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith(("length ", "stop "))]) == 4
    assert lines[-1].endswith("% of the used pages' cells held a token")


def test_tree_lists_every_module():
    (tree,) = re.findall(r"## Tree\n\n```\n(.*?)```", README, re.DOTALL)
    listed: dict[str, list[str]] = {}
    package = ""
    for line in tree.splitlines():
        if not line.startswith(" "):
            package = line.split()[0].rstrip("/")
        else:
            listed.setdefault(package, []).append(line.split()[0])
    for package in ("pallas_kernels", "models", "jpaged", "scripts"):
        modules = {p.name for p in (ROOT / package).glob("*.py")} - {"__init__.py"}
        unlisted = {m for m in modules if not any(fnmatch.fnmatch(m, p) for p in listed[package])}
        assert not unlisted, f"{package}: {unlisted}"
        for pattern in listed[package]:
            assert list((ROOT / package).glob(pattern.rstrip("/"))), f"{package}/{pattern} is gone"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_scripts_and_flags_exist():
    for script, arguments in re.findall(r"python -m (scripts\.\w+)(.*)", README):
        source = subprocess.run(
            [sys.executable, "-m", script, "--helpfull"],
            cwd=ROOT, capture_output=True, text=True, timeout=120,
        ).stdout  # fmt: skip
        for flag in re.findall(r"--(\w+)", arguments):
            assert f"--{flag}" in source or f"--[no]{flag}" in source, f"{script} --{flag}"


def test_the_tree_search_runs():
    text = (ROOT / "docs" / "tree_search.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    saved = int(done.stdout.splitlines()[-1].partition("%")[0])
    assert 10 <= saved < 100
    body = [line for line in code.splitlines() if line.strip()]
    assert len(body) <= 36


def test_the_tested_versions_are_those_of_the_constraints():
    flat = " ".join(README.split())
    for name, python in (("py311.txt", "3.11"), ("py313.txt", "3.13")):
        pins = (ROOT / "constraints" / name).read_text(encoding="utf-8")
        jax = re.search(r"^jax==(\S+)$", pins, re.MULTILINE)
        assert jax and f"Python {python} and jax {jax[1]}" in flat
    others = re.findall(r"^(flax|orbax-checkpoint)==(\S+)$", pins, re.MULTILINE)
    assert f"with {' and '.join(f'{name} {version}' for name, version in others)} (" in flat
