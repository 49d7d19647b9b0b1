# SPDX-License-Identifier: Apache-2.0
"""What README.md says is so: its snippet runs, its tree is the tree, its commands exist."""

import re
import subprocess
import sys

from tests.scripts.programs import ROOT, ended, environment

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith(("length ", "stop "))]) == 4
    assert lines[-1].endswith("% of the used pages' cells held a token")


def test_tree_lists_every_module():
    """A heading of the tree is a folder; what is below it, comma by comma, lies in that folder."""
    (tree,) = re.findall(r"## Tree\n\n```\n(.*?)```", README, re.DOTALL)
    listed, folder = set(), ""
    for line in tree.splitlines():
        names = re.match(r" *([^\s,]+(?:, [^\s,]+)*)", line)[1].split(", ")
        if line.startswith(" "):
            listed |= {f"{folder}{name}" for name in names}
        else:
            folder = names[0]
            assert all((ROOT / name).exists() for name in names), line
    gone = {name for name in listed if not (ROOT / name).exists()}
    assert not gone
    modules = {
        path.relative_to(ROOT).as_posix()
        for floor in ("pallas_kernels", "models", "jpaged", "scripts")
        for path in (ROOT / floor).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert modules <= listed, modules - listed


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_programs_and_flags_exist():
    commands = re.findall(r"(?:[`/]|-m )(jpaged|scripts[\w.]+)((?:\\\n|[^`\n])*)", README)
    flags: dict[tuple[str, ...], set[str]] = {}
    for module, arguments in commands:
        program = (module,)
        if module == "jpaged":
            name = re.match(r" (\w+)", arguments)
            if name is None:
                continue
            program = (module, name[1])
        flags.setdefault(program, set()).update(re.findall(r"--(\w+)", arguments))
    assert ("jpaged", "generate") in flags and ("scripts.measure.benchmark_host",) in flags
    for program, names in flags.items():
        shown = ended(*program, "--helpfull").stdout
        assert "--[no]helpfull" in shown, program
        for name in names:
            assert f"--{name}" in shown or f"--[no]{name}" in shown, f"{program} --{name}"


def test_the_tree_search_runs():
    text = (ROOT / "docs" / "tree_search.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
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
