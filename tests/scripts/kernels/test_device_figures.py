# SPDX-License-Identifier: Apache-2.0
"""device_figures.py, as far as that goes without a GPU."""

import dataclasses
import json

import pytest

from jpaged.measure import profile
from jpaged.scripts.kernels import device_figures
from jpaged.scripts.kernels.device_figures import (
    TARGETS,
    Figures,
    kernel_figures,
    measure_steps,
    size_of,
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


def test_steps_are_measured_beside_their_floor(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "copy_rates", lambda: {"1": 1e9})
    monkeypatch.setattr(profile, "product_rate", lambda dtype: 1e9)
    figures = Figures(tmp_path / "figures.json")
    size = dataclasses.replace(size_of(smoke=True), rows=(2,))
    measure_steps(size, tmp_path, figures)
    found = figures.read()["figures"]
    assert found["step_over_floor_2"] == pytest.approx(found["step_us_2"] / found["floor_us_2"])
    # Two layers of 4 and 2 heads of 16 at 32 features, and three products with 64.
    own = 2 * (32 * 16 * (4 + 2 + 2 + 4) + 3 * 32 * 64 + 2 * 32) + 32
    rate = found["prefill_tokens_per_s"] * 2 * own / 1e9
    assert found["prefill_over_product_rate"] == pytest.approx(rate)
    assert (tmp_path / "profile_2" / "breakdown.txt").exists()


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
    }
    assert report["figures"].keys() >= {"step_over_floor_1", "attention_us_1", "tokens_per_s_2"}
    (tmp_path / "file").write_text("")
    said = run(*program[:2], f"--output_dir={tmp_path / 'file'}", code=2)
    assert "file: File exists" in said and said.count("\n") == 1
