# SPDX-License-Identifier: Apache-2.0
"""What log-probabilities of generated tokens are of, beside a dense model's in float64."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from jpaged import SamplingParams
from jpaged.device import sampling
from jpaged.device.step_result import StepResult
from jpaged.host.params import LogprobsMode
from tests.jpaged.test_sampling import make_rows
from tests.jpaged.test_scores import ONE_SHAPE, ROUNDING, dense_logits, dense_logprobs
from tests.jpaged.tiny import TINY, prompts_of, tiny_engine, token_ids

MODES = [mode.value for mode in LogprobsMode]
CHANGES = {
    "logit_bias": {5: 3.0, 9: -4.0, 12: 2.5}, "repetition_penalty": 1.3, "presence_penalty": 0.7,
    "frequency_penalty": 0.4, "suppress_tokens": (3, 4),
}  # fmt: skip
FILTERS = {"top_k": 9, "top_p": 0.93, "min_p": 0.01}


def processed(logits, params, prompt, answer):
    """f64[vocab_size]: what `SamplingParams` says of biases, penalties and forbidden tokens."""
    logits = logits.copy()
    for token, bias in params.logit_bias:
        logits[token] += bias
    seen = sorted({*prompt, *answer})
    penalty = params.repetition_penalty or 1.0
    own = logits[seen]
    logits[seen] = np.where(own < 0, own * penalty, own / penalty)
    for token in set(answer):
        logits[token] -= params.frequency_penalty * answer.count(token) + params.presence_penalty
    logits[list(params.suppress_tokens or ())] = -math.inf
    return logits


def filtered(logits, params):
    """f64[vocab_size]: what top_k, top_p and min_p leave, by sorting; the others are -inf."""
    order = np.argsort(-logits, kind="stable")
    kept = order[: params.top_k or len(order)]
    probs = np.exp(logits[kept] - logits[kept].max())
    probs /= probs.sum()
    count = int((np.cumsum(probs) < (params.top_p or 1.0)).sum()) + 1
    kept, probs = kept[:count], probs[:count]
    kept = kept[probs >= probs[0] * (params.min_p or 0.0)]
    left = np.full_like(logits, -math.inf)
    left[kept] = logits[kept]
    return left


def normalised(logits):
    peak = logits.max()
    return logits - peak - np.log(np.exp(logits - peak).sum())


def want_of(params, prompt, answer, at):
    """f64[vocab_size] of the answer's token `at`, by the mode."""
    model = dense_logits([*prompt, *answer])[len(prompt) + at - 1]
    if params.logprobs_mode == "raw":
        return normalised(model)
    logits = processed(model, params, prompt, answer[:at]) / (params.temperature or 1.0)
    if params.logprobs_mode == "filters" and params.temperature:
        logits = filtered(logits, params)
    return normalised(logits)


def hold(output, params):
    for sample in output.outputs:
        assert len(sample.logprobs) == len(sample.token_ids)
        for at, (token, found) in enumerate(zip(sample.token_ids, sample.logprobs, strict=True)):
            want = want_of(params, output.prompt_token_ids, sample.token_ids, at)
            finite = int(np.isfinite(want).sum())
            likeliest = np.argsort(-want, kind="stable")[: min(params.logprobs, finite)]
            assert list(found) == list(dict.fromkeys([token, *likeliest.tolist()]))
            np.testing.assert_allclose(list(found.values()), want[list(found)], atol=ROUNDING)
        model = dataclasses.replace(params, logprobs_mode="raw")
        raw = [
            want_of(model, output.prompt_token_ids, sample.token_ids, at)[token]
            for at, token in enumerate(sample.token_ids)
        ]
        np.testing.assert_allclose(sample.cumulative_logprob, sum(raw), atol=ROUNDING)


def params_of(mode, **own):
    given = {"max_tokens": 9, "seed": 3, "logprobs": 4, "ignore_eos": True, "temperature": 7.0}
    return SamplingParams(**given | {"logprobs_mode": mode} | own)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "own", [{}, FILTERS, CHANGES, {**CHANGES, **FILTERS}, {"temperature": 0, **CHANGES, **FILTERS}]
)
def test_they_are_a_dense_models(mode, own):
    engine = tiny_engine(max_num_seqs=4, max_num_batched_tokens=16, **ONE_SHAPE)
    params = params_of(mode, **own)
    for output in engine.generate(prompts_of([5, 19], seed=8), params):
        hold(output, params)
    engine.check_invariants()


def test_each_request_has_its_own_whatever_runs_beside_it():
    """Under chunks and preemption, beside scores and beams, to the last bit."""
    prompts = prompts_of([9, 17, 6, 25, 11, 8], seed=3)
    every = [
        params_of("filters", n=2, prompt_logprobs=2, **FILTERS),
        params_of("raw", **FILTERS),
        params_of("temperature", logprobs=0, **CHANGES),
        SamplingParams(max_tokens=9, beam_width=3, n=3, logprobs=2),
        params_of("raw", logprobs=7, **CHANGES),
        params_of("filters", temperature=0, **CHANGES),
    ]
    settings = {"max_num_seqs": 5, "max_num_batched_tokens": 16, "num_pages": 17} | ONE_SHAPE
    alone = tiny_engine(**settings)
    expected = [alone.generate([p], own)[0] for p, own in zip(prompts, every, strict=True)]
    crowd = tiny_engine(**settings)
    outputs = crowd.generate(prompts, every)
    assert crowd.stats().totals.num_preemptions > 0
    for output, other, own in zip(outputs, expected, every, strict=True):
        assert [o.logprobs for o in output.outputs] == [o.logprobs for o in other.outputs]
        assert output.prompt_logprobs == other.prompt_logprobs
        if own.beam_width is None:
            hold(output, own)
    prompt = prompts[0]
    found = outputs[0].prompt_logprobs[1:]
    want = dense_logprobs(prompt)[np.arange(len(prompt) - 1), prompt[1:]]
    own = [each[token] for each, token in zip(found, prompt[1:], strict=True)]
    np.testing.assert_allclose(own, want, atol=ROUNDING)


def test_no_burst_hides_them():
    prompts = prompts_of([5, 9], seed=2)
    steps = {"decode_steps": 4, "max_num_seqs": 4, "max_model_len": 64, "page_size": 4}
    for params in (params_of("filters", logprobs=0, **FILTERS), params_of("temperature")):
        engine = tiny_engine(**steps)
        outputs = engine.generate(prompts, params)
        for output in outputs:
            hold(output, params)
        plain = dataclasses.replace(params, logprobs=None)
        engine.reset_stats()
        assert token_ids(engine.generate(prompts, plain)) == token_ids(outputs)
        totals = engine.stats().totals
        assert totals.num_dispatches < totals.num_steps  # who asks for none has bursts


def test_what_nobody_asks_for_is_not_compiled():
    engine = tiny_engine(max_num_seqs=2, **ONE_SHAPE)
    ran = engine._runner.programs.ran
    engine.generate(prompts_of([5]), params_of("filters", logprobs=None))
    engine.generate(prompts_of([5]), params_of("raw"))
    assert not [key for key in ran if isinstance(key, tuple) and "modes" in key]
    engine = tiny_engine(max_num_seqs=2, **ONE_SHAPE)
    engine.generate(prompts_of([5]), params_of("filters"))
    ran = engine._runner.programs.ran
    assert (2, "modes", 16) in ran and (2, 16) not in ran


def test_what_nobody_wants_of_a_program_is_left_out_before_it_becomes_pythons():
    top = np.arange(32).reshape(2, 16), np.zeros((2, 16), np.float32)
    one = np.zeros(2, np.float32)
    result = StepResult(np.zeros(2, int), one, (*top, 3), [], 2, modes=((one, *top), [1], 5))
    (outcome,) = result.outcomes()
    assert [list(found) for found in outcome.likeliest] == [[0, 1, 2], [16, 17, 18, 19, 20]]


def test_a_compile_plan_may_have_them():
    engine = tiny_engine(strict_shapes=True, max_num_seqs=2, **ONE_SHAPE)
    params = params_of("filters", **FILTERS)
    with pytest.raises(ValueError, match="logprobs=4, logprobs_mode='filters' needs programs"):
        engine.generate(prompts_of([5]), params)
    engine.warm_up(params=[params])
    (output,) = engine.generate(prompts_of([5]), params)
    hold(output, params)
    assert engine.stats().num_unplanned_compilations == 0


def test_forks_and_what_resumes_go_on_with_them():
    params = params_of("filters", **FILTERS)
    engine = tiny_engine(max_num_seqs=4, **ONE_SHAPE)
    (prompt,) = prompts_of([6], seed=5)
    (whole,) = engine.generate([prompt], params)
    name = engine.add_request(prompt, params)
    for _ in range(5):
        engine.step()
    (child,) = engine.fork(name)
    with pytest.raises(ValueError, match="logprobs_mode='raw' must be 'filters', as of the tokens"):
        engine.fork(name, params=params_of("raw"))
    progress = json.loads(json.dumps([dataclasses.asdict(own) for own in engine.progress(name)]))
    assert progress[0]["logprobs"]
    resumed = engine.progress(name)
    engine.abort(name)
    again = engine.add_request(prompt, params, resume=resumed)
    outputs = {}
    while engine.has_unfinished_requests:
        outputs |= {output.request_id: output for output in engine.step()}
    assert outputs[again].outputs[0].logprobs == whole.outputs[0].logprobs
    hold(outputs[child], params)


def test_what_was_drawn_is_never_cut_off():
    """However a program rounds at a filter's edge: a token of two that are alike is kept whole."""
    logits = np.array([[2.0, 2.0, 1.0, -3.0]] * 4, np.float32)
    rows = make_rows(4, top_k=1)
    drawn = jax.jit(sampling.drawn_logprobs, static_argnums=4)
    on = np.ones(4, bool)
    own, tokens, values = drawn(logits, np.arange(4, dtype=np.int32), rows, on, 4)
    np.testing.assert_allclose(own[:2], -math.log(2), atol=1e-6)
    both = np.log(np.exp([1.0, -3.0]) / (2 * math.exp(2) + np.exp([1.0, -3.0])))
    np.testing.assert_allclose(own[2:], both, atol=1e-6)
    assert tokens[0].tolist()[:2] == [0, 1] and np.isneginf(values[0, 2:]).all()


@pytest.mark.parametrize("mode", ["temperature", "filters"])
def test_searches_have_the_models_alone(mode):
    with pytest.raises(
        ValueError, match=f"logprobs_mode='{mode}' has no meaning in beam search: leave it at 'raw'"
    ):
        SamplingParams(beam_width=2, logprobs_mode=mode)
    assert SamplingParams(logprobs_mode=LogprobsMode(mode)) == SamplingParams(logprobs_mode=mode)
    assert TINY.vocab_size > 90  # so that filters leave few of many
