# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from jpaged.simulation.lengths import SHAREGPT, LogNormal, Uniform, parse_lengths


class TestLengths:
    def test_specs_parse(self):
        assert parse_lengths("64", "prompt") == Uniform(64, 64)
        assert parse_lengths("uniform:32,96", "prompt") == Uniform(32, 96)
        assert parse_lengths("lognormal:mean=161,sigma=1.2", "prompt") == LogNormal(161, 1.2)
        assert parse_lengths("lognormal:sigma=0.5,mean=10", "output") == LogNormal(10, 0.5)
        assert parse_lengths("sharegpt", "prompt").mean == 161.31
        assert parse_lengths("sharegpt", "output").mean == 337.99

    @pytest.mark.parametrize(
        "spec",
        [
            "",
            "0",
            "-3",
            "1.5",
            "many",
            "uniform:5",
            "uniform:9,3",
            "uniform:0,3",
            "uniform:1,2,3",
            "lognormal:161,1.2",
            "lognormal:mean=161",
            "lognormal:mean=0,sigma=1",
            "lognormal:mean=10,sigma=-1",
            "lognormal:mean=nan,sigma=1",
            "lognormal:mean=10,sigma=1,skew=2",
            "sharegpt:3",
        ],
    )
    def test_bad_specs_say_what_is_possible(self, spec):
        with pytest.raises(ValueError, match=r"prompt lengths .*lognormal:mean=M,sigma=S") as error:
            parse_lengths(spec, "prompt")
        assert repr(spec) in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("lengths", "mean", "deviation"),
        [
            (Uniform(7, 7), 7, 0),
            (Uniform(10, 30), 20, math.sqrt((21**2 - 1) / 12)),
            # The deviation of a log-normal is mean * sqrt(exp(sigma^2) - 1).
            (SHAREGPT["prompt"], 161.31, 161.31 * math.sqrt(math.expm1(1.2**2))),
            (SHAREGPT["output"], 337.99, 337.99 * math.sqrt(math.expm1(0.9**2))),
        ],
    )
    def test_mean_is_as_asked(self, lengths, mean, deviation):
        count = 40_000
        drawn = lengths.draw(np.random.default_rng(0), count)
        assert drawn.min() >= lengths.least
        # Four standard errors; rounding, and raising what rounds to 0, moves a mean by less than
        # half a token.
        assert abs(drawn.mean() - mean) <= 4 * deviation / math.sqrt(count) + 0.5 * (deviation > 0)

    def test_alpaca_has_the_papers_means(self):
        assert parse_lengths("alpaca", "prompt").mean == 19.31
        assert parse_lengths("alpaca", "output").mean == 58.45
        with pytest.raises(ValueError, match="alpaca:1"):
            parse_lengths("alpaca:1", "prompt")
