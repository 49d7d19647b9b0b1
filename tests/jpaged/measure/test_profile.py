# SPDX-License-Identifier: Apache-2.0
"""Profiles of a tiny model on this machine's CPU."""

import json

import jax
import pytest

from jpaged import SamplingParams
from jpaged.measure import profile
from jpaged.measure.profile import Profile, ProfileConfig
from jpaged.profiling import PHASES
from tests.jpaged.tiny import prompts_of, tiny_engine

PARAMS = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(profile, "copy_rates", lambda: {"1": 1e9})
    monkeypatch.setattr(profile, "product_rate", lambda dtype: 1e10)
    return tiny_engine(max_num_seqs=4, deterministic=True, num_pages=64)


def test_a_window_of_decode_steps_is_traced_and_summed_up(engine, tmp_path):
    prompts = prompts_of([5, 9, 3])
    expected = engine.generate(prompts, PARAMS)
    directory = tmp_path / "new" / "one"
    with Profile(engine, ProfileConfig(directory=str(directory), steps=4)) as traced:
        outputs = engine.generate(prompts, PARAMS, on_step=traced.look)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    found = traced.found
    assert found == json.loads((directory / "breakdown.json").read_text("utf-8"))
    assert "x the floor" in (directory / "breakdown.txt").read_text("utf-8")
    assert (found["steps"], found["calls"], found["compilations"]) == (4, 4, 0)
    assert (found["rows_per_step"], found["prefill_tokens_per_step"]) == (3, 0)
    # Each phase is in the trace, and they are within the step.
    assert all(found["host_us"][name]["median"] > 0 for name in PHASES)
    assert sum(found["host_us"][name]["mean"] for name in PHASES) < found["call_us"]["mean"]
    device = found["device"]
    assert device["programs"] == pytest.approx(2)  # step and sampler
    busy = {kind: own["us"] for kind, own in device["by_kind"].items()}
    assert all(busy[kind] > 0 for kind in ("attention", "token write", "sampler", "products"))
    assert sum(busy.values()) == pytest.approx(device["busy_us"])
    assert 0 < device["busy_us"] < found["step_us"]
    # Of two layers, four products each, the head, and no more.
    assert device["by_kind"]["products"]["kernels"] == pytest.approx(9, abs=1)
    names = {own["name"] for own in device["largest"]}
    assert any("layers_*/mlp/" in name for name in names), names


def test_the_first_step_is_in_the_trace_if_asked_and_a_short_run_ends_it(engine, tmp_path):
    config = ProfileConfig(directory=str(tmp_path), steps=100, start="first")
    with Profile(engine, config) as traced:
        engine.generate(prompts_of([5]), SamplingParams(max_tokens=3), on_step=traced.look)
    assert traced.found["compilations"] > 0
    assert 0 < traced.found["steps"] <= 5
    assert traced.found["prefill_tokens_per_step"] * traced.found["steps"] == pytest.approx(5)


def test_a_run_without_such_a_step_leaves_nothing(engine, tmp_path):
    with Profile(engine, ProfileConfig(directory=str(tmp_path))) as traced:
        engine.generate(prompts_of([5]), SamplingParams(max_tokens=1), on_step=traced.look)
    assert traced.found is None
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_ends_the_trace(engine, tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        Profile(engine, ProfileConfig(directory=str(tmp_path), start="first")),
    ):
        raise ZeroDivisionError
    assert not (tmp_path / "breakdown.json").exists()
    jax.profiler.start_trace(str(tmp_path))  # which it would refuse, did the other still run
    jax.profiler.stop_trace()


def test_what_cannot_be_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for settings, message in (
        ({"directory": str(file)}, "cannot be written: File exists; name a directory"),
        ({"directory": str(file / "below")}, "cannot be written: Not a directory"),
        ({"directory": "/proc/nothing"}, "profile=/proc/nothing cannot be written"),
        ({"directory": str(tmp_path), "steps": 0}, "profile_steps=0 must be at least 1"),
        ({"directory": str(tmp_path), "start": "soon"}, "choose among decode, first"),
    ):
        with pytest.raises(ValueError, match=message):
            ProfileConfig(**settings)
