# SPDX-License-Identifier: Apache-2.0
"""Samples and forks share pages, which changes nothing that comes out."""

import pytest

from jpaged import SamplingParams
from tests.jpaged.exact import EXACT, drawn, everything, run_steps
from tests.jpaged.tiny import prompts_of, tiny_engine


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

    @pytest.mark.parametrize(
        "page_size", [1, pytest.param(2, marks=(pytest.mark.nightly, pytest.mark.slow))]
    )
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

    @pytest.mark.parametrize("prefix_cache", [True, False])
    def test_a_fork_that_waits_its_turn_draws_the_same(self, prefix_cache):
        forks, (prompt, other) = [], prompts_of([21, 30])
        for is_urgent in (False, True):
            engine = tiny_engine(**EXACT, prefix_cache=prefix_cache)
            parent = engine.add_request(prompt, drawn(seed=3, max_tokens=20))
            for _ in range(6):
                engine.step()
            if is_urgent:
                engine.add_request(other, drawn(max_tokens=4, priority=-1))
            (fork,) = engine.fork(parent)
            assert engine.stats().num_waiting == 2 * is_urgent
            forks.append(run_steps(engine)[fork])
        alone, waited = everything(forks)
        assert alone == waited

    @pytest.mark.parametrize(
        "mode",
        [pytest.param("recompute", marks=(pytest.mark.nightly, pytest.mark.slow)), "swap"],
    )
    def test_forks_of_forks_in_a_crowd(self, mode):
        """Against the same continuations, asked for with what was known as the prompt."""
        engine = tiny_engine(**EXACT, num_pages=20, preemption=mode)
        (prompt,) = prompts_of([17])
        leaves = {engine.add_request(prompt, drawn(max_tokens=40)): (prompt, 1)}
        for _ in range(3):
            for _ in range(4):
                engine.step()
                engine.check_invariants()
            parent = engine._live.by_id[list(leaves)[-1]].sequences[0]
            known = list(parent.token_ids)
            for fork in engine.fork(list(leaves)[-1], 2):
                leaves[fork] = known, engine._live.by_id[fork].seed
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
