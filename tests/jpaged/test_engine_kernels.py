# SPDX-License-Identifier: Apache-2.0
"""The engine on TPU and GPU kernels, interpreted: the same tokens as on the XLA kernels."""

import functools
import pathlib

import pytest

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.pallas_kernels import versions
from jpaged.pallas_kernels.conformance import interpret_gpu, interpret_tpu

# Two layers: each operation of a kernel is interpreted by itself.
MODEL = pathlib.Path(__file__).parent.parent / "fixtures" / "hf" / "llama3_rope_hd80_tied"
# Small enough that prompts are cut into chunks, samples copy pages, and one is preempted.
SETTINGS = {
    "page_size": 8,
    "num_pages": 5,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 12,
    "max_model_len": 40,
}
PROMPTS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38], [27, 18, 28, 18]]


KERNELS = {
    "tpu": ("tpu", interpret_tpu, "float32", 1e-3),
    "triton": ("gpu", functools.partial(interpret_gpu, (8, 0)), "float32", 1e-3),
    # Mosaic GPU multiplies 16 bits; sums of 5 tokens' log-probabilities.
    "mosaic": ("gpu", interpret_gpu, "float16", 5e-2),
}


def generate(backend, dtype):
    config = EngineConfig(backend=backend, dtype=dtype, scan_layers=True, **SETTINGS)
    engine = Engine.load(MODEL, config)
    params = [
        SamplingParams(max_tokens=5, temperature=0, logprobs=1, ignore_eos=True),
        SamplingParams(max_tokens=5, temperature=0.8, n=3, seed=5, logprobs=1, ignore_eos=True),
    ]
    outputs = engine.generate(PROMPTS, params)
    engine.check_invariants()
    return outputs, engine.stats()


# Where jax can interpret Mosaic GPU, the suite is run without what is slow.
each_kernel = pytest.mark.parametrize(
    "kernels",
    [
        "mosaic",
        pytest.param("triton", marks=(pytest.mark.slow, pytest.mark.nightly)),
        pytest.param("tpu", marks=(pytest.mark.slow, pytest.mark.nightly)),
    ],
)


def skip_what_cannot_be_interpreted(kernels):
    if kernels == "mosaic" and not versions.interprets_mosaic():
        pytest.skip("jax 0.10 cannot interpret Mosaic GPU's products; jax 0.11 can")


@each_kernel
def test_interpreted_kernels_give_the_tokens_of_the_xla_kernels(kernels):
    skip_what_cannot_be_interpreted(kernels)
    backend, interpret, dtype, tolerance = KERNELS[kernels]
    want, _ = generate("xla", dtype)
    with interpret():
        got, stats = generate(backend, dtype)
    for ours, theirs in zip(got, want, strict=True):
        for a, b in zip(ours.outputs, theirs.outputs, strict=True):
            assert a.token_ids == b.token_ids
            assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=tolerance)
    assert stats.totals.num_preemptions > 0 and stats.totals.num_page_copies > 0, stats


def score(backend, dtype):
    """Of completions in chunks, behind a prompt whose first page they share."""
    config = EngineConfig(backend=backend, dtype=dtype, scan_layers=True, **SETTINGS)
    engine = Engine.load(MODEL, config)
    scores = engine.score(PROMPTS[0], [[5, 6, 7], [9]])
    engine.check_invariants()
    assert engine.stats().totals.num_hit_tokens >= 8
    return scores


@each_kernel
def test_interpreted_kernels_give_the_scores_of_the_xla_kernels(kernels):
    skip_what_cannot_be_interpreted(kernels)
    backend, interpret, dtype, tolerance = KERNELS[kernels]
    want = score("xla", dtype)
    with interpret():
        got = score(backend, dtype)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.token_ids == theirs.token_ids and ours.is_greedy == theirs.is_greedy
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=tolerance)


@pytest.mark.parametrize(("backend", "devices"), [("tpu", "TPUs"), ("gpu", "NVIDIA GPUs")])
def test_kernels_are_refused_where_there_is_no_such_device(backend, devices):
    message = f"backend '{backend}' on platform 'cpu': its kernels run on {devices} only"
    with pytest.raises(ValueError, match=message):
        Engine.load(MODEL, EngineConfig(backend=backend, **SETTINGS))
