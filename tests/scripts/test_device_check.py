# SPDX-License-Identifier: Apache-2.0
"""device_check.sh, as far as that goes without a GPU."""

import json
import os
import shlex
import subprocess
import sys

from tests.scripts.programs import ROOT

# Answers for a GPU: what the parts call, in the order in which it looks.
STUB = """#!/usr/bin/env bash
case "$*" in
  *device.platform*) exit 0 ;;
  *"-m pytest "*)
    for word in "$@"; do
      case "$word" in --junit-xml=*) xml="${word#*=}" ;; esac
    done
    counts='tests="3" failures="0" errors="0" skipped="SKIPPED"'
    echo "<testsuites><testsuite $counts/></testsuites>" >"$xml"
    ;;
  *"jpaged conformance "*bfloat16) echo '{"passed": 5, "failed": 1, "refused": 2}'; exit 1 ;;
  *"jpaged conformance "*) sleep 60 ;;
  *"jpaged generate "*)
    echo '{"outputs": [{"text": "a b c d e f", "token_ids": [1, 2]}]}'
    echo '{"outputs": [{"text": "g h i j k l", "token_ids": [3]}]}'
    ;;
  *"jpaged benchmark "*) echo '{"runs": {"paged": {"output_tokens_per_s": 7.5}}}' ;;
  *"scripts.kernels.device_figures "*)
    for word in "$@"; do
      case "$word" in --output_dir=*) to="${word#*=}/figures.json" ;; esac
    done
    echo '{"targets": {"speed": {"value": 2, "target": ">= 1", "reached": true}}}' >"$to"
    echo "$*"
    ;;
  *"scripts.measure.benchmark_host"*) echo '{"total_us": 250.0}' ;;
  *) exec PYTHON "$@" ;;
esac
"""


class TestDeviceCheck:
    def _run(self, out, *parts, **env):
        return subprocess.run(
            ["bash", str(ROOT / "scripts" / "device_check.sh"), *parts],
            cwd=out,
            capture_output=True,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable, **env},
            timeout=120,
        )

    def _stub(self, tmp_path, skipped):
        stub = tmp_path / "python"
        text = STUB.replace("SKIPPED", str(skipped)).replace("PYTHON", shlex.quote(sys.executable))
        stub.write_text(text, encoding="utf-8")
        stub.chmod(0o755)
        out = tmp_path / "out"
        out.mkdir()
        return {"PYTHON": str(stub), "OUT": str(out)}, out

    def test_without_a_gpu_it_says_so_and_writes_nothing(self, tmp_path):
        before = sorted(ROOT.iterdir())
        for env in ({}, {"OUT": str(tmp_path)}):
            done = self._run(tmp_path, **env)
            assert done.returncode == 2
            assert "device_check: jax sees no GPU (JAX_PLATFORMS=cpu)" in done.stderr
            assert done.stderr.count("\n") == 1 and done.stdout == ""
        assert list(tmp_path.iterdir()) == []
        assert sorted(ROOT.iterdir()) == before

    def test_bad_usage_is_one_line(self, tmp_path):
        for parts, env, message in (
            (["tests", "speed"], {}, "no part is called speed; choose among conformance_bfloat16 "),
            ([], {"PYTHON": "/nowhere/python"}, "there is no /nowhere/python"),
            ([], {"DEVICE_CHECK_S": "soon"}, "DEVICE_CHECK_S=soon is no number"),
        ):
            done = self._run(tmp_path, *parts, **env)
            assert done.returncode == 2
            assert message in done.stderr and done.stderr.count("\n") == 1

    def test_each_part_is_run_and_summed_up(self, tmp_path):
        env, out = self._stub(tmp_path, skipped=1)
        parts = ["tests", "conformance_bfloat16", "engine"]
        done = self._run(tmp_path, *parts, **env)
        assert done.returncode == 1, done.stderr
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        assert summary["passed"] is False
        environment, tests, conformance, engine = summary["parts"]
        assert [part["part"] for part in summary["parts"]] == ["environment", *parts]
        assert environment["status"] == "passed"
        assert tests["status"] == "passed"
        assert tests["figures"] == {"tests": 3, "failures": 0, "errors": 0, "skipped": 1}
        assert conformance["status"] == "failed"
        assert conformance["figures"] == {"passed": 5, "failed": 1, "refused": 2}
        assert engine["status"] == "passed"
        assert engine["figures"]["output_tokens_per_s"] == 7.5
        assert engine["figures"]["host_us_per_step"] == 250.0
        assert engine["figures"]["greedy_equals_xla"] is True
        written = {path.name for path in out.iterdir()}
        assert written == {
            "summary.json",
            "environment.json",
            "tests.xml",
            "conformance_bfloat16.json",
            "engine.json",
            "log.txt",
        }
        assert "conformance_bfloat16   failed" in done.stdout

    def test_figures_have_eight_minutes_and_say_what_is_reached(self, tmp_path):
        env, out = self._stub(tmp_path, skipped=0)
        done = self._run(tmp_path, "figures", TRANSFORMERS_PYTHON="/peer/python", **env)
        assert done.returncode == 0, done.stderr
        _, figures = json.loads((out / "summary.json").read_text("utf-8"))["parts"]
        assert figures["figures"] == {"speed": "2 (>= 1, reached: True)"}
        log = (out / "log.txt").read_text("utf-8")
        assert "--transformers_python=/peer/python" in log
        budget_s = int(log.partition("--budget_s=")[2].split()[0])
        assert 440 < budget_s <= 470

    def test_a_part_ends_when_its_time_is_over_and_skipped_tests_are_no_pass(self, tmp_path):
        env, out = self._stub(tmp_path, skipped=3)
        done = self._run(tmp_path, "conformance_float32", "tests", DEVICE_CHECK_S="12", **env)
        assert done.returncode == 1, done.stderr
        _, conformance, tests = json.loads((out / "summary.json").read_text("utf-8"))["parts"]
        assert conformance["status"] == "timeout" and conformance["seconds"] <= 10
        assert (tests["status"], tests["detail"]) == ("failed", "no test ran")
