# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with one request ends it, says where to look, and harms no other."""

import dataclasses
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from jpaged import SamplingParams
from jpaged.device.sampling import mark_not_finite, sample
from jpaged.host.batch import SamplingRows
from jpaged.models.decoder import Decoder
from jpaged.results import ResultReader
from jpaged.text import TextStream
from tests.jpaged.exact import EXACT, drawn, everything, run_steps
from tests.jpaged.tiny import TINY, prompts_of, tiny_engine

HEALTHY = prompts_of([5, 17, 30])
CROWD = [drawn(seed, n=2) for seed in (8, 9, 10)]
# What a token does to a logit of the one that follows it.
POISON = {90: math.nan, 91: math.inf, 92: -math.inf}


class Poisoned(Decoder):
    def apply(self, params, inputs, kv_pages):
        logits, kv_pages = super().apply(params, inputs, kv_pages)
        last = inputs.token_ids[inputs.logits_indices]
        for token, value in POISON.items():
            logits = logits.at[:, 7].add(jnp.where(last == token, jnp.float32(value), 0))
        return logits, kv_pages


@pytest.fixture(scope="module")
def poisoned():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jpaged.placement.Decoder", Poisoned)
        return tiny_engine(**EXACT)


@pytest.fixture
def engine(poisoned):
    yield poisoned
    assert not poisoned.has_unfinished_requests
    poisoned.check_invariants()


@functools.cache
def clean():
    return tiny_engine(**EXACT)


def healthy(prompt, **params):
    """Parameters whose answer, and the answer, have none of the poisonous tokens."""
    for seed in itertools.count():
        (output,) = clean().generate([prompt], drawn(seed, **params))
        if not any(POISON.keys() & set(completion.token_ids) for completion in output.outputs):
            return drawn(seed, **params), everything([output])[0]


@functools.cache
def crowd():
    """Parameters for the healthy prompts, and their answers."""
    return [*zip(*(healthy(prompt, n=2) for prompt in HEALTHY), strict=True)]


def strict_json(output):
    return json.dumps(dataclasses.asdict(output), allow_nan=False)


class TestSampler:
    """The log-probability is NaN exactly where a logit of the row is not finite."""

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_any_logit_that_is_not_finite(self, temperature):
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(12, 1000)).astype(np.float32) * 20
        bad = {1: [(0, math.nan)], 3: [(999, math.inf)], 4: [(500, -math.inf)]}
        bad |= {6: [(3, math.inf), (4, -math.inf)], 7: [(i, -math.inf) for i in range(1000)]}
        bad |= {9: [(128, -math.inf), (7, math.nan)]}
        for row, places in bad.items():
            for column, value in places:
                logits[row, column] = value
        # Finite ones are left alone, however far apart.
        logits[10, 5], logits[11, 5] = 1e30, -1e30
        count = len(logits)
        rows = SamplingRows(
            temperature=np.full(count, temperature, np.float32),
            top_k=np.zeros(count, np.int32),
            top_p=np.ones(count, np.float32),
            min_p=np.zeros(count, np.float32),
            seeds=np.arange(count, dtype=np.uint32),
            sample_indices=np.zeros(count, np.uint32),
            positions=np.zeros(count, np.int32),
        )
        tokens, logprobs = sample(jnp.asarray(logits), rows)
        logprobs = np.asarray(mark_not_finite(jnp.asarray(logits), logprobs))
        tokens = np.asarray(tokens)
        assert set(np.flatnonzero(~np.isfinite(logprobs))) == set(bad)
        good = [row for row in range(count) if row not in bad]
        with np.errstate(over="ignore"):
            x = logits[good].astype(np.float64)
            log_softmax = x - x.max(1, keepdims=True)
            log_softmax -= np.log(np.exp(log_softmax).sum(1, keepdims=True))
        np.testing.assert_allclose(
            logprobs[good], log_softmax[np.arange(len(good)), tokens[good]], rtol=1e-4, atol=1e-4
        )


class TestNotFinite:
    @pytest.mark.parametrize("token", POISON)
    def test_a_prompt_ends_with_an_error_and_others_go_on(self, engine, token):
        params, want = crowd()
        prompts = [*HEALTHY, [1, 2, token]]
        outputs = engine.generate(prompts, [*params, drawn(n=3)])
        assert tuple(everything(outputs[:3])) == want
        assert outputs[3].finished and len(outputs[3].outputs) == 3
        for completion in outputs[3].outputs:
            assert completion.finish_reason == "error"
            assert (completion.token_ids, completion.logprobs, completion.text) == ([], [], "")
            assert completion.cumulative_logprob == 0.0
            assert "NaN or infinite logits for the token at position 3" in completion.error
            assert "weights are damaged" in completion.error and "\n" not in completion.error
        assert all(c.error is None for output in outputs[:3] for c in output.outputs)
        strict_json(outputs[3])

    def test_what_was_valid_is_kept(self, engine):
        """The samples of a request that draw the token end after it; the others go on."""
        params = SamplingParams(max_tokens=30, temperature=2.0, seed=1, n=8, logprobs=2)
        (right,) = clean().generate([HEALTHY[0]], params)
        (output,) = engine.generate([HEALTHY[0]], params)
        reasons = []
        for got, full in zip(output.outputs, right.outputs, strict=True):
            at = next((i for i, t in enumerate(full.token_ids[:-1]) if t in POISON), None)
            kept = len(full.token_ids) if at is None else at + 1
            assert got.token_ids == full.token_ids[:kept]
            assert got.logprobs == full.logprobs[:kept]
            chosen = [row[token] for row, token in zip(got.logprobs, got.token_ids, strict=True)]
            assert got.cumulative_logprob == pytest.approx(sum(chosen), abs=1e-4)
            assert (got.finish_reason == "error") == (at is not None) == (got.error is not None)
            reasons.append(got.finish_reason)
        assert set(reasons) == {"error", "length"}
        strict_json(output)

    def test_streams_steps_forks_and_aborts(self, engine):
        *_, last = engine.stream([1, 2, 90], drawn())
        assert last.finished and last.outputs[0].finish_reason == "error"
        engine.add_request([1, 2, 90], drawn(), "bad")
        params, want = healthy([1, 2, 3], max_tokens=20)
        engine.add_request([1, 2, 3], params, "good")
        reported = []
        while not reported:
            reported = engine.step()
        assert [output.request_id for output in reported] == ["bad"]
        for call in (engine.fork, engine.abort):
            with pytest.raises(KeyError, match="no live request 'bad'"):
                call("bad")
        assert everything([run_steps(engine)["good"]]) == [want]

    def test_the_best_are_those_without_an_error(self, engine):
        params = SamplingParams(max_tokens=30, temperature=2.0, seed=1, n=2, best_of=8)
        (output,) = engine.generate([HEALTHY[0]], params)
        assert [c.finish_reason for c in output.outputs] == ["length", "length"]

    @pytest.mark.parametrize("n", [1, 2])
    def test_a_search_ends_with_the_error(self, engine, n):
        params, want = crowd()
        search = SamplingParams(max_tokens=6, beam_width=2, n=n, logprobs=1)
        outputs = engine.generate([*HEALTHY, [1, 2, 90]], [*params, search])
        assert tuple(everything(outputs[:3])) == want
        (completion,) = outputs[3].outputs
        assert (completion.finish_reason, completion.token_ids) == ("error", [])
        assert "NaN or infinite logits" in completion.error
        strict_json(outputs[3])

    def test_a_search_in_its_middle_keeps_its_beams(self, engine):
        """Some wide search comes upon a poisonous token: all of them are beams after a step."""
        params = SamplingParams(max_tokens=8, beam_width=8, n=8)
        for prompt in prompts_of([6] * 40, seed=3):
            (output,) = engine.generate([prompt], params)
            if any(c.finish_reason == "error" for c in output.outputs):
                break
        assert len(output.outputs) == 8
        assert all(c.token_ids and math.isfinite(c.score) for c in output.outputs)
        assert {c.finish_reason for c in output.outputs} == {"error"}
        assert any(c.token_ids[-1] in POISON for c in output.outputs)
        assert all("NaN or infinite" in c.error for c in output.outputs)
        strict_json(output)

    def test_nobody_uses_the_pages(self, engine):
        (head,) = prompts_of([24], seed=5)
        engine.reset_prefix_cache()
        hits = []
        for tail in ([1], [1], [90], [1], [1]):
            engine.reset_stats()
            engine.generate([head + tail], drawn(max_tokens=1))
            hits.append(engine.stats().totals.num_hit_tokens)
        assert hits == [0, 24, 24, 0, 24]

    def test_who_uses_them_already_goes_on(self, engine):
        """Others that began with the same page keep it, and add to it."""
        (head,) = prompts_of([24], seed=6)
        params, want = healthy([*head, 1], max_tokens=20)
        engine.add_request([*head, 1], params, "good")
        for _ in range(4):
            engine.step()
        engine.add_request([*head, 90], drawn(), "bad")
        done = run_steps(engine)
        assert everything([done["good"]]) == [want]
        assert done["bad"].outputs[0].finish_reason == "error"
        engine.reset_prefix_cache()
        assert engine.stats().num_cached_pages == 0

    def test_the_message_names_float16(self):
        engine = tiny_engine(**EXACT | dict(page_size=16), dtype="float16")
        # Fine in float32; on their way through the MLP they overflow float16.
        engine._runner.params = jax.tree.map(lambda x: x * 300, engine._runner.params)
        (output,) = engine.generate([[1, 2, 3]], drawn())
        assert "float16 overflows" in output.outputs[0].error
        assert "dtype='bfloat16' or 'float32'" in output.outputs[0].error


@pytest.fixture(scope="module")
def spoken():
    """An engine with text: one token a letter."""
    letters = [chr(ord("!") + i) for i in range(TINY.vocab_size - 1)]
    vocab = {letter: i for i, letter in enumerate(letters)} | {"[UNK]": TINY.vocab_size - 1}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="[UNK]"))
    tokenizer.decoder = decoders.Fuse()
    return tiny_engine(tokenizer, **EXACT)


class PanicException(BaseException):
    """As tokenizers raises it: no Exception."""


class TestIsolation:
    """Faults that are planted in what the host does with the tokens of one request."""

    PROMPTS = ("hello", "faulty", "world")

    @pytest.fixture
    def right(self, spoken):
        return everything(spoken.generate([*self.PROMPTS], CROWD))

    @pytest.mark.parametrize("fault", [ValueError, MemoryError, PanicException])
    @pytest.mark.parametrize("where", ["add", "flush"])
    def test_text(self, spoken, right, monkeypatch, where, fault):
        function, new_text = getattr(TextStream, where), ResultReader._new_text
        faulty, texts = spoken.tokenizer.encode("faulty").ids, []

        def noted(self, request, stop):
            text = new_text(self, request, stop)
            if request.prompt_token_ids == faulty:
                texts.append([text, 0])
            return text

        def planted(self, *args):
            for note in texts:
                note[1] += note[0] is self
                if note[0] is self and (where == "flush" or note[1] > 4):
                    raise fault("planted")
            return function(self, *args)

        monkeypatch.setattr(ResultReader, "_new_text", noted)
        monkeypatch.setattr(TextStream, where, planted)
        outputs = spoken.generate([*self.PROMPTS], CROWD)
        assert everything(outputs)[::2] == right[::2]
        for completion, (tokens, logprobs, _) in zip(outputs[1].outputs, right[1], strict=True):
            assert completion.finish_reason == "error"
            assert (
                completion.error == f"its tokens could not be processed: {fault.__name__}: planted"
            )
            count = len(completion.token_ids)
            assert count == (5 if where == "add" else 12)
            assert completion.token_ids == tokens[:count]
            assert completion.logprobs == logprobs[:count]
        spoken.check_invariants()

    def test_stop_strings_log_probabilities_and_parameters(self, spoken, right):
        """Wrong types that slipped past every check."""
        for name, value in (("stop_token_ids", 3), ("ignore_eos", Faulty())):
            requests = zip(self.PROMPTS, CROWD, strict=True)
            ids = [spoken.add_request(prompt, params) for prompt, params in requests]
            object.__setattr__(spoken._live.by_id[ids[1]].params, name, value)
            done = run_steps(spoken)
            outputs = [done[request_id] for request_id in ids]
            assert everything(outputs)[::2] == right[::2]
            if name == "stop_token_ids":
                assert {c.finish_reason for c in outputs[1].outputs} == {"error"}
                assert "TypeError" in outputs[1].outputs[0].error

    def test_the_text_of_a_fork(self, spoken, right, monkeypatch):
        """Which is made anew where special tokens are kept: refused, and nobody else is harmed."""

        def planted(self, *args):
            raise ValueError("planted")

        ids = [spoken.add_request(p, s) for p, s in zip(self.PROMPTS, CROWD, strict=True)]
        forked = spoken.add_request("hello", SamplingParams(max_tokens=12), "forked")
        while not spoken._live.by_id[forked].sequences[0].generated_token_ids:
            spoken.step()
        with monkeypatch.context() as patch:
            patch.setattr(TextStream, "add", planted)
            with pytest.raises(ValueError, match=r"'forked' cannot be forked: .*planted"):
                spoken.fork(forked, 2, SamplingParams(max_tokens=12, skip_special_tokens=False))
        done = run_steps(spoken)
        assert everything([done[i] for i in ids]) == right

    def test_the_text_of_beams(self, spoken, right, monkeypatch):
        def planted(self, *args):
            raise ValueError("planted")

        params = SamplingParams(max_tokens=5, beam_width=3, n=2)
        (clean,) = spoken.generate(["beams"], params)
        spoken.add_request("hello", CROWD[0], "good")
        spoken.add_request("beams", params, "beams")
        with monkeypatch.context() as patch:
            patch.setattr(TextStream, "flush", planted)
            outputs = {}
            while "beams" not in outputs:
                outputs |= {output.request_id: output for output in spoken.step()}
        beams = outputs["beams"].outputs
        assert [c.token_ids for c in beams[:2]] == [c.token_ids for c in clean.outputs]
        assert beams[-1].finish_reason == "error" and "planted" in beams[-1].error
        run_steps(spoken)

    def test_an_interrupt_is_no_fault_of_a_request(self, spoken, right, monkeypatch):
        def planted(self, *args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(TextStream, "add", planted)
            with pytest.raises(KeyboardInterrupt):
                spoken.generate([*self.PROMPTS], CROWD)
        assert everything(spoken.generate([*self.PROMPTS], CROWD)) == right


class Faulty:
    def __bool__(self):
        raise ValueError("planted")
