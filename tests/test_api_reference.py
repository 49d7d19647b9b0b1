# SPDX-License-Identifier: Apache-2.0
"""The API reference that docs/api.py makes from the docstrings."""

import os
import pathlib
import runpy
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
API = ROOT / "docs" / "api.py"


def test_it_is_made_without_a_warning(tmp_path):
    pytest.importorskip("pdoc", reason="the API reference needs pdoc: make docs")
    done = subprocess.run(
        [sys.executable, "-W", "error", API, tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    modules = runpy.run_path(str(API))["MODULES"]
    pages = {path.relative_to(tmp_path).with_suffix("") for path in tmp_path.rglob("*.html")}
    assert pages == {pathlib.Path("index"), *(pathlib.Path(m.replace(".", "/")) for m in modules)}
    front = (tmp_path / "jpaged.html").read_text(encoding="utf-8")
    for name in ("Engine.generate", "SamplingParams", "RequestOutput"):
        assert f'id="{name}"' in front
