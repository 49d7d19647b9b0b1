# SPDX-License-Identifier: Apache-2.0
"""device_figures.py, as far as that goes without a GPU."""

import dataclasses
import json
import types

import pytest
from absl.testing import flagsaver

from jpaged.measure import profile, rates, runs
from jpaged.scripts.kernels import device_figures
from jpaged.scripts.kernels.device_figures import PARTS, measure_steps, size_of
from jpaged.scripts.kernels.figures import (
    TARGETS,
    Figures,
    kernel_figures,
    targets_of,
    transformers_figures,
)
from tests.scripts.programs import run, run_report


def test_every_target_is_a_figure_of_the_real_size():
    size = size_of(smoke=False)
    decode = [{"case": f"{rows}*1@4096", "contenders": {"gpu": _entry(1.0)}} for rows in (1, 8, 64)]
    prefill = {"case": "1*2048@2048", "contenders": {"gpu": _entry(2.0), "cudnn": _entry(1.0)}}
    report = {"config": {"backends": ["gpu"]}, "results": [*decode, prefill]}
    lines = [{"cache": "static", "rows": 64, "tokens_per_s": 100.0}]
    steps = {f"step_over_floor_{rows}": 1.0 for rows in size.rows}
    steps |= {"tokens_per_s_64": 250.0, "prefill_over_product_rate": 0.5}
    figures = steps | kernel_figures(report) | transformers_figures(lines, steps)
    found = targets_of(figures)
    assert all(own["value"] is not None for own in found.values())
    assert found["speedup_over_static_64"] == {"value": 2.5, "target": ">= 3", "reached": False}
    assert found["prefill_attention_over_cudnn"]["value"] == 0.5
    assert found["prefill_over_product_rate"]["reached"] is True
    assert found["step_over_floor_1"]["reached"] is True
    assert figures["prefill_attention_us_cudnn"] == 1.0


def _entry(us):
    return {"status": "ok", "call_us": us, "copy_ratio": 0.9}


def test_what_a_contender_lacks_is_missing():
    refused = {"status": "refused", "reason": "no"}
    results = [{"case": "8*1@4096", "contenders": {"gpu": refused, "cudnn": _entry(1.0)}}]
    found = kernel_figures({"config": {"backends": ["gpu"]}, "results": results})
    assert found == {"attention_us_8_cudnn": 1.0}
    assert {own["reached"] for own in targets_of(found).values()} == {None}


def test_figures_are_kept_as_they_come(tmp_path):
    figures = Figures(tmp_path / "figures.json")
    figures.add("figures", step_over_floor_1=1.5)
    Figures(tmp_path / "figures.json").add("figures", attention_us_1=14.0)
    report = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert report["figures"] == {"step_over_floor_1": 1.5, "attention_us_1": 14.0}
    reached = {name: own["reached"] for name, own in report["targets"].items()}
    assert reached == dict.fromkeys(TARGETS) | {"step_over_floor_1": True, "attention_us_1": False}


@pytest.fixture
def _rates(monkeypatch):
    """A byte a nanosecond, and products so fast that bytes decide."""
    for module in (profile, rates):
        monkeypatch.setattr(module, "copy_rates", lambda: {"1": 1e9})
        monkeypatch.setattr(module, "product_rate", lambda dtype: 1e15)


# Two layers of 4 and 2 heads of 16 at 32 features, three products with 64, norms.
OWN_WEIGHTS = 2 * (32 * 16 * (4 + 2 + 2 + 4) + 3 * 32 * 64 + 2 * 32) + 32


@pytest.mark.usefixtures("_rates")
def test_steps_are_measured_beside_their_floor(tmp_path):
    figures = Figures(tmp_path / "figures.json")
    size = dataclasses.replace(size_of(smoke=True), rows=(2,))
    assert measure_steps(size, tmp_path, figures) is True
    found = figures.read()["figures"]
    # Weights and the tied head, and of both rows 4 + 6 tokens, a page of 16 in two layers each.
    page_bytes = 2 * 16 * 2 * 2 * 16 * 4
    assert found["floor_us_2"] == pytest.approx(
        (4 * (OWN_WEIGHTS + 128 * 32) + 2 * page_bytes) / 1e3
    )
    assert found["step_over_floor_2"] == pytest.approx(found["step_us_2"] / found["floor_us_2"])
    rate = found["prefill_tokens_per_s"] * 2 * OWN_WEIGHTS / 1e15
    assert found["prefill_over_product_rate"] == pytest.approx(rate)
    assert found["programs_per_step_2"] == pytest.approx(2)  # step and sampler
    assert found["device_busy_us_2"] > 0 and found["device_idle_us_2"] >= 0
    assert (tmp_path / "profile_2" / "breakdown.txt").exists()
    assert (tmp_path / "profile_prefill" / "breakdown.txt").exists()


@pytest.mark.usefixtures("_rates")
def test_what_targets_are_about_comes_before_profiles_and_larger_steps(tmp_path, monkeypatch):
    """So that a run that is cut short lacks the least telling."""
    order, add = [], Figures.add

    def noted(self, section, **values):
        order.extend(values)
        add(self, section, **values)

    monkeypatch.setattr(Figures, "add", noted)
    size = dataclasses.replace(size_of(smoke=True), rows=(2, 1, 3))
    measure_steps(size, tmp_path, Figures(tmp_path / "figures.json"))
    told = ("step_over_floor_2", "step_over_floor_1", "prefill_over_product_rate")
    told += ("device_busy_us_2", "device_busy_us_1", "step_over_floor_3", "device_busy_us_3")
    assert [order.index(name) for name in told] == sorted(order.index(name) for name in told)


@pytest.mark.usefixtures("_rates")
def test_what_fails_is_said_and_the_others_are_measured(tmp_path, monkeypatch):
    real, calls = runs.measure, []

    def measure(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("request '0' failed: NaN")
        return real(*args, **options)

    monkeypatch.setattr(runs, "measure", measure)
    figures = Figures(tmp_path / "figures.json")
    assert measure_steps(size_of(smoke=True), tmp_path, figures) is False
    report = figures.read()
    assert report["errors"] == {"decode of 2": "RuntimeError: request '0' failed: NaN"}
    assert "step_over_floor_2" not in report["figures"]
    assert report["figures"].keys() >= {"step_over_floor_1", "device_busy_us_2"}


class TestParts:
    """What each has of the time, and that a part that hangs leaves others theirs."""

    @pytest.fixture
    def commands(self, monkeypatch):
        """Has programs take all of their time; gives their commands, limits and environments."""
        seen, clock = [], [0.0]

        def ended(command, limit_s, **env):
            clock[0] += limit_s
            seen.append((" ".join(command), limit_s, env))
            return "timeout"

        monkeypatch.setattr(device_figures, "_ended", ended)
        time = types.SimpleNamespace(monotonic=lambda: clock[0])
        monkeypatch.setattr(device_figures, "time", time)
        return seen

    def run_all(self, directory, *flags):
        values = device_figures.flags.FLAGS
        with flagsaver.flagsaver():
            values(["device_figures", f"--output_dir={directory}", *flags])
            with pytest.raises(SystemExit) as end:
                device_figures.main(["device_figures"])
        assert end.value.code == 1

    def test_each_has_its_share_though_all_hang(self, commands, tmp_path):
        self.run_all(tmp_path, "--budget_s=470", "--transformers_python=/peer")
        steps, kernels, peer, narrow, short = commands
        assert steps[1] == pytest.approx(470 * PARTS["steps"])
        assert kernels[1] == pytest.approx(470 * PARTS["kernels"])
        assert peer[1] == pytest.approx(470 * PARTS["transformers"])
        assert narrow[1] == pytest.approx(short[1]) == pytest.approx(470 * PARTS["narrow"] / 2)
        assert sum(limit for _, limit, _ in commands) == pytest.approx(470)
        assert "--part=steps" in steps[0] and "JAX_COMPILATION_CACHE_DIR" in steps[2]
        assert peer[0].startswith("/peer ")
        # In processes of their own: a kernel that ends one leaves the others theirs.
        assert "--backends=gpu-narrow" in narrow[0] and "gpu-narrow" not in kernels[0]
        assert "--head_dim=64" in short[0] and "--backends=gpu,gpu-narrow" in short[0]
        report = json.loads((tmp_path / "figures.json").read_text("utf-8"))
        assert {own["status"] for own in report["parts"].values()} == {"timeout"}

    def test_without_a_peer_others_have_its_time(self, commands, tmp_path):
        self.run_all(tmp_path, "--budget_s=380")
        assert commands[0][1] == pytest.approx(380 * PARTS["steps"] / (1 - PARTS["transformers"]))
        assert sum(limit for _, limit, _ in commands) == pytest.approx(380)

    def test_figures_of_a_run_before_are_not_this_ones(self, commands, tmp_path):
        (tmp_path / "kernels.json").write_text("{}")
        self.run_all(tmp_path, "--parts=kernels")
        assert not (tmp_path / "kernels.json").exists()


def test_a_second_report_has_names_of_its_own():
    results = [{"case": "64*1@300", "contenders": {"gpu": _entry(3.0), "gpu-narrow": _entry(2.0)}}]
    report = {"config": {"backends": ["gpu", "gpu-narrow"]}, "results": results}
    assert kernel_figures(report, "_short") == {
        "attention_us_64_short": 3.0,
        "attention_us_64_short_gpu-narrow": 2.0,
        "attention_copy_ratio_64_short": 0.9,
    }


def test_a_program_that_takes_too_long_is_stopped():
    wait = ["sleep", "60"]
    assert device_figures._ended(wait, 0.1) == "timeout"
    assert device_figures._ended(["/nowhere/python"], 1) == "failed"
    assert device_figures._ended(["true"], 5) == "passed"


@pytest.mark.slow
@pytest.mark.nightly
def test_the_rehearsal(tmp_path):
    program = "jpaged.scripts.kernels.device_figures", "--smoke", f"--output_dir={tmp_path}"
    report = run_report(*program)
    assert report == json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert {name: own["status"] for name, own in report["parts"].items()} == {
        "steps": "passed",
        "kernels": "passed",
        "narrow": "passed",
    }
    assert report["figures"].keys() >= {"step_over_floor_1", "attention_us_1", "tokens_per_s_2"}
    assert report["figures"].keys() >= {"device_busy_us_1", "attention_us_1_short"}
    (tmp_path / "file").write_text("")
    said = run(*program[:2], f"--output_dir={tmp_path / 'file'}", code=2)
    assert "file: File exists" in said and said.count("\n") == 1
