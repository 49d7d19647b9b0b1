# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from jpaged.simulation.lengths import ALPACA, Uniform
from jpaged.simulation.workload import make_workload


class TestWorkload:
    def test_equal_seeds_give_equal_requests(self):
        def make(seed):
            return make_workload(
                20, Uniform(1, 9), Uniform(1, 9), max_model_len=64, vocab_size=50, seed=seed
            )

        assert make(3) == make(3)
        assert make(3) != make(4)
        assert all(0 <= t < 50 for item in make(3).items for t in item.prompt_token_ids)

    def test_output_lengths_do_not_depend_on_the_prompts(self):
        outputs = [
            [item.num_output_tokens for item in work.items]
            for work in (
                make_workload(20, prompt, Uniform(1, 9), max_model_len=64, vocab_size=50, seed=0)
                for prompt in (Uniform(1, 9), Uniform(5, 5))
            )
        ]
        assert outputs[0] == outputs[1]

    def test_long_requests_are_cut_to_the_model(self):
        work = make_workload(
            4, Uniform(1, 100), Uniform(90, 90), max_model_len=100, vocab_size=50, seed=0
        )
        totals = [len(item.prompt_token_ids) + item.num_output_tokens for item in work.items]
        assert all(total <= 100 for total in totals)
        assert all(item.prompt_token_ids and item.num_output_tokens for item in work.items)
        assert work.num_cut == sum(len(item.prompt_token_ids) > 10 for item in work.items) > 0
        assert work.num_prompt_tokens + work.num_output_tokens == sum(totals)

    def test_lengths_that_never_fit_are_refused(self):
        with pytest.raises(ValueError, match="101 tokens at least, more than max_model_len=100"):
            make_workload(
                4, Uniform(60, 60), Uniform(41, 50), max_model_len=100, vocab_size=50, seed=0
            )


class TestArrivals:
    def test_come_at_the_rate_and_do_not_change_the_requests(self):
        poisson, at_once = (
            make_workload(
                4000, *ALPACA.values(), max_model_len=2048, vocab_size=1000, seed=1, rate=rate
            )
            for rate in (8.0, math.inf)
        )
        times = np.array([item.arrival_s for item in poisson.items])
        gaps = np.diff(times)
        # Mean and deviation of an exponential are equal; four standard errors.
        assert abs(gaps.mean() - 1 / 8) < 4 / 8 / math.sqrt(4000)
        assert abs(gaps.std() - 1 / 8) < 0.02
        assert all(item.arrival_s == 0 for item in at_once.items)
        assert [item.prompt_token_ids for item in poisson.items] == [
            item.prompt_token_ids for item in at_once.items
        ]

    def test_samples_reach_the_requests(self):
        lengths = Uniform(1, 9), Uniform(1, 9)
        work = make_workload(3, *lengths, max_model_len=64, vocab_size=50, seed=1, num_samples=4)
        assert [item.num_samples for item in work.items] == [4, 4, 4]


def test_a_description_is_of_the_mean_request():
    lengths = Uniform(5, 5), Uniform(2, 2)
    work = make_workload(4, *lengths, max_model_len=7, vocab_size=50, seed=0)
    expected = {"num_requests": 4, "prompt_mean": 5.0, "output_mean": 2.0, "num_cut": 0}
    assert work.describe() == expected
