# SPDX-License-Identifier: Apache-2.0
"""What a measured run says, where steps come in bursts and where a request fails."""

import pytest

from jpaged import SamplingParams
from jpaged.measure.machine import CompileClock
from jpaged.measure.runs import measure
from jpaged.simulation.lengths import Uniform
from jpaged.simulation.workload import make_workload
from tests.jpaged.tiny import TINY, tiny_engine

PARAMS = SamplingParams(temperature=0, ignore_eos=True)


def workload(prompt_len=5, output_len=33):
    lengths = Uniform(prompt_len, prompt_len), Uniform(output_len, output_len)
    return make_workload(1, *lengths, max_model_len=64, vocab_size=TINY.vocab_size, seed=0)


@pytest.mark.parametrize("decode_steps", [1, 8])
def test_a_decode_step_is_one_of_the_device_not_a_dispatch(decode_steps):
    engine = tiny_engine(decode_steps=decode_steps, prefix_cache=False)
    report = measure(engine, workload(), PARAMS, CompileClock())
    totals = engine.stats().totals
    # Of 33 tokens the prompt's step draws the first.
    assert totals.num_decode_steps == 32
    assert report["mean_decode_step_s"] == pytest.approx(totals.decode_s / 32)


def test_a_request_that_fails_is_not_measured(monkeypatch):
    engine = tiny_engine(prefix_cache=False)
    monkeypatch.setattr("jpaged.host.reader._is_sound", lambda *_: False)
    with pytest.raises(RuntimeError, match="request '0' failed: "):
        measure(engine, workload(), PARAMS, CompileClock(), warmup=False)


def test_what_the_prefix_cache_finds_is_not_computed_again():
    """The warm-up has the same prompts; less than nothing was said to be computed again."""
    engine = tiny_engine(prefix_cache=True)
    report = measure(engine, workload(prompt_len=40, output_len=3), PARAMS, CompileClock())
    assert engine.stats().totals.num_hit_tokens > 0
    assert report["recomputed_tokens"] == 0
