# SPDX-License-Identifier: Apache-2.0
"""Sharing pages changes what is computed and copied, and nothing that comes out."""

import functools
import logging
import pkgutil

import numpy as np
import pytest

import pallas_kernels
from jpaged import SamplingParams
from jpaged.outputs import GenerationInterrupted
from tests.jpaged.tiny import TINY, prompts_of, tiny_engine, tiny_params, token_ids

# One shape of step, so that log-probabilities are equal to the last bit.
EXACT = dict(deterministic=True, page_size=8, max_num_batched_tokens=32, max_num_seqs=8)


def drawn(seed=1, **params):
    return SamplingParams(**(dict(max_tokens=12, temperature=1.2, seed=seed, logprobs=2) | params))


def everything(outputs):
    """All that a caller sees but times."""
    return [[(c.token_ids, c.logprobs, c.finish_reason) for c in o.outputs] for o in outputs]


def run_steps(engine, check=lambda: None):
    """Steps to the end; returns the finished outputs by request id."""
    done = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        engine.check_invariants()
        check()
    return done


def with_prefix(lengths, prefix=40):
    (head,) = prompts_of([prefix], seed=9)
    return [head + tail for tail in prompts_of(lengths)]


class TestPrefixCache:
    def test_the_same_on_and_off_cold_and_warm(self):
        prompts = with_prefix([3, 17, 8, 1, 30])
        params = [drawn(seed) for seed in range(5)]
        off = tiny_engine(**EXACT, prefix_cache=False).generate(prompts, params)
        engine = tiny_engine(**EXACT)
        cold = engine.generate(prompts, params)
        hits = engine.stats().totals.num_hit_tokens
        warm = engine.generate(prompts, params)
        assert everything(cold) == everything(off) == everything(warm)
        # The first computes the 40 tokens, in two steps; what begins with the same waits for none.
        assert hits >= 3 * 40
        assert engine.stats().totals.num_hit_tokens - hits >= 5 * 40
        engine.check_invariants()

    def test_hits_by_hand(self):
        engine = tiny_engine(**EXACT)
        (prompt,) = prompts_of([40])
        engine.generate([prompt], drawn(max_tokens=1))
        engine.reset_stats()
        engine.generate([prompt], drawn(max_tokens=1))
        totals = engine.stats().totals
        # All five pages are known; the last token is computed again, in a copy of its page.
        assert (totals.num_lookup_tokens, totals.num_hit_tokens) == (40, 39)
        assert (totals.num_prefill_tokens, totals.num_page_copies) == (1, 1)
        engine.reset_stats()
        engine.generate([[*prompt[:20], (prompt[20] + 1) % TINY.vocab_size]], drawn(max_tokens=1))
        assert engine.stats().totals.num_hit_tokens == 16
        assert engine.stats().hit_rate == 16 / 21

    def test_an_answer_is_a_prefix_too(self):
        engine = tiny_engine(**EXACT)
        (prompt,) = prompts_of([10])
        (output,) = engine.generate([prompt], drawn(max_tokens=30))
        engine.reset_stats()
        again = prompt + output.outputs[0].token_ids + [1, 2, 3]
        engine.generate([again], drawn())
        # The last token of the answer was never attended to: 39 tokens fill four pages of 8.
        assert engine.stats().totals.num_hit_tokens == 32

    def test_off_finds_nothing(self):
        engine = tiny_engine(**EXACT, prefix_cache=False)
        engine.generate(prompts_of([40]), drawn())
        engine.generate(prompts_of([40]), drawn())
        assert engine.stats().totals.num_hit_tokens == 0
        assert engine.stats().num_cached_pages == 0

    def test_salts_keep_requests_apart(self):
        engine = tiny_engine(**EXACT)
        (prompt,) = prompts_of([24])
        hits = []
        for salt in ("a", "b", "a", None, None):
            engine.reset_stats()
            engine.add_request(prompt, drawn(), cache_salt=salt)
            run_steps(engine)
            hits.append(engine.stats().totals.num_hit_tokens)
        assert hits == [0, 0, 23, 0, 23]

    def test_what_is_kept_is_evicted_when_pages_are_needed(self):
        engine = tiny_engine(**EXACT, num_pages=14)
        prompts = prompts_of([40] * 12)
        params = [drawn(seed) for seed in range(12)]
        outputs = engine.generate(prompts, params)
        assert engine.stats().num_cached_pages > 0
        again = engine.generate(prompts, params)
        assert everything(outputs) == everything(again)
        roomy = tiny_engine(**EXACT).generate(prompts, params)
        assert everything(outputs) == everything(roomy)
        engine.check_invariants()

    def test_new_weights_need_new_pages(self):
        engine = tiny_engine(**EXACT)
        prompts = prompts_of([40])
        engine.generate(prompts, drawn())
        engine._runner.params = tiny_params(seed=1)
        engine.reset_prefix_cache()
        assert engine.stats().num_cached_pages == 0
        fresh = tiny_engine(**EXACT, prefix_cache=False)
        fresh._runner.params = tiny_params(seed=1)
        want = everything(fresh.generate(prompts, drawn()))
        assert everything(engine.generate(prompts, drawn())) == want

    def test_pages_in_use_cannot_be_forgotten(self):
        engine = tiny_engine(**EXACT)
        request_id = engine.add_request(prompts_of([20])[0], drawn())
        engine.step()
        with pytest.raises(RuntimeError, match="2 addressed pages are in use: finish or abort"):
            engine.reset_prefix_cache()
        engine.abort(request_id)
        engine.reset_prefix_cache()

    def test_pages_that_were_never_computed_are_not_found(self, monkeypatch):
        """A step that is planned but waits for a compilation is dropped with its last request."""
        engine = tiny_engine(page_size=8, max_num_batched_tokens=16)
        first, second = prompts_of([4, 40])
        want = tiny_engine(page_size=8).generate([second], drawn())
        one = engine.add_request(first, drawn())
        engine.step()
        two = engine.add_request(second, drawn())
        monkeypatch.setattr(engine._runner, "is_compiled", lambda batch: False)
        engine.step()
        assert engine._planned is not None and engine._planned[0].addressed
        engine.abort(one)
        engine.abort(two)
        monkeypatch.undo()
        assert token_ids(engine.generate([second], drawn())) == token_ids(want)
        engine.check_invariants()

    def test_an_error_in_a_step_forgets_all_pages(self, monkeypatch):
        engine = tiny_engine(**EXACT)
        (prompt,) = prompts_of([40])
        want = everything(tiny_engine(**EXACT).generate([prompt], drawn()))

        def fail(*_):
            raise RuntimeError("device lost")

        monkeypatch.setattr(engine._runner, "run", fail)
        with pytest.raises(RuntimeError, match="device lost"):
            engine.generate([prompt], drawn())
        monkeypatch.undo()
        assert engine.stats().num_cached_pages == 0
        assert everything(engine.generate([prompt], drawn())) == want
        assert engine.stats().totals.num_hit_tokens == 0


class TestSamples:
    def test_a_prompt_is_held_once_and_only_what_diverges_is_copied(self):
        engine = tiny_engine(
            max_model_len=256, page_size=16, max_num_batched_tokens=64, num_pages=120
        )
        (prompt,) = prompts_of([180])
        engine.add_request(prompt, drawn(n=8, max_tokens=40))
        full, most = 180 // 16, 0

        def check():
            nonlocal most
            stats = engine.stats()
            most = max(most, stats.num_used_pages)
            # The full pages once, and each sample's own.
            assert stats.num_used_pages <= full + 8 * -(-(180 % 16 + 40) // 16)

        (output,) = run_steps(engine, check).values()
        assert len({tuple(c.token_ids) for c in output.outputs}) == 8
        assert most > full + 8
        # Eight owners of the partial page: seven copies, the last owner writes in place.
        assert engine.stats().totals.num_page_copies == 7

    @pytest.mark.parametrize("page_size", [1, 2])
    def test_utilisation_stays_above_96_percent(self, page_size):
        """Of small pages: eight partial pages of 16 tokens waste more than that by themselves."""
        engine = tiny_engine(max_model_len=256, page_size=page_size, num_pages=1 + 1200)
        engine.add_request(prompts_of([200])[0], drawn(n=8, max_tokens=40))

        def check():
            assert engine.stats().utilisation >= 0.96

        run_steps(engine, check)

    def test_more_samples_than_places(self):
        (prompt,) = prompts_of([21])
        want = tiny_engine(**EXACT | dict(max_num_seqs=8)).generate([prompt], drawn(n=8))
        engine = tiny_engine(**EXACT | dict(max_num_seqs=3))
        outputs = engine.generate([prompt, prompt[:5]], [drawn(n=50), drawn(2)])
        samples = everything(outputs)[0]
        assert len(samples) == 50 and samples[:8] == everything(want)[0]
        assert engine.stats().totals.peak_running == 3
        # Those that started later found the two full pages of the prompt.
        assert engine.stats().totals.num_hit_tokens >= 40 // 3 * 16

    def test_samples_are_reported_as_they_end(self):
        engine = tiny_engine(max_num_seqs=2)
        params = drawn(n=6, max_tokens=5)
        ended = []
        for output in engine.stream(prompts_of([9])[0], params):
            ended.append(sum(c.finish_reason is not None for c in output.outputs))
        assert ended == sorted(ended)
        assert {2, 4, 6} <= set(ended) and ended[-1] == 6

    def test_best_of_returns_the_likeliest_a_token(self):
        (prompt,) = prompts_of([9])
        (every,) = tiny_engine(**EXACT).generate([prompt], drawn(n=7))
        (best,) = tiny_engine(**EXACT).generate([prompt], drawn(n=2, best_of=7))
        ranked = sorted(
            every.outputs, key=lambda c: c.cumulative_logprob / len(c.token_ids), reverse=True
        )
        assert best.outputs == ranked[:2]

    def test_best_of_is_not_known_before_the_end(self):
        engine = tiny_engine()
        with pytest.raises(ValueError, match="which of best_of=3 samples are the best is known"):
            engine.stream([1, 2], drawn(n=2, best_of=3))


MODES = [
    dict(preemption="recompute"),
    dict(preemption="swap"),
    dict(preemption="swap", swap_bytes=20_000),
    dict(preemption="auto", swap_bytes_per_s=1e12, flops_per_s=1e9),
    dict(preemption="auto", swap_bytes_per_s=1e3, flops_per_s=1e12),
    dict(preemption="swap", prefix_cache=False),
    dict(preemption="recompute", prefix_cache=False),
]


CROWD_PROMPTS = with_prefix([1, 9, 30, 14, 20, 5, 11], prefix=12)
CROWD = (
    [drawn(seed, max_tokens=20) for seed in range(4)]
    + [drawn(5, n=3, max_tokens=20)]
    + [SamplingParams(max_tokens=16, beam_width=3, n=3, logprobs=2)] * 2
)


@pytest.fixture(scope="module")
def roomy():
    """What the crowd gets where there are pages for all."""
    return everything(tiny_engine(**EXACT).generate(CROWD_PROMPTS, CROWD))


class TestPreemption:
    @pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
    def test_outputs_are_the_same_in_every_mode(self, mode, roomy):
        engine = tiny_engine(**EXACT, num_pages=16, **mode)
        ids = [
            engine.add_request(prompt, params)
            for prompt, params in zip(CROWD_PROMPTS, CROWD, strict=True)
        ]
        done = run_steps(engine)
        assert everything([done[i] for i in ids]) == roomy
        totals = engine.stats().totals
        assert totals.num_preemptions > 0
        swaps = mode["preemption"] == "swap" or mode.get("swap_bytes_per_s") == 1e12
        assert (totals.num_swapped_pages > 0) == swaps

    def test_any_order_of_arrival(self, roomy):
        for order in ([6, 5, 4, 3, 2, 1, 0], [4, 0, 6, 2, 5, 1, 3]):
            engine = tiny_engine(**EXACT, num_pages=16, preemption="swap")
            outputs = engine.generate([CROWD_PROMPTS[i] for i in order], [CROWD[i] for i in order])
            assert everything(outputs) == [roomy[i] for i in order]

    def test_each_preemption_says_who_why_which_way_and_what_it_costs(self, caplog):
        engine = tiny_engine(
            **EXACT, num_pages=10, preemption="auto", swap_bytes_per_s=1e9, flops_per_s=1e9
        )
        with caplog.at_level(logging.INFO, logger="jpaged.scheduler"):
            engine.generate(prompts_of([30, 30]), drawn(max_tokens=30))
        lines = [r.getMessage() for r in caplog.records if "preempted" in r.getMessage()]
        # A page: 2 layers, 2 heads, 8 slots, 32 lanes of 4 bytes, there and back.
        swap_ms = 4 * 2 * 2 * 2 * 8 * 32 * 4 / 1e9 * 1e3
        token_ms = 2 * TINY.num_params / 1e9 * 1e3
        assert lines == [
            "preempted request '1' (sequence 0), as request '1' needs pages: 4 pages swapped to "
            f"host memory (32 tokens; swapping costs {swap_ms:.1f} ms, computing "
            f"{32 * token_ms:.1f} ms)"
        ]

    def test_samples_of_a_request_share_again_after_they_come_back(self):
        for preemption in ("swap", "recompute"):
            engine = tiny_engine(**EXACT, num_pages=17, preemption=preemption)
            first = engine.add_request(prompts_of([30])[0], drawn(max_tokens=60))
            engine.add_request(prompts_of([40])[0], drawn(n=4, max_tokens=20))
            while not engine.stats().totals.num_preemptions:
                engine.step()
            assert engine.stats().totals.num_preemptions == 4
            engine.abort(first)
            shared = 0

            def look(engine=engine):
                nonlocal shared
                shared = max(shared, engine.stats().num_shared_pages)

            run_steps(engine, look)
            assert shared >= 40 // 8


class TestFork:
    def test_a_greedy_fork_does_what_its_parent_does(self):
        engine = tiny_engine(**EXACT)
        (prompt,) = prompts_of([21])
        greedy = SamplingParams(max_tokens=24, temperature=0, logprobs=1)
        parent = engine.add_request(prompt, greedy)
        for _ in range(6):
            engine.step()
        before = engine.stats().num_used_pages
        forks = engine.fork(parent, 3)
        assert engine.stats().num_used_pages == before
        assert engine.stats().num_saved_pages >= 3 * 2
        done = run_steps(engine)
        want = everything([done[parent]])
        assert all(everything([done[fork]]) == want for fork in forks)
        assert done[forks[0]].outputs[0].cumulative_logprob == pytest.approx(
            done[parent].outputs[0].cumulative_logprob, abs=1e-5
        )

    def test_drawn_forks_differ_and_repeat(self):
        runs = []
        for _ in range(2):
            engine = tiny_engine(**EXACT)
            parent = engine.add_request(prompts_of([5])[0], drawn(seed=3, max_tokens=20))
            for _ in range(5):
                engine.step()
            forks = engine.fork(parent, 4)
            done = run_steps(engine)
            runs.append([done[i].outputs[0].token_ids for i in [parent, *forks]])
        assert runs[0] == runs[1]
        known = 4  # read by then
        assert len({tuple(tokens[:known]) for tokens in runs[0]}) == 1
        assert len({tuple(tokens) for tokens in runs[0]}) == 5

    @pytest.mark.parametrize("mode", ["recompute", "swap"])
    def test_forks_of_forks_in_a_crowd(self, mode):
        """Against the same continuations, asked for with what was known as the prompt."""
        engine = tiny_engine(**EXACT, num_pages=20, preemption=mode)
        (prompt,) = prompts_of([17])
        leaves = {engine.add_request(prompt, drawn(max_tokens=40)): (prompt, 1)}
        for _ in range(3):
            for _ in range(4):
                engine.step()
                engine.check_invariants()
            parent = engine._requests[list(leaves)[-1]].sequences[0]
            known = list(parent.token_ids)
            for fork in engine.fork(list(leaves)[-1], 2):
                leaves[fork] = known, engine._requests[fork].seed
        done = run_steps(engine)
        assert engine.stats().totals.num_preemptions > 0
        for leaf, (known, seed) in leaves.items():
            alone = drawn(seed, max_tokens=57 - len(known))
            (output,) = tiny_engine(**EXACT).generate([known], alone)
            want = known[17:] + output.outputs[0].token_ids
            assert done[leaf].outputs[0].token_ids == want
            assert done[leaf].outputs[0].logprobs[len(known) - 17 :] == output.outputs[0].logprobs

    def test_refusals(self):
        engine = tiny_engine()
        several = engine.add_request([1, 2, 3], drawn(n=2))
        beams = engine.add_request([1, 2, 3], SamplingParams(max_tokens=9, beam_width=2))
        one = engine.add_request([1, 2, 3], drawn(max_tokens=9))
        for _ in range(5):
            engine.step()
        with pytest.raises(KeyError, match="no live request 'x'"):
            engine.fork("x")
        for request_id in (several, beams):
            with pytest.raises(ValueError, match="has several samples or beams: only a request"):
                engine.fork(request_id)
        with pytest.raises(ValueError, match="k=0 must be at least 1"):
            engine.fork(one, 0)
        with pytest.raises(ValueError, match=r"max_tokens=2 must exceed the \d tokens"):
            engine.fork(one, 1, drawn(max_tokens=2))
        with pytest.raises(ValueError, match="forks have one sample each"):
            engine.fork(one, 1, drawn(n=2))
        assert engine.stats().num_running + engine.stats().num_waiting == 5
        run_steps(engine)

    def test_what_a_fork_reports(self):
        engine = tiny_engine()
        parent = engine.add_request([1, 2, 3], drawn(max_tokens=9))
        for _ in range(5):
            engine.step()
        (fork,) = engine.fork(parent)
        done = run_steps(engine)
        first = done[fork].time_to_first_token_s
        assert 0 < first == pytest.approx(done[parent].time_to_first_token_s)
        assert first <= done[fork].latency_s
        assert len(done[fork].outputs[0].logprobs) == len(done[fork].outputs[0].token_ids)

    def test_parameters_of_forks_are_checked_like_others(self):
        engine = tiny_engine()
        parent = engine.add_request([1, 2, 3], drawn(max_tokens=9, logprobs=None))
        for _ in range(5):
            engine.step()
        for params, message in (
            (drawn(stop="x", logprobs=None), "needs a tokenizer"),
            (drawn(logprobs=98), "exceeds the vocabulary of 97"),
            (drawn(logprobs=1), "cannot be given for the tokens before the fork"),
        ):
            with pytest.raises(ValueError, match=message):
                engine.fork(parent, 1, params)
        run_steps(engine)


class TestInterrupts:
    """Whatever a step was doing, the engine is as new after it."""

    @pytest.mark.parametrize(
        "where",
        [
            "jpaged.page_table.PageTable.append",
            "jpaged.page_table.PageTable.free",
            "jpaged.prefix_cache.PrefixCache.address",
            "jpaged.scheduler.Scheduler.finish",
            "jpaged.scheduler.Scheduler.advance_beams",
            "jpaged.swap.SwapSpace.swap_out",
        ],
    )
    def test_in_the_middle_of_the_books(self, where, monkeypatch, roomy):
        engine = tiny_engine(**EXACT, num_pages=16, preemption="swap")
        module, _, name = where.rpartition(".")
        owner = pkgutil.resolve_name(module)
        function = getattr(owner, name)
        calls = 0

        def interrupted(*args, **options):
            nonlocal calls
            calls += 1
            result = function(*args, **options)
            if calls == 3:
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(GenerationInterrupted) as interrupt:
                engine.generate(CROWD_PROMPTS, CROWD)
        assert len(interrupt.value.outputs) == len(CROWD)
        assert not engine.has_unfinished_requests
        engine.check_invariants()
        assert everything(engine.generate(CROWD_PROMPTS, CROWD)) == roomy

    def test_a_callback_may_abort_or_fail(self):
        engine = tiny_engine()
        (output,) = engine.generate(
            [[1, 2]],
            drawn(max_tokens=50),
            on_step=lambda: [*map(engine.abort, [*engine._requests])],
        )
        assert output.outputs[0].finish_reason == "abort"
        with pytest.raises(ZeroDivisionError):
            engine.generate([[1, 2]], drawn(), on_step=lambda: 1 / 0)
        assert not engine.has_unfinished_requests
        engine.generate([[1, 2]], drawn())


class TestBeams:
    def test_identical_searches_in_the_smallest_pool(self):
        engine = tiny_engine(page_size=5, num_pages=3, max_model_len=11, preemption="recompute")
        params = SamplingParams(max_tokens=2, beam_width=2, n=2)
        first, second = engine.generate([[1, 2, 3, 4]] * 2, params)
        assert first.outputs == second.outputs

    @pytest.mark.parametrize("penalty", [500.0, -500.0])
    def test_a_penalty_that_no_score_survives_is_refused(self, penalty):
        engine = tiny_engine()
        params = SamplingParams(max_tokens=50, beam_width=2, length_penalty=penalty)
        with pytest.raises(ValueError, match=f"length_penalty={penalty} makes scores of 50 tokens"):
            engine.add_request([1, 2], params)

    def test_warmed_up_searches_compile_nothing(self):
        engine = tiny_engine(max_num_seqs=4, max_num_batched_tokens=8, num_pages=40)
        params = SamplingParams(max_tokens=6, beam_width=3)
        engine.warm_up(searches=[params])
        engine.generate([[1, 2, 3]], params)
        assert engine.stats().num_unplanned_compilations == 0

    def test_sliding_windows(self, monkeypatch):
        """No model here has one, so attention gets it behind the decoder's back."""
        attend = pallas_kernels.paged_attention
        windowed = functools.partial(attend, sliding_window=6)
        monkeypatch.setattr(pallas_kernels, "paged_attention", windowed)
        params = SamplingParams(max_tokens=12, beam_width=4, n=4, logprobs=1)
        prompts = prompts_of([20, 9])
        want = everything(tiny_engine(**EXACT).generate(prompts, params))
        small = tiny_engine(**EXACT, num_pages=12, preemption="recompute")
        assert everything(small.generate(prompts, params)) == want
        assert small.stats().totals.num_preemptions > 0
        monkeypatch.setattr(pallas_kernels, "paged_attention", attend)
        assert everything(tiny_engine(**EXACT).generate(prompts, params)) != want

    def test_against_a_search_over_lists(self):
        """Whose log-probabilities are those of single tokens after whole prompts."""
        model = tiny_engine(page_size=16)

        def logprobs_after(tokens):
            params = SamplingParams(max_tokens=1, temperature=0, logprobs=TINY.vocab_size)
            (output,) = model.generate([tokens], params)
            return output.outputs[0].logprobs[0]

        (prompt,) = prompts_of([13])
        beams = [(0.0, [])]
        for _ in range(6):
            best = sorted(
                (
                    (score + logprob, [*tokens, token])
                    for score, tokens in beams
                    for token, logprob in logprobs_after(prompt + tokens).items()
                ),
                reverse=True,
            )
            beams = best[:3]
        params = SamplingParams(max_tokens=6, beam_width=3, n=3, logprobs=2, length_penalty=0.0)
        (output,) = tiny_engine(page_size=4).generate([prompt], params)
        assert [c.token_ids for c in output.outputs] == [tokens for _, tokens in beams]
        for completion, (score, _) in zip(output.outputs, beams, strict=True):
            assert completion.score == pytest.approx(score, abs=1e-4)
            assert completion.cumulative_logprob == completion.score
            chosen = [
                of_token[token]
                for of_token, token in zip(completion.logprobs, completion.token_ids, strict=True)
            ]
            np.testing.assert_allclose(sum(chosen), score, atol=1e-4)
            assert all(2 <= len(of_token) <= 3 for of_token in completion.logprobs)
            assert completion.finish_reason == "length"

    def test_at_most_a_page_a_beam_is_copied_in_a_step(self, monkeypatch):
        engine = tiny_engine(page_size=8)
        copies = []
        run = engine._runner.run

        def counting(batch, pairs):
            copies.append(len(list(pairs)))
            return run(batch, pairs)

        monkeypatch.setattr(engine._runner, "run", counting)
        engine.generate(prompts_of([20]), SamplingParams(max_tokens=30, beam_width=5))
        assert 0 < max(copies) <= 5
        assert engine.stats().mean_saving > 0.2

    def test_an_abort_returns_the_best_so_far(self):
        engine = tiny_engine()
        request_id = engine.add_request([5, 6, 7], SamplingParams(max_tokens=50, beam_width=4, n=2))
        for _ in range(7):
            engine.step()
        output = engine.abort(request_id)
        assert [c.finish_reason for c in output.outputs] == ["abort", "abort"]
        assert output.outputs[0].score >= output.outputs[1].score
        assert len(output.outputs[0].token_ids) >= 2
        engine.check_invariants()
        assert not engine.has_unfinished_requests

    def test_beams_and_samples_in_one_batch_do_not_meet(self):
        prompts = prompts_of([9, 12, 15])
        search = SamplingParams(max_tokens=10, beam_width=4, n=4, logprobs=1)
        each = [search, drawn(1, n=2), drawn(2)]
        together = tiny_engine(**EXACT).generate(prompts, each)
        for prompt, params, output in zip(prompts, each, together, strict=True):
            (alone,) = tiny_engine(**EXACT).generate([prompt], params)
            assert everything([alone]) == everything([output])
