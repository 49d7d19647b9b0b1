# SPDX-License-Identifier: Apache-2.0
"""The engine on TPU kernels, interpreted: the same tokens as on the XLA kernels."""

import pathlib

import pytest

import models
from jpaged import Engine, EngineConfig, SamplingParams
from pallas_kernels.conformance import interpret_tpu

DEMO = pathlib.Path(models.__file__).parent / "demo"
# Small enough that prompts are cut into chunks, samples copy pages, and one is preempted.
SETTINGS = {
    "page_size": 8,
    "num_pages": 6,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 12,
    "max_model_len": 40,
}
PROMPTS = ["Once upon a time there was a little girl", "The old fisherman"]


def generate(backend):
    engine = Engine.load(DEMO, EngineConfig(backend=backend, scan_layers=True, **SETTINGS))
    params = [
        SamplingParams(max_tokens=8, temperature=0, logprobs=1, ignore_eos=True),
        SamplingParams(max_tokens=8, temperature=0.8, n=3, seed=5, logprobs=1, ignore_eos=True),
    ]
    outputs = engine.generate(PROMPTS, params)
    engine.check_invariants()
    return outputs, engine.stats()


@pytest.mark.slow
def test_interpreted_tpu_kernels_give_the_tokens_of_the_xla_kernels():
    want, _ = generate("xla")
    with interpret_tpu():
        got, stats = generate("tpu")
    for ours, theirs in zip(got, want, strict=True):
        for a, b in zip(ours.outputs, theirs.outputs, strict=True):
            assert a.token_ids == b.token_ids and a.text == b.text
            assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-3)
    assert stats.totals.num_preemptions > 0 and stats.totals.num_page_copies > 0, stats


def test_tpu_kernels_are_refused_where_there_is_no_tpu():
    with pytest.raises(ValueError, match="backend 'tpu' on platform 'cpu': its kernels run on TPU"):
        Engine.load(DEMO, EngineConfig(backend="tpu", **SETTINGS))
