# SPDX-License-Identifier: Apache-2.0
"""The engine end to end: right tokens, whatever the schedule; sharing; endings; refusals."""

import dataclasses
import itertools
import json
import logging
import pathlib

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.host.batch import StepShape
from jpaged.host.outputs import GenerationInterrupted
from jpaged.models import checkpoint
from tests import tolerances
from tests.jpaged.tiny import TINY, prompts_of, tiny_engine, token_ids

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "hf"
# Other families: see tests/models/test_families.py.
CASES = [
    "llama3_rope_hd80_tied",
    "llama_gqa5_hd48_untied",
    "llama_linear_rope_mqa",
    "qwen3_gqa5_hd48_tied",
    "qwen3_mha_hd80_untied_sharded",
]
NIGHTLY = (pytest.mark.nightly, pytest.mark.slow)

# Pages for two of the longest sequences below, so that a crowd preempts.
SMALL_POOL = dict(num_pages=14, page_size=8, max_num_batched_tokens=16, max_num_seqs=4)


class TestHuggingFace:
    """Recorded greedy continuations, token for token; see record_hf_fixtures.py."""

    @pytest.mark.parametrize(
        ("case", "config"),
        [
            # The others' layers scanned: see tests/models/test_families.py.
            *((case, {}) for case in (CASES[0], CASES[4])),
            pytest.param(CASES[1], {}, marks=NIGHTLY),
            *(
                pytest.param(case, dict(scan_layers=True, page_size=4), marks=NIGHTLY)
                for case in CASES[2:4]
            ),
            # Many shapes to compile: 10 s each.
            (CASES[0], SMALL_POOL),
            *(pytest.param(case, SMALL_POOL, marks=NIGHTLY) for case in CASES[1:]),
        ],
    )
    def test_greedy_is_equal(self, case, config):
        expected = json.loads((FIXTURES / case / "expected.json").read_text())
        engine = Engine.load(FIXTURES / case, EngineConfig(max_model_len=96, **config))
        params = SamplingParams(max_tokens=24, temperature=0, logprobs=5)
        outputs = engine.generate(expected["prompts"], params)
        assert [output.outputs[0].token_ids for output in outputs] == expected["continuations"]
        for record in expected["top_logprobs"]:
            found = outputs[record["prompt"]].outputs[0].logprobs
            for mine, ids, values in zip(
                found, record["token_ids"], record["logprobs"], strict=True
            ):
                np.testing.assert_allclose([mine[i] for i in ids], values, atol=tolerances.LOGPROB)
        assert (engine.stats().totals.num_preemptions > 0) == (config == SMALL_POOL)
        engine.check_invariants()

    def test_greedy_is_equal_after_orbax(self, tmp_path):
        case = FIXTURES / CASES[0]
        config, params = checkpoint.load(case, np.float32)
        checkpoint.save_orbax(tmp_path, config, params)
        expected = json.loads((case / "expected.json").read_text())
        engine = Engine.load(tmp_path, EngineConfig(max_model_len=96))
        outputs = engine.generate(expected["prompts"], SamplingParams(max_tokens=24, temperature=0))
        assert [output.outputs[0].token_ids for output in outputs] == expected["continuations"]


LENGTHS = (1, 2, 9, 16, 17, 33, 40)


def varied_params(seed):
    return SamplingParams(
        max_tokens=20, temperature=1.3, top_k=40, top_p=0.95, min_p=0.01, seed=seed
    )


@pytest.fixture(scope="module")
def alone():
    """The tokens of each request by itself."""
    engine = tiny_engine()
    return [
        engine.generate([prompt], varied_params(i))[0].outputs[0].token_ids
        for i, prompt in enumerate(prompts_of(LENGTHS))
    ]


class TestScheduleIndependence:
    @pytest.mark.parametrize(
        "config",
        [
            {},
            SMALL_POOL,
            pytest.param(dict(page_size=1), marks=NIGHTLY),
            pytest.param(dict(page_size=64), marks=NIGHTLY),
            pytest.param(dict(max_num_batched_tokens=5), marks=NIGHTLY),
            pytest.param(dict(max_num_seqs=2), marks=NIGHTLY),
            dict(scan_layers=True),
            dict(reservation="max"),
        ],
        ids=lambda config: "-".join(f"{k}={v}" for k, v in config.items()) or "crowd",
    )
    def test_sampled_tokens_are_the_same(self, config, alone):
        engine = tiny_engine(**config)
        params = [varied_params(i) for i in range(len(LENGTHS))]
        outputs = engine.generate(prompts_of(LENGTHS), params)
        assert [output.outputs[0].token_ids for output in outputs] == alone
        assert len({tuple(tokens) for tokens in alone}) == len(LENGTHS)
        if config == SMALL_POOL:
            assert engine.stats().totals.num_preemptions > 0

    def test_arrival_order_does_not_matter(self, alone):
        engine = tiny_engine()
        prompts = prompts_of(LENGTHS)
        ids, done = {}, {}
        for i in (5, 0, 3):
            ids[engine.add_request(prompts[i], varied_params(i))] = i
        for late in (6, 1, 4, 2):
            for output in engine.step():
                done[ids[output.request_id]] = output
            ids[engine.add_request(prompts[late], varied_params(late))] = late
        while engine.has_unfinished_requests:
            for output in engine.step():
                done[ids[output.request_id]] = output
        assert [done[i].outputs[0].token_ids for i in range(len(prompts))] == alone

    def test_deterministic_engine_is_exact_to_the_bit(self):
        """Log-probabilities, not only tokens, are equal alone, in a crowd and under preemption."""
        prompts = prompts_of(LENGTHS)
        params = [
            SamplingParams(max_tokens=20, temperature=1.0, seed=i, logprobs=1)
            for i in range(len(prompts))
        ]
        shape = dict(max_num_seqs=6, max_num_batched_tokens=16, deterministic=True)
        alone = tiny_engine(**shape)
        want = [alone.generate([p], s)[0].outputs[0] for p, s in zip(prompts, params, strict=True)]
        for config in (shape, shape | dict(num_pages=14, page_size=8), shape | dict(page_size=2)):
            engine = tiny_engine(**config)
            for output, expected in zip(engine.generate(prompts, params), want, strict=True):
                assert output.outputs[0].token_ids == expected.token_ids
                assert output.outputs[0].logprobs == expected.logprobs
            assert (engine.stats().totals.num_preemptions > 0) == ("num_pages" in config)


class TestParallelSamples:
    def test_samples_share_the_prompt_and_copy_on_write(self):
        engine = tiny_engine(page_size=8, num_pages=40)
        (prompt,) = prompts_of([21])  # two full pages and a partial one
        engine.add_request(prompt, SamplingParams(max_tokens=30, n=6, seed=1))
        engine.step()
        stats = engine.stats()
        assert (stats.num_used_pages, stats.num_shared_pages) == (3, 3)
        engine.step()
        stats = engine.stats()
        # Five of the six copied the partial page; the last owner writes in place.
        assert stats.totals.num_page_copies == 5
        assert (stats.num_used_pages, stats.num_shared_pages) == (2 + 6, 2)
        engine.check_invariants()
        while engine.has_unfinished_requests:
            outputs = engine.step()
            engine.check_invariants()
        assert engine.stats().totals.num_page_copies == 5
        assert len({tuple(sample.token_ids) for sample in outputs[0].outputs}) == 6

    def test_full_last_page_is_not_copied(self):
        engine = tiny_engine(page_size=8)
        engine.generate(prompts_of([16]), SamplingParams(max_tokens=12, n=4, seed=1))
        assert engine.stats().totals.num_page_copies == 0

    @pytest.mark.parametrize(
        "config",
        [pytest.param({}, id="roomy", marks=NIGHTLY), pytest.param(SMALL_POOL, id="small_pool")],
    )
    def test_each_sample_is_what_it_is_in_any_company(self, config):
        prompts = prompts_of([21, 5, 16, 30])
        params = SamplingParams(max_tokens=15, n=3, seed=7)
        engine = tiny_engine(**config)
        together = token_ids(engine.generate(prompts, params))
        engine.check_invariants()
        alone = tiny_engine()
        assert together == [token_ids(alone.generate([p], params))[0] for p in prompts]
        first = SamplingParams(max_tokens=15, n=1, seed=7)
        assert [samples[0] for samples in together] == [
            samples[0] for samples in token_ids(alone.generate(prompts, first))
        ]
        if config:
            assert engine.stats().totals.num_preemptions > 0

    def test_greedy_samples_are_equal(self):
        outputs = tiny_engine().generate(
            prompts_of([10]), SamplingParams(max_tokens=8, temperature=0, n=3)
        )
        assert token_ids(outputs)[0][0] == token_ids(outputs)[0][1] == token_ids(outputs)[0][2]


class TestEndings:
    def test_stop_token_ids_and_eos(self):
        (prompt,) = prompts_of([10])
        free = tiny_engine().generate([prompt], SamplingParams(max_tokens=20, temperature=0))
        tokens = free[0].outputs[0].token_ids
        assert free[0].outputs[0].finish_reason == "length"
        cut = tokens.index(tokens[7]) + 1
        stop = SamplingParams(max_tokens=20, temperature=0, stop_token_ids=(tokens[7],))
        (stopped,) = tiny_engine().generate([prompt], stop)
        assert stopped.outputs[0].token_ids == tokens[:cut]
        assert stopped.outputs[0].finish_reason == "stop"

        eos = dataclasses.replace(TINY, eos_token_ids=(tokens[7],))
        engine = tiny_engine(model_config=eos)
        (ended,) = engine.generate([prompt], SamplingParams(max_tokens=20, temperature=0))
        assert ended.outputs[0].token_ids == tokens[:cut]
        ignoring = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        (went_on,) = engine.generate([prompt], ignoring)
        assert went_on.outputs[0].token_ids == tokens
        engine.check_invariants()

    def test_length_is_bounded_by_max_model_len(self):
        engine = tiny_engine(max_model_len=32)
        (output,) = engine.generate(prompts_of([30]), SamplingParams(max_tokens=50))
        assert len(output.outputs[0].token_ids) == 2
        assert output.outputs[0].finish_reason == "length"

    def test_abort_frees_everything_and_returns_what_there_is(self):
        engine = tiny_engine()
        first = engine.add_request(prompts_of([10])[0], SamplingParams(max_tokens=50, n=2))
        second = engine.add_request(prompts_of([12])[0], SamplingParams(max_tokens=5, seed=3))
        for _ in range(4):
            engine.step()
        output = engine.abort(first)
        assert output.finished
        assert [s.finish_reason for s in output.outputs] == ["abort", "abort"]
        assert len(output.outputs[0].token_ids) == len(output.outputs[1].token_ids) >= 1
        with pytest.raises(KeyError, match=first):
            engine.abort(first)
        while engine.has_unfinished_requests:
            done = engine.step()
        assert done[0].request_id == second
        alone = tiny_engine().generate(prompts_of([12]), SamplingParams(max_tokens=5, seed=3))
        assert token_ids(done) == token_ids(alone)
        engine.check_invariants()

    def test_stream_grows_and_ends(self):
        engine = tiny_engine()
        (prompt,) = prompts_of([10])
        params = SamplingParams(max_tokens=6, seed=5)
        counts = [len(o.outputs[0].token_ids) for o in engine.stream(prompt, params)]
        assert counts == [1, 2, 3, 4, 5, 6]
        stream = engine.stream(prompt, params)
        next(stream)
        stream.close()
        assert not engine.has_unfinished_requests
        engine.check_invariants()

    def test_interrupt_returns_what_was_produced(self):
        engine = tiny_engine(max_num_seqs=2)
        steps = iter(range(100))

        def interrupt():
            if next(steps) == 8:
                raise KeyboardInterrupt

        params = [SamplingParams(max_tokens=n, seed=n) for n in (3, 40, 40)]
        with pytest.raises(GenerationInterrupted) as caught:
            engine.generate(prompts_of([4, 5, 6]), params, on_step=interrupt)
        assert [output.finished for output in caught.value.outputs] == [True, False, False]
        reasons = [output.outputs[0].finish_reason for output in caught.value.outputs]
        assert reasons == ["length", "abort", "abort"]
        produced = caught.value.outputs[1].outputs[0].token_ids
        assert 1 <= len(produced) <= 8
        engine.check_invariants()
        again = engine.generate(prompts_of([4]), params[:1])
        assert token_ids(again) == token_ids(caught.value.outputs[:1])
        (whole,) = engine.generate(prompts_of([4, 5])[1:], params[1])
        assert whole.outputs[0].token_ids[: len(produced)] == produced


@pytest.fixture(scope="module")
def tokenizer():
    """One token a letter, so that every stop string straddles tokens."""
    letters = [chr(ord("!") + i) for i in range(TINY.vocab_size - 1)]
    vocab = {letter: i for i, letter in enumerate(letters)} | {"[UNK]": TINY.vocab_size - 1}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="[UNK]"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


class TestText:
    def test_text_and_stop_strings(self, tokenizer):
        engine = tiny_engine(tokenizer)
        params = dict(max_tokens=20, seed=11)
        (free,) = engine.generate(["hello"], SamplingParams(**params))
        text = free.outputs[0].text
        assert free.prompt_token_ids == [ord(c) - ord("!") for c in "hello"]
        assert text == tokenizer.decode(free.outputs[0].token_ids)
        stop = text[5:8]
        (cut,) = engine.generate(["hello"], SamplingParams(stop=stop, **params))
        assert cut.outputs[0].text == text[: text.index(stop)]
        assert cut.outputs[0].finish_reason == "stop"
        assert len(cut.outputs[0].token_ids) == text.index(stop) + 3

    def test_streamed_text_is_never_taken_back(self, tokenizer):
        engine = tiny_engine(tokenizer)
        (free,) = engine.generate(["hello"], SamplingParams(max_tokens=20, seed=11))
        text = free.outputs[0].text
        stops = (text[5:8], text[3:5] + "\x7f")  # the second begins, but never comes
        seen = [
            output.outputs[0].text
            for output in engine.stream("hello", SamplingParams(max_tokens=20, seed=11, stop=stops))
        ]
        assert all(b.startswith(a) for a, b in itertools.pairwise(seen))
        assert seen[-1] == text[: text.index(stops[0])]

    def test_special_tokens(self, tokenizer):
        """Left out of the text or kept, in samples, forks and beams; found as a stop string."""
        special = Tokenizer.from_str(tokenizer.to_str())
        special.add_special_tokens([chr(i) for i in range(ord("!"), ord("T"))])
        engine = tiny_engine(special)
        drawn = dict(max_tokens=30, seed=11, ignore_eos=True)
        (whole,) = engine.generate(["xyz"], SamplingParams(skip_special_tokens=False, **drawn))
        ids, text = whole.outputs[0].token_ids, whole.outputs[0].text
        assert text == special.decode(ids, skip_special_tokens=False) and len(text) == 30
        hidden = special.decode(ids)
        assert 0 < len(hidden) < 30
        (shown,) = engine.generate(["xyz"], SamplingParams(**drawn))
        assert (shown.outputs[0].token_ids, shown.outputs[0].text) == (ids, hidden)

        at = next(i for i, c in enumerate(text) if i > 4 and c < "T" and c not in text[:i])
        (cut,) = engine.generate(["xyz"], SamplingParams(stop=text[at], **drawn))
        assert cut.outputs[0].text == special.decode(ids[:at])
        assert cut.outputs[0].token_ids == ids[: at + 1]
        assert cut.outputs[0].finish_reason == "stop"

        parent = engine.add_request("xyz", SamplingParams(**drawn), stream=True)
        while len(engine.step()[-1:]) == 0:
            pass
        kept = SamplingParams(skip_special_tokens=False, **drawn)
        (child,) = engine.fork(parent, params=kept)
        done = {}
        while engine.has_unfinished_requests:
            done |= {o.request_id: o.outputs[0] for o in engine.step()}
        assert done[child].text == special.decode(done[child].token_ids, skip_special_tokens=False)
        assert done[parent].text == hidden

        (beams,) = engine.generate(
            ["xyz"],
            SamplingParams(max_tokens=30, beam_width=2, ignore_eos=True, skip_special_tokens=False),
        )
        for beam in beams.outputs:
            assert beam.text == special.decode(beam.token_ids, skip_special_tokens=False)

    def test_a_prompt_that_ends_inside_a_character(self):
        tokens = [f"<0x{byte:02X}>" for byte in (0xC3, *range(0xA0, 0xC0))]
        vocab = {token: i for i, token in enumerate(tokens * 2)}
        vocab |= {f"{chr(ord('a') + i)}": 33 + i for i in range(TINY.vocab_size - 33)}
        fallback = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="a"))
        fallback.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        engine = tiny_engine(fallback)
        prompt = [40, vocab["<0xC3>"]]
        outputs = engine.generate([prompt] * 8, SamplingParams(max_tokens=4))
        for output in outputs:
            ids = output.outputs[0].token_ids
            whole = fallback.decode([*prompt, *ids])
            known = fallback.decode(prompt)
            same = known if whole.startswith(known) else known[:-1]  # the last is a mark
            assert output.outputs[0].text == whole[len(same) :]


class TestRefusals:
    """Bad input is refused before any work, and loses nothing."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls):
        return tiny_engine(**SMALL_POOL)

    @pytest.mark.parametrize(
        ("prompt", "params", "message"),
        [
            ([], {}, "prompt is empty"),
            ("", {}, "prompt is empty"),
            ("text", {}, r"no tokenizer\.json"),
            ([1, 97], {}, r"token id 97 is outside the vocabulary, \[0, 97\)"),
            ([-1], {}, "token id -1 is outside"),
            ([1] * 128, {}, "prompt of 128 tokens leaves no room .*max_model_len=128"),
            ([1] * 100, dict(max_tokens=20), "need 15 pages of 8 tokens, but the pool has 13"),
            ([1], dict(beam_width=5), "beam_width=5 exceeds the 4 beams that a step computes"),
            ([1], dict(beam_width=4, max_tokens=99), "for each of 4 beams need 52 pages of 8"),
            ([1], dict(stop="x"), "stop=.* needs a tokenizer"),
            ([1], dict(logprobs=98), "logprobs=98 exceeds the vocabulary of 97"),
        ],
    )
    def test_request(self, engine, prompt, params, message):
        params = SamplingParams(**(dict(max_tokens=4) | params))
        with pytest.raises(ValueError, match=message):
            engine.generate([[1, 2], prompt], [SamplingParams(max_tokens=4), params])
        assert not engine.has_unfinished_requests
        with pytest.raises(ValueError, match=message):
            engine.add_request(prompt, params)
        assert len(engine.generate([[1, 2]], SamplingParams(max_tokens=4))) == 1

    def test_an_id_is_in_use_until_its_last_output_was_returned(self):
        engine = tiny_engine()
        engine.add_request([1], SamplingParams(max_tokens=4), "mine")
        engine.generate([[1]], SamplingParams(max_tokens=9))
        with pytest.raises(ValueError, match="'mine' is in use"):
            engine.add_request([1], SamplingParams(max_tokens=4), "mine")
        (output,) = engine.step()
        assert output.request_id == "mine" and output.finished
        engine.add_request([1], SamplingParams(max_tokens=4), "mine")

    def test_one_string_and_unpaired_params(self):
        engine = tiny_engine()
        with pytest.raises(ValueError, match=r"wrap it in \[ \]"):
            engine.generate("hello", SamplingParams(max_tokens=4))
        with pytest.raises(ValueError, match="1 SamplingParams do not pair with 2 prompts"):
            engine.generate([[1], [2]], [SamplingParams(max_tokens=4)])

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (dict(page_size=0), "page_size=0 must be at least 1"),
            (dict(num_pages=1), "num_pages=1 must be at least 2"),
            (dict(dtype="int8"), "dtype='int8' must be"),
            (dict(memory_fraction=0.0), "memory_fraction=0.0 must be in"),
            (dict(max_model_len=300), "max_model_len=300 exceeds .*max_position_embeddings=256"),
            (dict(reservation="min"), "reservation='min' must be"),
            (dict(backend="tpu"), "backend 'tpu' on platform 'cpu': its kernels run on"),
            (dict(backend="cuda"), "backend='cuda'"),
            (dict(deterministic=True, max_num_batched_tokens=8), "deterministic needs"),
            (dict(memory_fraction=1e-12), "holds 0 pages of 8192 bytes"),
        ],
    )
    def test_config(self, config, message):
        with pytest.raises(ValueError, match=message):
            tiny_engine(**config)


class TestBookkeeping:
    def test_pool_is_sized_from_memory_and_says_so(self, caplog):
        with caplog.at_level(logging.INFO, "jpaged"):
            engine = tiny_engine(page_size=16)
        assert "65 pages of 8.0 KiB" in caplog.text  # 8 sequences of 128 tokens, and the null page
        assert "available host memory" in caplog.text
        assert engine.stats().num_usable_pages == 64

    def test_no_compilation_after_warm_up(self, caplog):
        engine = tiny_engine(max_num_batched_tokens=32)
        engine.warm_up()
        compiled = engine.stats().num_compilations
        assert compiled > 0
        with caplog.at_level(logging.WARNING, "jpaged"):
            engine.generate(prompts_of([1, 3, 20, 31, 50]), SamplingParams(max_tokens=9, n=3))
        assert engine.stats().num_compilations == compiled
        assert engine.stats().num_unplanned_compilations == 0
        assert not caplog.records

    def test_jax_itself_compiles_nothing_after_warm_up(self, caplog):
        """The engine counts traces; a new placement of an argument compiles without one."""

        def compilations(engine):
            caplog.clear()
            jax.config.update("jax_log_compiles", True)
            try:
                engine.generate(prompts_of([20]), SamplingParams(max_tokens=4, seed=1))
            finally:
                jax.config.update("jax_log_compiles", False)
            return [r for r in caplog.records if r.getMessage().startswith("Compiling ")]

        engine = tiny_engine()
        assert compilations(engine)
        # Orbax restores to a named device, unlike arrays made by computing.
        demo = FIXTURES.parent.parent.parent / "models" / "demo"
        engine = Engine.load(demo, EngineConfig(max_num_seqs=4))
        engine.warm_up([StepShape(32, 4), StepShape(1, 1)])
        assert not compilations(engine)

    def test_unplanned_compilation_is_logged_with_its_shape(self, caplog):
        engine = tiny_engine()
        engine.warm_up([StepShape(1, 1)])
        with caplog.at_level(logging.WARNING, "jpaged"):
            engine.generate(prompts_of([20]), SamplingParams(max_tokens=2))
        assert engine.stats().num_unplanned_compilations > 0
        assert "after warm-up for a step of 32x4 with" in caplog.text

    def test_totals(self):
        engine = tiny_engine(page_size=8)
        engine.generate(prompts_of([20, 7]), SamplingParams(max_tokens=10, ignore_eos=True))
        stats = engine.stats()
        totals = stats.totals
        assert totals.num_prefill_tokens == 27
        assert totals.num_generated_tokens == 20
        assert totals.num_decode_tokens == 18
        assert totals.peak_running == 2
        # 29 and 16 cells at the end: the last token of each needs none.
        assert totals.peak_used_pages == 4 + 2
        assert stats.contiguous_pages == 2 * 16
        assert 0.8 < stats.mean_utilisation < 1
        assert stats.utilisation == 1.0 and stats.num_used_pages == 0
        assert stats.prefill_tokens_per_s > 0 and stats.decode_tokens_per_s > 0
        engine.reset_stats()
        assert engine.stats().totals.num_generated_tokens == 0

    def test_progress_bar_goes_to_standard_error(self, capfd):
        tiny_engine().generate(prompts_of([3, 4]), SamplingParams(max_tokens=3), progress=True)
        out, err = capfd.readouterr()
        assert out == "" and "2/2" in err and "tokens/s" in err
