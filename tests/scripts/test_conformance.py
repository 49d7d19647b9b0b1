# SPDX-License-Identifier: Apache-2.0
"""scripts/conformance.py as a user runs it."""

import json

import pytest

from tests.scripts.programs import ended


def run(*args):
    return ended("jpaged", "conformance", *args)


@pytest.mark.parametrize("backend", ["xla", "cpu"])
def test_our_own_functions_pass(backend):
    done = run(f"--backend={backend}", "--only=9 query heads")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["passed"], report["failed"], report["refused"]) == (3, 0, 0)
    assert {r["function"] for r in report["results"]} == {
        "paged_attention",
        "write_kv",
        "copy_pages",
    }


def test_interpreted_gpu_kernels_in_16_bits():
    only = "--only=decode, page_size 16"
    done = run("--backend=gpu", "--interpret", "--gpu=a100", "--dtype=bfloat16", only)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert [result["status"] for result in results] == ["passed"] * 3


def test_a_stranger_that_fails():
    fault = "tests.pallas_kernels.test_conformance:widens_the_window"
    done = run(f"--paged_attention={fault}", "--only=sliding_window 16")
    assert done.returncode == 1, done.stderr
    (result,) = json.loads(done.stdout.splitlines()[-1])["results"]
    assert result["status"] == "failed" and "numbers are wrong" in result["detail"]
    assert result["detail"] in done.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only=nothing"], "--only='nothing' is in no case's name"),
        (["--write_kv=no_such_module:f"], "--write_kv='no_such_module:f' must be an importable"),
        (["--write_kv=math:pi"], "is a float, no function"),
        (["--write_kv=json:dumps", "--backend=xla"], "leave it out"),
        (["x"], "unexpected arguments"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, message):
    done = run(*args)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
