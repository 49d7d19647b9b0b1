# SPDX-License-Identifier: Apache-2.0
"""Beam searches of the engine; tests/jpaged/test_beam_search_hf.py has transformers' results."""

import numpy as np
import pytest

from jpaged import SamplingParams
from tests.jpaged.exact import EXACT, drawn, everything
from tests.jpaged.tiny import TINY, prompts_of, tiny_engine, windowed


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
        engine.warm_up(params=[params])
        engine.generate([[1, 2, 3]], params)
        assert engine.stats().num_unplanned_compilations == 0

    def test_sliding_windows(self):
        params = SamplingParams(max_tokens=12, beam_width=4, n=4, logprobs=1)
        prompts = prompts_of([20, 9])
        model = windowed(6)
        want = everything(tiny_engine(model_config=model, **EXACT).generate(prompts, params))
        small = tiny_engine(model_config=model, **EXACT, num_pages=26, preemption="recompute")
        assert everything(small.generate(prompts, params)) == want
        assert small.stats().totals.num_preemptions > 0
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
