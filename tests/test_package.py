# SPDX-License-Identifier: Apache-2.0
"""What is installed: one package and one command, beside whatever a user's project is called."""

import ast
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile

import pytest

import jpaged
from jpaged import cli
from tests.scripts.programs import environment

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLOORS = ("jpaged", "models", "pallas_kernels", "scripts")
# Folders of the repository that are for whoever works on it.
NOT_INSTALLED = {
    *("scripts/demo", "scripts/fixtures", "scripts/kernels"),
    *("scripts/measure", "scripts/measure/peers"),
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built of a copy, as building leaves files behind."""
    source = tmp_path_factory.mktemp("source")
    for name in FLOORS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "."],
        cwd=source, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = source.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def project(wheel, tmp_path_factory):
    """A user's project, with packages that are called like ours, and an environment of its own."""
    project = tmp_path_factory.mktemp("project")
    subprocess.run([sys.executable, "-m", "venv", project / "env"], check=True, timeout=120)
    python = project / "env" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel],
        check=True, timeout=120,
    )  # fmt: skip
    for name in ("models", "scripts"):
        (project / name).mkdir()
        (project / name / "__init__.py").write_text("MINE = True\n")
    return project


@pytest.fixture
def run(project):
    def run(*command, **env):
        """Runs a command of the environment; the dependencies are those of this one."""
        path = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        return subprocess.run(
            [project / "env" / "bin" / command[0], *command[1:]],
            cwd=project, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
            env=environment(PYTHONPATH=os.pathsep.join(path), HOME=str(project)) | env,
        )  # fmt: skip

    return run


def test_the_wheel_has_one_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if not name.startswith("jpaged-")}
    assert {name.partition("/")[0] for name in inside} == {"jpaged"}
    ours = {
        path.relative_to(ROOT).as_posix()
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted = {
        name if name.startswith("jpaged/") else f"jpaged/{name}"
        for name in ours
        if str(pathlib.PurePath(name).parent) not in NOT_INSTALLED and not name.endswith(".sh")
    }
    assert inside == wanted
    assert "jpaged/py.typed" in inside and "jpaged/models/demo/config.json" in inside


def test_what_is_installed_needs_nothing_that_is_not():
    """No module of the wheel imports a folder that stays in the repository."""
    left_out = tuple(f"jpaged.{folder.replace('/', '.')}" for folder in NOT_INSTALLED)
    for path in (path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")):
        if path.parent.relative_to(ROOT).as_posix() in NOT_INSTALLED:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith(left_out), f"{path}: {node.module}"


@pytest.mark.slow
def test_it_generates_beside_packages_of_the_same_names(run):
    code = """
import models, scripts, jpaged
from jpaged import Engine, EngineConfig, SamplingParams
assert models.MINE and scripts.MINE and "site-packages" in jpaged.__file__
engine = Engine.load("demo", EngineConfig(num_pages=16, max_num_seqs=2))
print(engine.generate(["Once upon a time"], SamplingParams(max_tokens=4, temperature=0))[0].outputs)
"""
    done = run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert "text=' there was" in done.stdout


@pytest.mark.slow
def test_the_command_generates(run):
    flags = ("--prompt=Once upon a time", "--max_tokens=3", "--temperature=0", "--num_pages=64")
    done = run("jpaged", "generate", *flags, "--output=json", "--compilation_cache_dir=")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["outputs"][0]["token_ids"]) == 3
    done = run("jpaged", "generate", "--temprature=1")
    assert done.returncode == 2
    assert done.stderr.startswith("jpaged generate: ") and "temprature" in done.stderr


def test_the_command_says_what_there_is(run):
    done = run("jpaged", "--help")
    assert done.returncode == 0 and done.stderr == ""
    for name, text in cli.PROGRAMS.items():
        assert f"{name} " in done.stdout and text in done.stdout
    assert run("jpaged").stdout == done.stdout
    assert run("jpaged", "--version").stdout == f"jpaged {jpaged.__version__}\n"
    done = run("jpaged", "genrate")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "jpaged: there is no program 'genrate': choose among generate, batch, chat, score, "
        "convert, calibrate, benchmark, conformance, plan, warmup, simulate, view\n"
    )


def test_programs_are_imported_without_looking_for_garbage_and_run_with_it():
    code = """if True:
        import atexit, gc, sys
        from jpaged import cli
        early = []  # before the program's flags were parsed
        gc.callbacks.append(lambda phase, info: early.append(phase) if not parsed() else None)
        def parsed():
            return "absl.flags" in sys.modules and sys.modules["absl.flags"].FLAGS.is_parsed()
        atexit.register(lambda: print(early, gc.isenabled(), gc.get_freeze_count() > 10_000))
        sys.argv = ["jpaged", "simulate", "--num_requests=2"]
        gc.collect()
        early.clear()
        cli.main()
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[] True True"


def test_help_does_not_wait_for_jax():
    code = (
        "import sys; from jpaged import cli; sys.argv = ['jpaged', '--help']; cli.main();"
        "sys.exit(any(name in sys.modules for name in ('jax', 'numpy', 'absl')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_programs_are_described_as_their_docstrings_begin():
    for name, text in cli.PROGRAMS.items():
        tree = ast.parse((ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8"))
        assert (ast.get_docstring(tree) or "").splitlines()[0] == text


def test_help_of_a_program_shows_its_flags():
    done = subprocess.run(
        [sys.executable, "-m", "jpaged", "simulate", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert cli.PROGRAMS["simulate"] in done.stdout and "--policies" in done.stdout
    assert "\njpaged simulate:\n" in done.stdout


def test_the_metadata_is_whole():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["dynamic"] == ["version"] and project["urls"]
    others = ("beam", "ray", "skypilot", "lm-eval")
    for extra in ("cuda", "tpu", "train", "plots", "docs", "test", "dev", *others):
        assert project["optional-dependencies"][extra]


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {jpaged.__version__}\n" in text
    assert "\nlicense: Apache-2.0\n" in text
