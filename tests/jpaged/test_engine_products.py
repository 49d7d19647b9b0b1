# SPDX-License-Identifier: Apache-2.0
"""The engine with products by CPU kernels: the answers that it has with XLA's."""

import dataclasses

import pytest

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.models.layers import linear
from jpaged.pallas_kernels.cpu import products
from jpaged.pallas_kernels.cpu.chip import host_chip
from tests import tolerances
from tests.jpaged.exact import everything
from tests.jpaged.tiny import TINY, prompts_of, tiny_engine, token_ids

pytestmark = pytest.mark.skipif(host_chip() is None, reason="no kernels for this processor")

LENGTHS = (1, 2, 9, 16, 17, 33, 40, 5, 70)
GREEDY = SamplingParams(max_tokens=20, temperature=0, logprobs=2, ignore_eos=True)


def tiny(**config):
    return tiny_engine(**config)


def demo(**config):
    return Engine.load("demo", EngineConfig(max_model_len=128, max_num_seqs=8, **config))


# The tiny model's weights are 12 times as large as usual, and what rounding does grows with each.
TOLERANCE = {tiny: 100 * tolerances.LOGPROB, demo: tolerances.LOGPROB}


@pytest.fixture
def calls(monkeypatch):
    """Of the kernel, by the tokens that they are traced for."""
    linear.clear_cache()  # which is traced once for all engines
    found, product = [], products.product

    def counted(x, weight):
        found.append(x.shape[0])
        return product(x, weight)

    monkeypatch.setattr(products, "product", counted)
    yield found


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("make", [tiny, demo])
def test_answers_are_those_with_xlas_products(make, scan_layers):
    prompts = prompts_of(LENGTHS)
    want, got = (
        make(backend=backend, scan_layers=scan_layers).generate(prompts, GREEDY)
        for backend in ("xla", "cpu")
    )
    assert token_ids(got) == token_ids(want)
    assert everything(got) != everything(want)  # other sums, of other kernels
    for ours, theirs in zip(got, want, strict=True):
        for mine, other in zip(ours.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True):
            for token, logprob in other.items():
                assert mine[token] == pytest.approx(logprob, abs=TOLERANCE[make])


def test_steps_of_many_tokens_are_xlas(calls):
    """A prompt too long for the kernel, and the steps after it, in one engine."""
    config = dict(
        model_config=dataclasses.replace(TINY, max_position_embeddings=2240),
        max_model_len=2240,
        max_num_batched_tokens=4096,
        num_pages=300,
    )
    (prompt,) = prompts_of([2200])
    want, got = (
        token_ids(tiny_engine(backend=backend, **config).generate([prompt], GREEDY))
        for backend in ("xla", "cpu")
    )
    assert got == want
    assert calls and max(calls) * TINY.hidden_size <= products.MOST_NUMBERS


@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_a_deterministic_engine_is_exact_to_the_bit(backend):
    """Alone, in a crowd and under preemption: one shape of steps, of products by kernels or not."""
    prompts = prompts_of(LENGTHS)
    shape = dict(max_num_seqs=6, max_num_batched_tokens=16, deterministic=True, backend=backend)
    alone = tiny_engine(**shape)
    want = everything([alone.generate([prompt], GREEDY)[0] for prompt in prompts])
    for config in ({}, dict(num_pages=14, page_size=8), dict(scan_layers=True)):
        engine = tiny_engine(**shape | config)
        assert everything(engine.generate(prompts, GREEDY)) == want
