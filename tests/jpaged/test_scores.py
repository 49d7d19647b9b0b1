# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens, beside a dense model's and transformers'."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.host.scored import ScoredTokens
from jpaged.models.decoder import Decoder
from tests import tolerances
from tests.jpaged.tiny import TINY, prompts_of, tiny_engine, tiny_params, token_ids, windowed

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "hf"
# Tiny's weights are large, so that its logits are up to 100 apart; transformers' models are held to
# tolerances.LOGPROB.
ROUNDING = 5e-3
ONE_SHAPE = {"deterministic": True, "page_size": 4, "max_model_len": 64}


def dense_logits(tokens, config=TINY):
    """f64[num_tokens, vocab_size] of a model without pages."""
    padded = jnp.zeros((1, 80), jnp.int32).at[0, : len(tokens)].set(jnp.array(tokens))
    return np.asarray(_dense(config)(padded)[0, : len(tokens)], np.float64)


def dense_logprobs(tokens, config=TINY):
    """Likewise."""
    logits = dense_logits(tokens, config)
    peak = logits.max(axis=-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))


@functools.cache
def _dense(config):
    return jax.jit(functools.partial(Decoder(config).apply_dense, tiny_params()))


def hold(score, prompt, completion, config=TINY):
    want = dense_logprobs(prompt + completion, config)[len(prompt) - 1 : -1]
    own = want[np.arange(len(completion)), completion]
    np.testing.assert_allclose(score.logprobs, own, atol=ROUNDING)
    np.testing.assert_allclose(score.logprob, own.sum(), atol=ROUNDING)
    assert score.token_ids == completion
    assert score.is_greedy == bool((want.argmax(axis=-1) == completion).all())


def greedy(prompt, count, config=TINY):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(dense_logprobs(tokens, config)[-1].argmax()))
    return tokens[len(prompt) :]


PROMPT = prompts_of([21])[0]
COMPLETIONS = prompts_of([1, 3, 9, 14], seed=1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_seqs": 1, "max_num_batched_tokens": 5},  # a score, or a sample, a step
        {"max_num_seqs": 3, "max_num_batched_tokens": 8, "num_pages": 12},  # one waits for another
        {"max_num_seqs": 2, "max_num_batched_tokens": 64, "prefix_cache": False},
        {"max_num_seqs": 4, "max_num_batched_tokens": 6, "reservation": "max"},
    ],
)
def test_completions_are_scored_as_a_dense_model_has_them(settings):
    engine = tiny_engine(**{"max_num_seqs": 8} | ONE_SHAPE | settings)
    completions = [*COMPLETIONS, greedy(PROMPT, 2)]
    scores = engine.score(PROMPT, completions)
    for score, completion in zip(scores, completions, strict=True):
        hold(score, PROMPT, completion)
    assert [score.is_greedy for score in scores] == [False] * 4 + [True]
    engine.check_invariants()


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_what_is_preempted_goes_on_where_it_was(preemption):
    engine = tiny_engine(
        max_num_seqs=2, max_num_batched_tokens=24, num_pages=14, preemption=preemption, **ONE_SHAPE
    )
    (alone,) = engine.generate([PROMPT[:5]], SamplingParams(max_tokens=40, temperature=0))
    engine.reset_stats()
    name = engine.add_request(PROMPT[:5], SamplingParams(max_tokens=40, temperature=0))
    engine.step()
    completions = prompts_of([14, 16], seed=4)  # a token a step, as the other has a place
    for score, completion in zip(engine.score(PROMPT, completions), completions, strict=True):
        hold(score, PROMPT, completion)
    assert engine.stats().totals.num_preemptions > 0
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    assert [o.request_id for o in outputs] == [name] and token_ids(outputs) == token_ids([alone])
    engine.check_invariants()


def test_a_windows_pages_go_while_tokens_are_scored():
    config = windowed()
    engine = tiny_engine(
        model_config=config, max_num_seqs=3, max_num_batched_tokens=8, num_pages=40, **ONE_SHAPE
    )
    completions = prompts_of([5, 30], seed=2)
    for score, completion in zip(engine.score(PROMPT, completions), completions, strict=True):
        hold(score, PROMPT, completion, config)
    engine.check_invariants()


@pytest.mark.parametrize("settings", [{}, {"reservation": "max"}, {"max_num_batched_tokens": 9}])
def test_what_is_scored_may_have_one_token_more_than_the_model_sees(settings):
    """As many inputs as max_model_len, as lm-evaluation-harness's windows have."""
    engine = tiny_engine(
        max_num_seqs=2, num_pages=40, **ONE_SHAPE | {"deterministic": False} | settings
    )
    prompt, completion = prompts_of([51, 14], seed=6)
    (score,) = engine.score(prompt, [completion])
    hold(score, prompt, completion)
    (score,) = engine.score(prompt[:1], [prompt[1:] + completion])
    hold(score, prompt[:1], prompt[1:] + completion)
    engine.check_invariants()
    message = (
        "request '2': prompt and completion have 66 tokens, more than the 65 that can be scored "
        "with max_model_len=64; shorten them or raise max_model_len"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        engine.score([*prompt, 1], [completion])
    with pytest.raises(ValueError, match="a prompt of 64 tokens leaves no room"):
        engine.generate([[1] * 64])


def test_a_score_larger_than_the_pool_is_refused():
    engine = tiny_engine(max_num_seqs=2, page_size=4, num_pages=5, max_model_len=16)
    assert len(engine.score([1] * 9, [[2] * 8])[0].logprobs) == 8
    engine = tiny_engine(max_num_seqs=2, page_size=4, num_pages=4, max_model_len=16)
    message = (
        "request '0': the 17 tokens of prompt and completion need 4 pages of 4 tokens, but the "
        "pool has 3; shorten them or raise num_pages"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        engine.score([1] * 9, [[2] * 8])


def test_a_prompt_is_computed_once():
    engine = tiny_engine(max_num_seqs=8, max_num_batched_tokens=64, **ONE_SHAPE)
    engine.score(PROMPT, COMPLETIONS[:1])
    before = engine.stats().totals.num_hit_tokens
    engine.score(PROMPT, COMPLETIONS[1:])
    # Of 21 tokens 20 fill pages, and what predicts the first scored one is computed each time.
    assert engine.stats().totals.num_hit_tokens - before == 3 * 20


@pytest.mark.parametrize("num_pages", [64, 26])
def test_who_generates_meanwhile_does_not_notice(num_pages):
    prompts = prompts_of([9, 17, 6, 25], seed=3)
    params = [
        SamplingParams(max_tokens=9, seed=1, n=3, prompt_logprobs=2),
        SamplingParams(max_tokens=9, beam_width=3, n=3, prompt_logprobs=0),
        SamplingParams(max_tokens=12, temperature=0),
        SamplingParams(max_tokens=5, seed=2, logprobs=1, prompt_logprobs=1),
    ]
    settings = dict(max_num_seqs=5, max_num_batched_tokens=16, num_pages=num_pages) | ONE_SHAPE
    alone = tiny_engine(**settings)
    expected = [alone.generate([p], own)[0] for p, own in zip(prompts, params, strict=True)]
    together = tiny_engine(**settings)
    outputs = together.generate(prompts, params)
    together.check_invariants()
    assert token_ids(outputs) == token_ids(expected)
    for output, prompt, own in zip(outputs, prompts, params, strict=True):
        found = output.prompt_logprobs
        if own.prompt_logprobs is None:
            assert found is None
            continue
        want = dense_logprobs(prompt)
        assert found[0] is None and len(found) == len(prompt)
        for at, each in enumerate(found[1:], 1):
            likeliest = np.argsort(-want[at - 1], kind="stable")[: own.prompt_logprobs].tolist()
            assert list(each) == list(dict.fromkeys([prompt[at], *likeliest]))
            np.testing.assert_allclose(list(each.values()), want[at - 1][list(each)], atol=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["llama3_rope_hd80_tied", "qwen3_mha_hd80_untied_sharded", "gemma2"]
)
def test_scores_are_those_of_transformers(case):
    case = next(p for p in sorted(FIXTURES.iterdir()) if p.name.startswith(case))
    record = json.loads((case / "expected.json").read_text())
    config = EngineConfig(
        max_model_len=96, page_size=7, max_num_batched_tokens=24, max_num_seqs=6, num_pages=120,
        deterministic=True,
    )  # fmt: skip
    engine = Engine.load(case, config)
    indices = [recorded["prompt"] for recorded in record["top_logprobs"]]
    pairs = [(record["prompts"][i], record["continuations"][i]) for i in indices]
    other = [[*ids[:-1], top["token_ids"][-1][1]] for (_, ids), top in zip(
        pairs, record["top_logprobs"], strict=True
    )]  # fmt: skip
    scores = engine.score_all([*pairs, *zip([prompt for prompt, _ in pairs], other, strict=True)])
    assert [score.is_greedy for score in scores] == [True] * len(pairs) + [False] * len(pairs)
    for recorded, first, second in zip(
        record["top_logprobs"], scores[: len(pairs)], scores[len(pairs) :], strict=True
    ):
        best = [values[0] for values in recorded["logprobs"]]
        np.testing.assert_allclose(first.logprobs, best, atol=tolerances.LOGPROB)
        best[-1] = recorded["logprobs"][-1][1]
        np.testing.assert_allclose(second.logprobs, best, atol=tolerances.LOGPROB)


def test_a_compile_plan_may_have_scores():
    engine = tiny_engine(strict_shapes=True, max_num_seqs=4, max_num_batched_tokens=16, **ONE_SHAPE)
    message = r"prompt_logprobs=1 needs programs .*\(likeliest tokens: 16; compiled: none\)"
    with pytest.raises(ValueError, match=message):
        engine.score(PROMPT, COMPLETIONS)
    engine.warm_up(num_logprobs=1)  # of what scores need, the likeliest tokens alone
    with pytest.raises(ValueError, match=r"\(scores: given tokens; compiled: none\)"):
        engine.score(PROMPT, COMPLETIONS)
    assert engine.stats().totals.num_steps == 0
    engine.warm_up(params=[SamplingParams(prompt_logprobs=1)])
    hold(engine.score(PROMPT, COMPLETIONS)[2], PROMPT, COMPLETIONS[2])
    assert engine.stats().num_unplanned_compilations == 0


@pytest.mark.parametrize("own", [{}, {"n": 3}, {"n": 5, "best_of": 9}, {"beam_width": 3}])
def test_damaged_weights_fail_all_samples_of_a_prompt_in_chunks(own):
    """Also where what is scored says so before samples are forked."""
    params = {**tiny_params(), "final_norm": {"scale": jnp.full(32, jnp.nan)}}
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=8, **ONE_SHAPE)
    engine = Engine(TINY, params, config)
    (output,) = engine.generate([PROMPT], SamplingParams(prompt_logprobs=0, max_tokens=3, **own))
    assert {sample.finish_reason for sample in output.outputs} == {"error"}
    assert len(output.outputs) == own.get("n", 1)
    engine.check_invariants()


@pytest.mark.parametrize("own", [{}, {"n": 3}, {"beam_width": 3}])
def test_a_score_that_is_no_number_fails_what_is_drawn_from_numbers(monkeypatch, own):
    engine = tiny_engine(max_num_seqs=4, max_num_batched_tokens=8, **ONE_SHAPE)
    programs = engine._runner.programs
    found = programs.target_logprobs
    monkeypatch.setattr(
        programs,
        "target_logprobs",
        lambda logits, targets: jnp.where(targets == PROMPT[3], jnp.nan, found(logits, targets)),
    )
    params = SamplingParams(max_tokens=3, prompt_logprobs=0, **own)
    (output,) = engine.generate([PROMPT], params)
    assert {sample.finish_reason for sample in output.outputs} == {"error"}
    assert "NaN or infinite logits" in output.outputs[0].error
    engine.check_invariants()


def test_damaged_weights_fail_what_is_scored():
    params = {**tiny_params(), "final_norm": {"scale": jnp.full(32, jnp.nan)}}
    engine = Engine(TINY, params, EngineConfig(max_num_seqs=4, **ONE_SHAPE))
    with pytest.raises(RuntimeError, match=r"request '0': NaN or infinite logits"):
        engine.score(PROMPT, COMPLETIONS)
    engine.check_invariants()


@pytest.mark.parametrize(
    ("prompt", "completions", "message"),
    [
        ([1, 2], "ab", r"completions='ab' must be a list of completions"),
        ([1, 2], [[]], r"request '0': the completion is empty; give at least one"),
        ([], [[1]], r"request '0': the prompt is empty"),
        ([1, 2], [[1], [97]], r"request '1': token id 97 is outside the vocabulary, \[0, 97\)"),
        ([1, 2], [[97, 1]], r"request '0': token id 97 is outside the vocabulary"),
        ([1, 2], ["a"], r"prompt=\[1, 2\] and completion='a' must be two strings or two lists"),
        ("a", ["b"], r"the model has no tokenizer\.json"),
        ([1] * 60, [[1] * 6], r"prompt and completion have 66 tokens, more than the 65"),
    ],
)
def test_refusals(prompt, completions, message):
    engine = tiny_engine(max_num_seqs=4, **ONE_SHAPE)
    with pytest.raises(ValueError, match=message):
        engine.score(prompt, completions)
    assert not engine.has_unfinished_requests


def test_pairs_that_are_none_and_forks_are_refused():
    engine = tiny_engine(max_num_seqs=4, **ONE_SHAPE)
    with pytest.raises(ValueError, match="must be a prompt and its completion"):
        engine.score_all([[[1, 2]]])
    with pytest.raises(ValueError, match="prompt_logprobs=98 exceeds the vocabulary of 97"):
        engine.generate([PROMPT], SamplingParams(prompt_logprobs=98))
    name = engine.add_request(PROMPT, SamplingParams(max_tokens=9, prompt_logprobs=0))
    with pytest.raises(ValueError, match="prompt_logprobs=1 is for requests that compute"):
        engine.fork(name, params=SamplingParams(max_tokens=9, prompt_logprobs=1))
    engine.step(), engine.step()
    (child,) = engine.fork(name)
    outputs = {}
    while engine.has_unfinished_requests:
        outputs |= {output.request_id: output for output in engine.step()}
    assert outputs[child].prompt_logprobs is None and None not in outputs[name].prompt_logprobs[1:]


@given(
    length=st.integers(2, 40), first=st.integers(0, 38), known=st.booleans(),
    start=st.integers(0, 39), most=st.integers(1, 50), room=st.integers(0, 8),
)  # fmt: skip
def test_a_row_computes_as_much_as_places_allow(length, first, known, start, most, room):
    """The most tokens at which the scores and the sample find places, counted one by one."""
    scored = ScoredTokens(range(length + known), min(first, length - 1), 0)
    start = min(start, length - 1)
    lacking = length - start

    def places(count):
        wanted = {p for p in range(start, start + count) if first <= p < length - 1 + known}
        if count == lacking:
            wanted.add(length - 1)  # where a token is drawn
        return len(wanted)

    fits = [n for n in range(1, min(lacking, most) + 1) if places(n) <= room + 1]
    assert scored.fitting(start, lacking, most, room) == max(fits)


def test_pages_on_disk_do_not_hide_what_is_scored(tmp_path):
    settings = dict(max_num_seqs=8, prompt_cache=str(tmp_path), prompt_cache_min_pages=2)
    first = tiny_engine(**settings, **ONE_SHAPE)
    first.generate([PROMPT + COMPLETIONS[3]], SamplingParams(max_tokens=1))
    first.save_prompts()
    second = tiny_engine(**settings, **ONE_SHAPE)
    completions = [COMPLETIONS[3], COMPLETIONS[1]]
    for score, completion in zip(second.score(PROMPT, completions), completions, strict=True):
        hold(score, PROMPT, completion)
    assert second.stats().totals.num_disk_tokens == 20
