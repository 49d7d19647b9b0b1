# SPDX-License-Identifier: Apache-2.0
"""Penalties, biases, least lengths and forbidden tokens: transformers' numbers, any schedule."""

import dataclasses
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.defaults import model_defaults
from jpaged.device import sampling
from jpaged.host.logits_processors import LogitsProcessors, idle_rows, processor_rows
from jpaged.host.token_biases import TokenCounts, padded_width, widths_up_to
from jpaged.models.generation_config import GenerationConfig
from tests.jpaged.exact import EXACT, everything, run_steps
from tests.jpaged.tiny import TINY, prompts_of, tiny_engine, tiny_params, token_ids

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "hf"
RECORDS = json.loads((FIXTURES / "logits_processors.json").read_text())["records"]
CASES = sorted({record["case"] for record in RECORDS})
NIGHTLY = (pytest.mark.nightly, pytest.mark.slow)

NAMES = {"min_new_tokens": "min_tokens", "eos_token_id": "stop_token_ids"}
PROCESSED = dict(max_tokens=20, repetition_penalty=1.8, min_tokens=6, suppress_tokens=(3, 50))
ENDS = [[a, b] for a in range(0, 97, 3) for b in range(1, 97, 4)]
ADDED = dict(
    max_tokens=20,
    presence_penalty=0.7,
    frequency_penalty=1.1,
    logit_bias={5: 1.5, "8": -2.0},
    sequence_bias=[[[5], 0.25], [[5, 6], 3.0], [[1, 5, 6], 1.0], [[7, 5], -0.5]],
    bad_words_ids=ENDS,
)
# So few tokens that sequences of three come up, and decide.
TRIPLES = dict(
    max_tokens=20,
    allowed_token_ids=range(5, 9),
    sequence_bias=[
        [[a, b, c], (7 * a + 3 * b + 5 * c) % 11 - 5.0]
        for a, b, c in itertools.product(range(5, 9), repeat=3)
    ],
    bad_words_ids=[[5, 6, 7], [8, 8, 8, 8]],
)
CROWD = prompts_of((1, 2, 9, 16, 17, 33, 40, 3, 21, 30, 12, 7))
CROWDS_PARAMS = (
    *(SamplingParams(temperature=0, logprobs=1, **PROCESSED) for _ in range(3)),
    *(SamplingParams(seed=seed, logprobs=1, **PROCESSED) for seed in range(2)),
    SamplingParams(seed=9, n=3, logprobs=1, **PROCESSED),
    SamplingParams(beam_width=2, n=2, logprobs=1, **PROCESSED),
    SamplingParams(temperature=0, logprobs=1, **ADDED),
    SamplingParams(seed=4, n=2, logprobs=1, allowed_token_ids=range(0, 97, 2), **ADDED),
    SamplingParams(beam_width=3, n=3, max_tokens=20, logit_bias={5: 1.5}, bad_words_ids=ENDS),
    SamplingParams(seed=6, n=2, logprobs=1, frequency_penalty=0.5, **TRIPLES),
    SamplingParams(beam_width=2, n=2, **TRIPLES),
)


def params_of(record):
    given = {NAMES.get(name, name): value for name, value in record["generate"].items()}
    return SamplingParams(
        max_tokens=record["max_new_tokens"],
        n=record["num_beams"],
        ignore_eos=True,
        **(dict(beam_width=record["num_beams"]) if record["num_beams"] > 1 else {"temperature": 0}),
        **given,
    )


class TestHuggingFace:
    """What transformers generated with the same processors; see record_hf_processors.py."""

    @pytest.mark.parametrize(
        "case", [CASES[0], *(pytest.param(case, marks=NIGHTLY) for case in CASES[1:])]
    )
    def test_tokens_and_scores_are_equal(self, case):
        records = [record for record in RECORDS if record["case"] == case]
        engine = Engine.load(
            FIXTURES / case, EngineConfig(max_model_len=96, num_pages=200, **EXACT)
        )
        outputs = engine.generate([r["prompt"] for r in records], list(map(params_of, records)))
        for output, record in zip(outputs, records, strict=True):
            assert [c.token_ids for c in output.outputs] == record["token_ids"], record
            if record["scores"] is not None:
                scores = [c.score for c in output.outputs]
                np.testing.assert_allclose(scores, record["scores"], rtol=1e-4, atol=1e-4)
        engine.check_invariants()


class TestOnTheDevice:
    def test_by_hand(self):
        rows = idle_rows(3, 1)
        rows.active[:2] = True
        rows.repetition_penalty[0] = 2
        rows.seen[0] = 0b00011  # tokens 0 and 1
        rows.previous_slots[0] = 1  # and what slot 1 of the step before has chosen: token 4
        rows.blocked[1] = 0b01010
        logits = jnp.array([[3.0, -1.0, 2.0, 0.0, 5.0]] * 3)
        got = sampling.process_logits(logits, rows, jnp.array([2, 4, 0]))
        inf = np.inf
        np.testing.assert_array_equal(
            got, [[1.5, -2, 2, 0, 2.5], [3, -inf, 2, -inf, 5], [3, -1, 2, 0, 5]]
        )

    def test_lists_by_hand(self):
        rows = idle_rows(2, 1, 3)
        rows.active[0] = True
        rows.previous_slots[0] = 1  # token 4
        rows.bias_tokens[0], rows.bias_after[0] = [0, 0, 1], [-1, 4, 3]
        rows.bias[0] = [1.0, 10.0, 100.0]
        rows.repetition_penalty[0] = 2
        rows.seen[0] = 0b00101
        rows.counted_tokens[0, :2] = [2, 4]
        rows.penalties[0, :2], rows.next_penalties[0, :2] = [0.5, 1.0], [1.0, 1.5]
        rows.presence_penalty[0] = 0.25
        logits = jnp.array([[3.0, -1.0, 2.0, 0.0, 5.0]] * 2)
        got = sampling.process_logits(logits, rows, jnp.array([2, 4]))
        np.testing.assert_array_equal(got[0], [6.5, -1, 1 - 0.75, 0, 2.5 - 1.75])
        np.testing.assert_array_equal(got[1], logits[1])

    def test_a_vocabulary_that_is_no_multiple_of_8(self):
        params = SamplingParams(suppress_tokens=(0, 7, 8, 16)).resolve()
        blocked = LogitsProcessors(params, (), 17).blocked(0)
        got = np.asarray(sampling._bits(blocked[None], 17))
        assert np.flatnonzero(got[0]).tolist() == [0, 7, 8, 16]


VOCAB = 19
TOKENS = st.integers(0, 2)  # few, so that sequences of several are found
BIAS = st.floats(-100, 100, width=32)
PENALTY = st.floats(-2, 2, width=32)
PROMPT = st.lists(TOKENS, min_size=1, max_size=5)
REQUESTS = st.fixed_dictionaries(
    {},
    optional=dict(
        presence_penalty=PENALTY,
        frequency_penalty=PENALTY,
        repetition_penalty=st.floats(0.5, 3, width=32),
        logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), BIAS, max_size=4),
        sequence_bias=st.lists(
            st.tuples(st.lists(TOKENS, min_size=1, max_size=4), BIAS), max_size=12
        ),
        bad_words_ids=st.lists(st.lists(TOKENS, min_size=1, max_size=4), max_size=6),
        suppress_tokens=st.lists(TOKENS, max_size=2),
        allowed_token_ids=st.sets(st.integers(0, VOCAB - 1), min_size=1).map(
            lambda tokens: sorted(tokens | set(range(6, VOCAB)))
        ),
        stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=2),
        min_tokens=st.integers(0, 3),
    ),
)


def dense(logits, params, prompt, generated):
    """vLLM's formulas, and transformers' for sequences, on one dense row in float32."""
    x, tokens = logits.copy(), prompt + generated
    bias = np.zeros_like(x)
    for token, value in params.logit_bias:
        bias[token] += np.float32(value)
    sequences = dict(params.sequence_bias or ())
    for length in dict.fromkeys([1, *map(len, sequences)]):
        for ids, value in sequences.items():
            fits = length == 1 or tuple(tokens[1 - length :]) == ids[:-1]
            if len(ids) == length <= len(tokens) + 1 and fits:
                bias[ids[-1]] += np.float32(value)
    x = x + bias
    penalty = np.float32(params.repetition_penalty)
    for token in set(tokens):
        x[token] = x[token] * penalty if x[token] < 0 else x[token] / penalty
    counts = np.bincount(generated, minlength=len(x)).astype(np.float32)
    x = x - np.float32(params.frequency_penalty) * counts
    x = x - np.float32(params.presence_penalty) * (counts > 0)
    stops = set(params.stop_token_ids)
    for ids in params.bad_words_ids or ():
        alone = len(ids) == 1
        if (alone and ids[0] not in stops) or (
            not alone and tuple(tokens[1 - len(ids) :]) == ids[:-1] and len(ids) <= len(tokens) + 1
        ):
            x[ids[-1]] = -np.inf
    forbidden = {*(params.suppress_tokens or ())}
    if len(generated) < params.min_tokens:
        forbidden |= stops
    if params.allowed_token_ids is not None:
        forbidden |= set(range(len(x))) - set(params.allowed_token_ids)
    x[sorted(forbidden)] = -np.inf
    return x


class TestDense:
    """A row beside others, whether the host knows the newest token or only the device."""

    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(
            st.tuples(REQUESTS, st.lists(TOKENS, min_size=1, max_size=5)), min_size=1, max_size=3
        ),
        st.lists(TOKENS, max_size=8),
        st.integers(0, 2**32 - 1),
    )
    def test_as_the_formulas_say(self, requests, generated, seed):
        logits = np.random.default_rng(seed).normal(size=(4, VOCAB), scale=9).astype(np.float32)
        logits[:, 3] = -0.0
        known, unknown, want = [], [], []
        for row, (fields, prompt) in enumerate(requests):
            params = SamplingParams(**fields).resolve()
            want.append(dense(logits[row], params, prompt, generated))
            for found, host in ((known, generated), (unknown, generated[:-1])):
                try:
                    own = LogitsProcessors.of(params, (), VOCAB)
                except ValueError:
                    return  # nothing may be left to choose
                tokens = prompt[:]
                for token in host:  # one by one, as it goes
                    tokens.append(token)
                    if own:
                        own.processing(0, tokens, len(prompt), len(tokens) - len(prompt))
                found.append(own and own.processing(0, tokens, len(prompt), len(generated)))
        count = len(requests)
        previous = jnp.array([7, *generated[-1:], 11, 0][:3])
        slot = 1 if generated else -1
        outcomes = []
        for processing, sources in ((known, [-1] * count), (unknown, [slot] * count)):
            rows = processor_rows(processing, sources, 4)
            outcomes.append(logits if rows is None else PROCESS(logits, rows, previous))
        np.testing.assert_array_equal(*[np.asarray(o).view(np.int32) for o in outcomes])
        np.testing.assert_allclose(outcomes[0][:count], want, rtol=1e-6, atol=1e-6)
        for row in range(4):
            if row >= count or known[row] is None:
                bits = np.asarray(outcomes[0][row]).view(np.int32)
                np.testing.assert_array_equal(bits, logits[row].view(np.int32))


PROCESS = jax.jit(sampling.process_logits)


class TestLists:
    def test_widths(self):
        assert [padded_width(n) for n in (0, 1, 32, 33, 256, 257, 128256)] == [
            0, 32, 32, 256, 256, 2048, 131072,
        ]  # fmt: skip
        assert [widths_up_to(n) for n in (0, 1, 32, 33)] == [[0], [0, 32], [0, 32], [0, 32, 256]]

    def test_counts_beyond_the_first_room(self):
        tokens = [9, 9, *np.random.default_rng(0).integers(0, 300, 2000).tolist()]
        counts = TokenCounts()
        for length in (2, 3, 500, 2002):
            found = counts.entries(tokens[:length], 2)
            want = np.bincount(tokens[2:length], minlength=300)
            assert len(found.tokens) == len(set(found.tokens.tolist())) == (want > 0).sum()
            np.testing.assert_array_equal(found.counts, want[found.tokens])

    def test_a_plan_is_not_changed_later(self):
        params = SamplingParams(presence_penalty=1.0, repetition_penalty=2.0).resolve()
        own = LogitsProcessors.of(params, (), 97)
        first = own.processing(0, [5, 6], 1, 1)
        before = [first.seen.tolist(), first.counts.counts.tolist()]
        own.processing(0, [5, 6, 6, 7], 1, 3)
        assert [first.seen.tolist(), first.counts.counts.tolist()] == before


class TestEngine:
    def test_frequency_and_presence_count_the_answer_only(self):
        engine = tiny_engine(**EXACT)
        plain = SamplingParams(max_tokens=8, temperature=0)
        prompt, often = CROWD[6], dict(frequency_penalty=2.0, presence_penalty=2.0)
        (want,) = token_ids(engine.generate([prompt], plain))[0]
        (got,) = token_ids(
            engine.generate([prompt], SamplingParams(max_tokens=8, temperature=0, **often))
        )[0]
        assert got[0] == want[0]  # nothing of the prompt counts
        bias = {want[0]: -100.0}
        params = SamplingParams(max_tokens=8, temperature=0, logit_bias=bias)
        (other,) = token_ids(engine.generate([prompt], params))[0]
        assert want[0] not in other

    def test_bad_words_are_never_completed(self):
        engine = tiny_engine(**EXACT)
        plain = engine.generate(CROWD, SamplingParams(max_tokens=20, temperature=0))
        words = [tokens[at : at + 2] for (tokens,) in token_ids(plain) for at in (0, 5, 9)]
        starts = zip(CROWD, token_ids(plain), strict=True)
        words += [prompt[-2:] + tokens[:1] for prompt, (tokens,) in starts]
        outputs = engine.generate(
            CROWD, SamplingParams(max_tokens=20, temperature=0, bad_words_ids=words)
        )
        for prompt, (tokens,) in zip(CROWD, token_ids(outputs), strict=True):
            text = prompt + tokens
            for at in range(len(prompt), len(text)):
                assert all(text[at + 1 - len(w) : at + 1] != w for w in words)
        assert token_ids(outputs) != token_ids(plain)

    @pytest.mark.parametrize("field", ["bad_words_ids", "sequence_bias"])
    @pytest.mark.parametrize("length", [2, 3, 5])
    def test_a_sequence_counts_where_all_before_its_last_token_is_there(self, field, length):
        engine = tiny_engine(**EXACT)
        plain = SamplingParams(max_tokens=14, temperature=0, ignore_eos=True)
        ((want,),) = token_ids(engine.generate([CROWD[2]], plain))
        word = want[10 - length : 10]
        for added in ([], [2]):  # and one before it that is not there
            given = [added + word] if field == "bad_words_ids" else [[added + word, -100.0]]
            params = dataclasses.replace(plain, **{field: given})
            ((got,),) = token_ids(engine.generate([CROWD[2]], params))
            assert (got == want) == bool(added)
            assert got[:9] == want[:9] and (got[9] == want[9]) == bool(added)

    def test_allowed_tokens_and_no_others(self):
        engine = tiny_engine(**EXACT)
        allowed = SamplingParams(max_tokens=20, allowed_token_ids=[3, 96], seed=1, ignore_eos=True)
        for (tokens,) in token_ids(engine.generate(CROWD, allowed)):
            assert set(tokens) <= {3, 96}

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (dict(allowed_token_ids=[3], bad_words_ids=[[3, 3]]), "to choose after token 3"),
            (
                dict(allowed_token_ids=[3], suppress_tokens=[3]),
                "suppress_tokens, allowed_token_ids",
            ),
            (dict(allowed_token_ids=[3], min_tokens=2, stop_token_ids=[3]), "before min_tokens=2"),
            (dict(allowed_token_ids=[97]), "allowed_token_ids has token 97, which is outside"),
            (dict(logit_bias={97: 1}), "logit_bias has token 97, which is outside"),
            (dict(sequence_bias={(97, 1): 1}), "sequence_bias has token 97, which is outside"),
            (dict(bad_words_ids=[[1, 97]]), "bad_words_ids has token 97, which is outside"),
        ],
    )
    def test_what_leaves_nothing_or_is_outside(self, given, message):
        engine = tiny_engine(**EXACT)
        with pytest.raises(ValueError, match=f"request 'a': .*{message}"):
            engine.add_request([1], SamplingParams(max_tokens=4, **given), "a")
        assert not engine.has_unfinished_requests

    def test_what_leaves_something_is_served(self):
        engine = tiny_engine(**EXACT)
        params = SamplingParams(
            max_tokens=4, allowed_token_ids=[3, 4], bad_words_ids=[[3, 3], [4, 4]]
        )
        ((tokens,),) = token_ids(engine.generate([[1]], params))
        assert tokens in ([3, 4, 3, 4], [4, 3, 4, 3])

    def test_warmed_up_lists_compile_nothing(self):
        engine = tiny_engine(**EXACT)
        params = SamplingParams(temperature=0, **ADDED | dict(max_tokens=40))
        engine.warm_up(params=[params])
        engine.generate(CROWD[:3], params)
        assert engine.stats().num_unplanned_compilations == 0

    def test_what_can_be_chosen(self):
        engine = tiny_engine(**EXACT)
        plain = engine.generate(CROWD, SamplingParams(max_tokens=20, temperature=0))
        common = sorted({t for (tokens,) in token_ids(plain) for t in tokens})
        outputs = engine.generate(
            CROWD,
            SamplingParams(
                max_tokens=20,
                temperature=0,
                stop_token_ids=common[::2],
                min_tokens=7,
                suppress_tokens=common[1::2],
            ),
        )
        for (tokens,) in token_ids(outputs):
            assert not set(tokens) & set(common[1::2])
            assert not set(tokens[:7]) & set(common[::2])
            assert len(tokens) >= 8

    def test_a_least_length_without_effect_changes_nothing(self):
        engine = tiny_engine(**EXACT)
        want = engine.generate(CROWD, SamplingParams(max_tokens=9, seed=1, logprobs=1))
        got = engine.generate(
            CROWD, SamplingParams(max_tokens=9, seed=1, logprobs=1, min_tokens=9, ignore_eos=True)
        )
        assert everything(got) == everything(want)

    @pytest.mark.parametrize("temperature", [0.0, 1.3])
    def test_logprobs_are_those_of_the_model(self, temperature):
        """Each token's log-probability is what a plain request has for it after the same tokens."""
        engine = tiny_engine(**EXACT)
        params = SamplingParams(temperature=temperature, seed=3, logprobs=97, **PROCESSED)
        (output,) = engine.generate([CROWD[2]], params)
        (sample,) = output.outputs
        forced = CROWD[2] + sample.token_ids
        for place in (0, 5, 19):
            prompt = forced[: len(CROWD[2]) + place]
            (plain,) = engine.generate([prompt], SamplingParams(max_tokens=1, logprobs=97))
            model = plain.outputs[0].logprobs[0]
            token = sample.token_ids[place]
            assert sample.logprobs[place][token] == pytest.approx(model[token], abs=1e-4)
            assert sample.logprobs[place] == pytest.approx(model, abs=1e-4)
        total = sum(p[t] for p, t in zip(sample.logprobs, sample.token_ids, strict=True))
        assert sample.cumulative_logprob == pytest.approx(total, abs=1e-4)

    def test_a_beam_has_a_score_and_the_models_logprob(self):
        engine = tiny_engine(**EXACT)
        params = SamplingParams(beam_width=3, n=3, logprobs=97, **PROCESSED)
        for beam in engine.generate([CROWD[3]], params)[0].outputs:
            total = sum(p[t] for p, t in zip(beam.logprobs, beam.token_ids, strict=True))
            assert beam.cumulative_logprob == pytest.approx(total, abs=1e-3)
            assert beam.score * 20 < total - 1e-3  # some of its tokens are repeated

    def test_no_other_request_is_touched(self):
        engine = tiny_engine(**EXACT)
        plain = SamplingParams(max_tokens=12, seed=5, logprobs=2)
        want = [everything(engine.generate([prompt], plain)) for prompt in CROWD[:3]]
        mixed = [plain, SamplingParams(seed=1, **PROCESSED)] * 3
        prompts = [prompt for prompt in CROWD[:3] for _ in range(2)]
        outputs = engine.generate(prompts, mixed)
        assert [everything([output]) for output in outputs[::2]] == want

    def test_unused_it_compiles_and_costs_nothing(self):
        engine = tiny_engine(**EXACT)
        engine.generate([CROWD[2]], SamplingParams(max_tokens=4))
        names = ("process", "model_logprobs", "processed_beam_candidates")
        programs = engine._runner.programs
        assert [getattr(programs, name)._cache_size() for name in names] == [0, 0, 0]
        engine.generate([CROWD[2]], SamplingParams(max_tokens=4, repetition_penalty=2.0))
        assert [getattr(programs, name)._cache_size() for name in names] != [0, 0, 0]

    def test_everything_suppressed_is_refused(self):
        engine = tiny_engine(**EXACT)
        with pytest.raises(ValueError, match="leave none of the 97 tokens of the vocabulary"):
            engine.add_request([1], SamplingParams(suppress_tokens=range(97)))
        most = dict(suppress_tokens=range(96), stop_token_ids=[96], max_tokens=4)
        with pytest.raises(ValueError, match=r"request 'a': .*before min_tokens=2"):
            engine.add_request([1], SamplingParams(min_tokens=2, **most), "a")
        (output,) = engine.generate([[1]], SamplingParams(**most))
        assert output.outputs[0].token_ids == [96]


@pytest.fixture(scope="module")
def alone():
    """What comes out of each request of the crowd by itself."""
    engine = tiny_engine(**EXACT)
    return [
        everything(engine.generate([prompt], params))
        for prompt, params in zip(CROWD, CROWDS_PARAMS, strict=True)
    ]


class TestSchedule:
    """A token depends on its request's own tokens: also on one that only the device knows yet."""

    @pytest.mark.parametrize(
        "config",
        [
            {},
            pytest.param(dict(num_pages=24), marks=NIGHTLY),
            dict(num_pages=24, preemption="swap"),
            pytest.param(dict(prefix_cache=False, page_size=2), marks=NIGHTLY),
        ],
        ids=str,
    )
    def test_in_a_crowd_and_preempted(self, config, alone):
        engine = tiny_engine(**(EXACT | config))
        for _ in range(2):  # the second time, prefixes are known
            outputs = engine.generate(CROWD, CROWDS_PARAMS)
            assert [everything([output]) for output in outputs] == alone
        if "num_pages" in config:
            assert engine.stats().totals.num_preemptions > 0
        engine.check_invariants()

    def test_in_chunks_of_any_size(self, alone):
        """Of other shapes, whose matrix products round differently in the last bits: tokens."""
        engine = tiny_engine(**EXACT | dict(max_num_batched_tokens=11))
        outputs = engine.generate(CROWD, CROWDS_PARAMS)
        for output, (want,) in zip(outputs, alone, strict=True):
            assert [c.token_ids for c in output.outputs] == [tokens for tokens, _, _ in want]

    @pytest.mark.parametrize("given", [PROCESSED, ADDED])
    def test_forks_know_what_came_before(self, given):
        engine = tiny_engine(**EXACT)
        params = SamplingParams(temperature=0, **given)
        parent = engine.add_request(CROWD[2], params, stream=True)
        for _ in range(5):
            engine.step()
        (child,) = engine.fork(parent, params=params)
        done = run_steps(engine)
        # Greedy, with the same history: the same answer.
        assert token_ids([done[child]]) == token_ids([done[parent]])


OF_BEAMS = dict(length_penalty=2.0, early_stopping="never", renormalize_logits=True)


class TestDefaults:
    FILE = GenerationConfig(
        do_sample=True,
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.5,
        min_new_tokens=3,
        max_new_tokens=11,
        suppress_tokens=(4, 5),
        **OF_BEAMS,
    )

    def test_the_files_values_stand_for_none(self):
        got = SamplingParams().resolve(model_defaults(self.FILE, 97).params, room=50)
        assert got == SamplingParams(
            temperature=0.5, top_k=7, top_p=0.9, min_p=0.01, repetition_penalty=1.5, min_tokens=3,
            max_tokens=11, suppress_tokens=(4, 5), sequence_bias=(), bad_words_ids=(), **OF_BEAMS,
        )  # fmt: skip

    def test_own_values_win_also_where_they_are_neutral(self):
        own = SamplingParams(
            temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, min_tokens=0,
            max_tokens=50, suppress_tokens=(), length_penalty=1.0, early_stopping=False,
            renormalize_logits=False, sequence_bias=(), bad_words_ids=(),
        )  # fmt: skip
        assert own.resolve(model_defaults(self.FILE, 97).params, room=9) == own

    def test_without_a_file_they_are_neutral(self):
        assert SamplingParams().resolve(room=50) == SamplingParams(
            temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, min_tokens=0,
            max_tokens=50, suppress_tokens=(), length_penalty=1.0, early_stopping=False,
            renormalize_logits=False, sequence_bias=(), bad_words_ids=(),
        )  # fmt: skip

    def test_do_sample_false_is_greedy(self):
        file = model_defaults(GenerationConfig(do_sample=False, temperature=0.6), 97).params
        assert SamplingParams().resolve(file).temperature == 0
        assert SamplingParams(temperature=0.3).resolve(file).temperature == 0.3

    def test_beams_take_no_filters_from_it(self):
        got = SamplingParams(beam_width=2).resolve(model_defaults(self.FILE, 97).params)
        assert (got.temperature, got.top_k, got.top_p, got.min_p) == (1.0, 0, 1.0, 0.0)
        assert (got.repetition_penalty, got.min_tokens, got.max_tokens) == (1.5, 3, 11)
        assert {name: getattr(got, name) for name in OF_BEAMS} == OF_BEAMS

    @pytest.mark.parametrize(
        ("own", "want"),
        [
            (dict(max_tokens=2), (2, 2)),
            (dict(min_tokens=20), (20, 20)),
            (dict(min_tokens=5), (5, 11)),
        ],
    )
    def test_lengths_agree(self, own, want):
        got = SamplingParams(**own).resolve(model_defaults(self.FILE, 97).params, room=50)
        assert (got.min_tokens, got.max_tokens) == want

    def test_the_engine_takes_them_and_ignores_what_its_vocabulary_lacks(self):
        file = GenerationConfig(do_sample=False, max_new_tokens=5, suppress_tokens=(7, 97, -1))
        engine = Engine(TINY, tiny_params(), EngineConfig(max_model_len=64, **EXACT), None, file)
        want = SamplingParams(max_tokens=5, temperature=0, suppress_tokens=(7,))
        outputs = engine.generate(CROWD[:2], SamplingParams())
        assert token_ids(outputs) == token_ids(tiny_engine(**EXACT).generate(CROWD[:2], want))

    def test_sequences_of_the_file(self):
        file = GenerationConfig(sequence_bias=(((5, 6), -2.0),), bad_words_ids=((7,), (8, 9)))
        got = SamplingParams().resolve(model_defaults(file, 97).params)
        assert (got.sequence_bias, got.bad_words_ids) == (file.sequence_bias, file.bad_words_ids)
        own = SamplingParams(sequence_bias=(), bad_words_ids=[])
        got = own.resolve(model_defaults(file, 97).params)
        assert (got.sequence_bias, got.bad_words_ids) == ((), ())
        with pytest.raises(ValueError, match=r"generation_config\.json: bad_words_ids has token 9"):
            model_defaults(file, 9)

    def test_what_is_no_parameter_is_refused_when_the_engine_is_made(self):
        with pytest.raises(ValueError, match=r"generation_config\.json: temperature=1e\+31"):
            Engine(TINY, tiny_params(), None, None, GenerationConfig(temperature=1e31))

    def test_max_tokens_is_what_max_model_len_leaves(self):
        (output,) = tiny_engine(**EXACT, max_model_len=30).generate([[1] * 10], SamplingParams())
        assert len(output.outputs[0].token_ids) == 20

    def test_a_warm_up_compiles_what_the_model_asks_for(self):
        config = EngineConfig(**EXACT, max_model_len=64)
        own = GenerationConfig(repetition_penalty=1.3)
        engine = Engine(TINY, tiny_params(), config, generation_config=own)
        search = SamplingParams(beam_width=2, max_tokens=4)
        engine.warm_up(params=[search])
        engine.generate(CROWD[:2], SamplingParams(max_tokens=4))
        engine.generate(CROWD[:1], search)
        assert engine.stats().num_unplanned_compilations == 0

    @pytest.mark.parametrize("own", [{}, {"max_new_tokens": 2048}])
    def test_a_length_that_the_request_did_not_ask_for_fits_the_pool(self, own):
        """Two pages of 16 cells: 10 tokens of the prompt, 22 more, and one without a cell."""
        engine = Engine(
            TINY,
            tiny_params(),
            EngineConfig(**EXACT | {"num_pages": 3, "page_size": 16}),
            generation_config=GenerationConfig(**own),
        )
        (output,) = engine.generate([[1] * 10], SamplingParams(ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 23
        (output,) = engine.generate([[1] * 10], SamplingParams(beam_width=2, ignore_eos=True))
        # A page each, no full one shared: 10 + 6 cells, and one token without a cell.
        assert len(output.outputs[0].token_ids) == 7

    @pytest.mark.parametrize(
        ("file", "own", "length"),
        [
            (dict(max_length=16), {}, 6),
            (dict(max_length=11), {}, 1),
            (dict(max_length=10**9), {}, 54),
            (dict(max_length=16), dict(max_tokens=9), 9),
            (dict(max_length=16, max_new_tokens=8), {}, 8),
            (dict(max_length=5, max_new_tokens=8), {}, 8),
        ],
    )
    def test_max_length_counts_the_prompt_and_gives_way(self, file, own, length):
        """As in transformers: max_new_tokens, wherever it stands, takes precedence."""
        config = EngineConfig(max_model_len=64, **EXACT)
        engine = Engine(TINY, tiny_params(), config, None, GenerationConfig(**file))
        (output,) = engine.generate([[1] * 10], SamplingParams(ignore_eos=True, **own))
        assert len(output.outputs[0].token_ids) == length

    @pytest.mark.parametrize("max_length", [1, 10])
    def test_a_prompt_as_long_as_max_length_is_refused(self, max_length):
        """transformers 5.24 raises too."""
        engine = Engine(
            TINY,
            tiny_params(),
            EngineConfig(**EXACT),
            None,
            GenerationConfig(max_length=max_length),
        )
        with pytest.raises(
            ValueError, match=f"prompt of 10 tokens .*max_length={max_length}; give"
        ):
            engine.add_request([1] * 10, SamplingParams())
        assert not engine.has_unfinished_requests

    @pytest.mark.parametrize("mode", ["model", "ignore"])
    def test_loaded_with_the_model(self, mode, tmp_path):
        case = FIXTURES / RECORDS[0]["case"]
        for path in case.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "generation_config.json").write_text(
            json.dumps({"repetition_penalty": 1.9, "do_sample": False, "max_new_tokens": 4})
        )
        engine = Engine.load(
            tmp_path, EngineConfig(max_model_len=96, generation_config=mode, **EXACT)
        )
        assert (engine.defaults.params == SamplingParams()) == (mode == "ignore")
        if mode == "model":
            assert engine.defaults.params.repetition_penalty == 1.9
            (output,) = engine.generate([[5, 6, 7]], SamplingParams())
            assert len(output.outputs[0].token_ids) == 4
