# SPDX-License-Identifier: Apache-2.0
"""Sampling beside exact distributions, computed in float64 by sorting."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jpaged.device import sampling
from jpaged.host.batch import SamplingRows

DTYPES = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "seeds": np.uint32,
    "sample_indices": np.uint32,
    "positions": np.int32,
}
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

sample = jax.jit(sampling.sample)
apply_filter = jax.jit(sampling._filter)


def make_rows(count, size=None, **columns):
    """`count` rows of the given parameters, each a number for all or one for each.

    As many plain ones are added as make them `size`.
    """
    default = PLAIN | {"seeds": 0, "sample_indices": 0, "positions": 0}
    return SamplingRows(
        **{
            name: jnp.concatenate(
                [
                    jnp.broadcast_to(jnp.asarray(columns.get(name, value), DTYPES[name]), count),
                    jnp.full((size or count) - count, value, DTYPES[name]),
                ]
            )
            for name, value in default.items()
        }
    )


def padded(logits):
    """Gives small batches one shape, so that few programs are compiled; -inf is no token."""
    rows, vocab_size = logits.shape
    if rows > 64 or vocab_size > 40:
        return jnp.asarray(logits)
    values = {"constant_values": ((0, 0), (0, -np.inf))}
    return jnp.asarray(np.pad(logits, ((0, 64 - rows), (0, 40 - vocab_size)), **values))


def draw(logits, count=None, **columns):
    """Tokens and log-probabilities, for one row of logits repeated or for several."""
    logits = np.asarray(logits, np.float32)
    if logits.ndim == 1:
        logits = np.broadcast_to(logits, (count, len(logits)))
    count = len(logits)
    logits = padded(logits)
    tokens, logprobs = sample(logits, make_rows(count, len(logits), **columns))
    assert tokens.dtype == jnp.int32 and logprobs.dtype == jnp.float32
    return np.asarray(tokens)[:count], np.asarray(logprobs)[:count]


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def kept_by_sorting(logits, top_k=0, top_p=1.0, min_p=0.0):
    """bool[vocab_size] by the definition of each filter, in turn, with ties kept whole."""
    logits = np.asarray(logits, np.float64)
    kept = np.ones(len(logits), bool)
    if top_k:
        edge = np.sort(logits)[::-1][min(top_k, len(logits)) - 1]
        kept &= logits >= edge
    probs = softmax(np.where(kept, logits, -np.inf))
    if top_p < 1:
        falling = np.sort(probs)[::-1]
        # How many it takes for their probability to reach top_p.
        edge = falling[np.searchsorted(np.cumsum(falling), top_p)]
        kept &= probs >= edge
    return kept & (probs >= min_p * probs.max())


def exact_distribution(logits, temperature=1.0, **filters):
    logits = np.asarray(logits, np.float64) / temperature
    return softmax(np.where(kept_by_sorting(logits, **filters), logits, -np.inf))


def check_frequencies(tokens, probs):
    """Pearson's chi-square test; a right sampler fails it with a probability below e^-8.

    Laurent & Massart 2000, lemma 1: P(chi2 >= df + 2 sqrt(df x) + 2 x) <= e^-x.
    """
    counts = np.bincount(tokens, minlength=len(probs))
    possible = probs > 0
    assert not counts[~possible].any()
    expected = len(tokens) * probs[possible]
    assert expected.min() > 10  # for the statistic to be near its limit
    chi2 = ((counts[possible] - expected) ** 2 / expected).sum()
    df = possible.sum() - 1
    assert chi2 <= df + 2 * math.sqrt(8 * df) + 16


def test_the_oracle_by_hand():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(exact_distribution(logits), [0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(exact_distribution(logits, top_k=2), [4 / 7, 3 / 7, 0, 0])
    np.testing.assert_allclose(exact_distribution(logits, top_p=0.6), [4 / 7, 3 / 7, 0, 0])
    np.testing.assert_allclose(exact_distribution(logits, top_p=0.71), [4 / 9, 3 / 9, 2 / 9, 0])
    np.testing.assert_allclose(exact_distribution(logits, min_p=0.6), [4 / 7, 3 / 7, 0, 0])
    # Of the two that top_k leaves, the first alone reaches 0.57 of the probability.
    np.testing.assert_allclose(exact_distribution(logits, top_k=2, top_p=0.57), [1, 0, 0, 0])
    np.testing.assert_allclose(
        exact_distribution(logits, temperature=0.5), np.array([16, 9, 4, 1]) / 30
    )


class TestGreedy:
    def test_is_argmax(self):
        logits = np.random.default_rng(0).standard_normal((50, 37))
        filters = {"top_k": 3, "top_p": 0.5, "min_p": 0.2}
        for columns in ({}, filters):
            tokens, _ = draw(logits, temperature=0, seeds=np.arange(50), **columns)
            np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))

    def test_ties_go_to_the_first(self):
        assert draw([[1, 3, 3, 0, 3]], temperature=0)[0] == [1]

    @pytest.mark.parametrize("vocab_size", [127, 128, 129, 1000])
    def test_ties_go_to_the_first_of_any_block(self, vocab_size):
        rng = np.random.default_rng(vocab_size)
        logits = -rng.random((40, vocab_size))  # below the zeros that pad nothing
        for row in logits:
            row[rng.choice(vocab_size, 3)] = 0.5 - rng.integers(2)
        logits[0, [vocab_size - 1]] = 2
        tokens, logprobs = draw(logits, temperature=0)
        np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))
        want = np.log([softmax(row)[token] for row, token in zip(logits, tokens, strict=True)])
        np.testing.assert_allclose(logprobs, want, rtol=1e-5)

    @pytest.mark.parametrize("number", [np.nan, -np.inf])
    def test_whatever_the_logits_the_token_is_of_the_vocabulary(self, number):
        logits = np.full((4, 130), number)
        logits[1, 129], logits[2, 3] = 1, np.inf
        logits[3], logits[3, 129] = 0, np.nan
        tokens, _ = draw(logits, temperature=0)
        assert ((tokens >= 0) & (tokens < 130)).all()
        if number == -np.inf:
            assert tokens[1] == 129 and sampling._first_largest(jnp.asarray(logits))[2] == 3

    def test_beside_rows_that_are_not(self):
        logits = np.random.default_rng(1).standard_normal((40, 37))
        temperature = np.where(np.arange(40) % 2, 5.0, 0.0)
        tokens, _ = draw(logits, temperature=temperature, seeds=np.arange(40), top_k=35)
        greedy = logits.argmax(axis=-1)
        np.testing.assert_array_equal(tokens[::2], greedy[::2])
        assert (tokens[1::2] != greedy[1::2]).sum() > 10

    def test_narrow_filters_leave_the_likeliest(self):
        logits = np.random.default_rng(2).standard_normal((60, 37))
        for columns in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
            tokens, _ = draw(logits, temperature=3, seeds=np.arange(60), **columns)
            np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))


# No mass is near a top_p below, and no probability near the edge of a min_p.
LOGITS = np.log([0.22, 0.17, 0.14, 0.12, 0.1, 0.08, 0.06, 0.05, 0.03, 0.02, 0.01])[
    [4, 9, 0, 7, 2, 10, 1, 5, 3, 8, 6]
]
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 100},
    {"top_p": 0.8},
    {"top_p": 0.3, "temperature": 2.0},
    {"min_p": 0.4},
    {"min_p": 0.3, "temperature": 1.5},
    {"top_k": 5, "top_p": 0.6},
    {"top_k": 9, "min_p": 0.2},
    {"top_p": 0.9, "min_p": 0.25},
    {"temperature": 0.8, "top_k": 6, "top_p": 0.85, "min_p": 0.3},
]


class TestDistribution:
    DRAWS = 20_000

    @pytest.fixture(scope="class")
    @classmethod
    def tokens(cls):
        """i32[DRAWS, settings]: rows of every kind beside one another, each draw another seed."""
        columns = {
            name: np.tile([setting.get(name, PLAIN[name]) for setting in SETTINGS], cls.DRAWS)
            for name in PLAIN
        }
        seeds = np.repeat(np.arange(cls.DRAWS), len(SETTINGS))
        tokens, _ = draw(LOGITS, len(seeds), seeds=seeds, **columns)
        return tokens.reshape(cls.DRAWS, len(SETTINGS))

    @pytest.mark.parametrize("setting", range(len(SETTINGS)), ids=lambda i: str(SETTINGS[i]))
    def test_frequencies(self, tokens, setting):
        check_frequencies(tokens[:, setting], exact_distribution(LOGITS, **SETTINGS[setting]))

    def test_the_settings_differ(self):
        """Otherwise a filter that does nothing could pass."""
        distributions = [exact_distribution(LOGITS, **setting) for setting in SETTINGS]
        different = {tuple(distribution.round(4)) for distribution in distributions}
        # A top_k beyond the vocabulary is none.
        assert len(different) == len(SETTINGS) - 1

    @pytest.mark.parametrize("axis", ["positions", "sample_indices"])
    def test_over_the_other_axes(self, axis):
        columns = {axis: np.arange(self.DRAWS), "seeds": 12345}
        tokens, _ = draw(LOGITS, self.DRAWS, **columns)
        check_frequencies(tokens, exact_distribution(LOGITS))

    @pytest.mark.parametrize("axis", ["seeds", "positions", "sample_indices"])
    def test_neighbours_are_independent(self, axis):
        """Pairs of tokens have the product of their distributions."""
        logits = np.log([0.5, 0.25, 0.15, 0.1])
        columns = {"seeds": 7, axis: np.arange(2 * self.DRAWS)}
        tokens, _ = draw(logits, 2 * self.DRAWS, **columns)
        probs = softmax(logits)
        check_frequencies(tokens[::2] * 4 + tokens[1::2], np.outer(probs, probs).reshape(-1))


class TestRandomness:
    LOGITS = np.random.default_rng(3).standard_normal((64, 50))
    COLUMNS: dict = {  # noqa: RUF012
        "temperature": np.where(np.arange(64) % 5, 1.3, 0),
        "top_k": np.arange(64) % 7,
        "top_p": np.where(np.arange(64) % 3, 1.0, 0.8),
        "min_p": np.where(np.arange(64) % 4, 0.0, 0.05),
        "seeds": np.arange(64) % 9,
        "sample_indices": np.arange(64) % 2,
        "positions": np.arange(64) * 3,
    }

    def draw(self, rows):
        columns = {name: column[rows] for name, column in self.COLUMNS.items()}
        return draw(self.LOGITS[rows], **columns)

    def test_does_not_depend_on_row_or_batch(self):
        tokens, logprobs = self.draw(np.arange(64))
        for rows in (np.arange(64)[::-1], np.array([3, 3, 60]), np.array([17])):
            again, logprobs_again = self.draw(rows)
            np.testing.assert_array_equal(again, tokens[rows])
            # Sums over another shape may be done in another order.
            np.testing.assert_allclose(logprobs_again, logprobs[rows], atol=2e-6)

    def test_seed_sample_and_position_each_matter(self):
        """Over so large a vocabulary the tokens of 125 keys are as good as distinct."""
        grid = np.stack(np.meshgrid(*[np.arange(5)] * 3), axis=-1).reshape(-1, 3)
        names = ("seeds", "sample_indices", "positions")
        tokens, _ = draw(np.zeros(2**15), len(grid), **dict(zip(names, grid.T, strict=True)))
        # 125^2 / 2 pairs meet with a probability of 2^-15 each: 0.24 collisions expected.
        assert len(set(tokens.tolist())) > len(grid) - 5

    def test_large_seeds(self):
        seeds = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
        tokens, _ = draw(np.zeros(2**15), 125, seeds=np.resize(seeds, 125))
        assert len(set(tokens.tolist())) == len(seeds)

    @pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
    def test_does_not_depend_on_the_default_generator(self, implementation):
        tokens, _ = self.draw(np.arange(64))
        with jax.default_prng_impl(implementation):
            again, _ = jax.jit(lambda *arguments: sampling.sample(*arguments))(
                jnp.asarray(self.LOGITS, jnp.float32), make_rows(64, **self.COLUMNS)
            )
        np.testing.assert_array_equal(again, tokens)


class TestFilter:
    def kept(self, logits, **columns):
        logits = np.atleast_2d(np.asarray(logits, np.float32))
        count, vocab_size = logits.shape
        whole = padded(logits)
        out = apply_filter(whole, make_rows(count, len(whole), **columns))
        out = np.asarray(out)[:count, :vocab_size]
        kept = out != -np.inf
        # What is kept is as it was.
        np.testing.assert_array_equal(out[kept], logits[kept])
        return kept

    def test_ties_at_the_edge_are_kept_whole(self):
        logits = np.log([1 / 2, 1 / 8, 1 / 8, 1 / 8, 1 / 16, 1 / 16])
        head = [[True] * 4 + [False] * 2]
        for k in (2, 3, 4):
            np.testing.assert_array_equal(self.kept(logits, top_k=k), head)
        for p in (0.51, 0.7, 0.8, 0.87):
            np.testing.assert_array_equal(self.kept(logits, top_p=p), head)
        for p in (0.126, 0.2, 0.249):
            np.testing.assert_array_equal(self.kept(logits, min_p=p), head)
        np.testing.assert_array_equal(self.kept(logits, top_k=1), [[True] + [False] * 5])
        np.testing.assert_array_equal(self.kept(logits, top_k=5), [[True] * 6])
        np.testing.assert_array_equal(self.kept(np.zeros(9), top_k=2), [[True] * 9])
        np.testing.assert_array_equal(self.kept(np.zeros(9), top_p=0.1, min_p=1.0), [[True] * 9])

    def test_zeros_of_both_signs_are_a_tie(self):
        assert self.kept([0.0, -0.0, -1.0], top_k=1).tolist() == [[True, True, False]]
        assert self.kept([-0.0, 0.0, -1.0], top_k=1).tolist() == [[True, True, False]]
        assert self.kept([-0.0, -1.0, -2.0], top_k=1).tolist() == [[True, False, False]]

    def test_reaching_top_p_exactly_is_enough(self):
        logits = np.log([1 / 2, 1 / 4, 1 / 8, 1 / 8])
        assert self.kept(logits, top_p=0.5).tolist() == [[True, False, False, False]]
        assert self.kept(logits, top_p=0.75).tolist() == [[True, True, False, False]]

    def test_no_ops_among_other_rows(self):
        """A row without filters is left as it is, to the last bit, whatever its neighbours do."""
        rng = np.random.default_rng(4)
        logits = (10 * rng.standard_normal((30, 1000))).astype(np.float32)
        logits[3::6, 500:] = -np.inf
        on = np.arange(30) % 3 > 0
        columns = {
            "top_k": np.where(on, 5, 0),
            "top_p": np.where(on, 0.5, 1.0),
            "min_p": np.where(on, 0.1, 0.0),
        }
        out = np.asarray(apply_filter(jnp.asarray(logits), make_rows(30, **columns)))
        np.testing.assert_array_equal(out[~on], logits[~on])
        assert (np.isfinite(out[on]).sum(axis=-1) <= 5).all()

    def test_each_filter_alone_changes_nothing_where_it_is_off(self):
        logits = np.random.default_rng(5).standard_normal((3, 40))
        for name, values in (("top_k", [0, 2, 40]), ("top_p", [1, 0.1, 1]), ("min_p", [0, 0.9, 0])):
            kept = self.kept(logits, **{name: values})
            assert kept.sum(axis=-1)[[0, 2]].tolist() == [40, 40]
            assert kept[1].sum() < 40

    def test_top_p_beyond_the_mass_that_rounding_leaves(self):
        """Nothing is cut where the sum of the probabilities falls short of top_p."""
        logits = np.random.default_rng(6).standard_normal((8, 5000))
        top_p = np.nextafter(np.float32(1), np.float32(0))
        kept = self.kept(logits, top_p=top_p)
        assert (kept.sum(axis=-1) > 4900).all()

    def test_extremes(self):
        logits = [
            [1e4, -1e4, 0, 9.99e3],
            [-np.inf, 1.0, -np.inf, 1.0],
            [-1e4, -1e4, -1e4 - 1, -np.inf],
            [3e38, -3e38, 0, 1],
        ]
        kept = self.kept(logits, top_k=2)
        assert kept[0].tolist() == [True, False, False, True]
        assert kept[1].tolist() == [False, True, False, True]
        assert kept[2].tolist() == [True, True, False, False]
        assert kept[3].tolist() == [True, False, False, True]
        kept = self.kept(logits, top_p=0.9)
        assert kept[0].tolist() == [True, False, False, False]
        assert kept[1].tolist() == [False, True, False, True]
        assert kept[2].tolist() == [True, True, True, False]
        assert kept[3].tolist() == [True, False, False, False]
        kept = self.kept(logits, min_p=0.5)
        assert kept[0].tolist() == [True, False, False, False]
        assert kept[1].tolist() == [False, True, False, True]
        assert kept[2].tolist() == [True, True, False, False]

    # Multiples of 1/8: exact in float32, and often tied.
    @given(
        rows=st.lists(
            st.tuples(
                st.lists(st.integers(-12, 12), min_size=12, max_size=12),
                st.one_of(st.just(0), st.integers(1, 14)),
                st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
                st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
            ),
            min_size=4,
            max_size=4,
        )
    )
    @settings(max_examples=150, deadline=None)
    def test_keeps_what_sorting_keeps(self, rows):
        want, logits = [], []
        for row, top_k, top_p, min_p in rows:
            row = np.array(row) / 8
            logits.append(row)
            want.append(kept_by_sorting(row, top_k, top_p, min_p))
            # Rounding decides where a mass or a probability is at the edge.
            probs = softmax(np.where(kept_by_sorting(row, top_k), row, -np.inf))
            mass = np.cumsum(np.sort(probs)[::-1])
            assume(top_p == 1 or np.abs(mass - top_p).min() > 1e-5)
            edge = min_p * probs.max()
            assume((np.abs(probs - edge) > 1e-5 * edge).all() or min_p in (0, 1))
        _, top_k, top_p, min_p = zip(*rows, strict=True)
        kept = self.kept(logits, top_k=top_k, top_p=top_p, min_p=min_p)
        np.testing.assert_array_equal(kept, want)

    # XLA takes subnormal numbers for zeros.
    @given(
        st.lists(
            st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=12, max_size=12
        ),
        st.integers(1, 12),
    )
    @settings(max_examples=150, deadline=None)
    def test_top_k_of_any_floats(self, row, top_k):
        row = np.array(row, np.float32)
        assume(row.max() < np.inf)
        kept = self.kept(row, top_k=top_k)[0]
        want = row >= np.sort(row)[::-1][top_k - 1]
        np.testing.assert_array_equal(kept, want & (row > -np.inf))


class TestExtremeLogits:
    @pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
    @pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0, 100.0])
    def test_only_possible_tokens(self, filters, temperature):
        logits = np.full((40, 6), -np.inf)
        logits[:, 2], logits[:, 4] = 1e4, -1e4
        logits[::2, 0] = 1e4
        columns = {"temperature": temperature, "seeds": np.arange(40)}
        tokens, logprobs = draw(logits, **columns, **filters)
        assert set(tokens[1::2]) == {2}
        assert set(tokens[::2]) == ({0} if temperature == 0 else {0, 2})
        # Half a unit in the last place of 1e4.
        np.testing.assert_allclose(logprobs[1::2], 0, atol=5e-4)
        np.testing.assert_allclose(logprobs[::2], -math.log(2), atol=5e-4)

    @pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}], ids=str)
    @pytest.mark.parametrize("temperature", [1e-30, 2e-38, 1e-44])
    def test_a_tiny_temperature_is_nearly_greedy(self, filters, temperature):
        logits = np.tile([9.0, 11.0, 10.0, -20.0], (20, 1))
        tokens, _ = draw(logits, temperature=temperature, seeds=np.arange(20), **filters)
        assert set(tokens) == {1}


class TestLogprobs:
    def test_of_the_model_as_it_is(self):
        """Neither temperature nor filters change what is reported."""
        logits = 3 * np.random.default_rng(8).standard_normal((30, 200))
        for columns in ({}, {"temperature": 0}, {"temperature": 2, "top_k": 5, "top_p": 0.7}):
            tokens, logprobs = draw(logits, seeds=np.arange(30), **columns)
            want = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            np.testing.assert_allclose(logprobs, want[np.arange(30), tokens], atol=1e-5)

    def test_of_large_logits(self):
        """A constant added to all logits changes no probability; nor does it cost precision."""
        logits = [[10_000.0, 10_000.0, 9_999.0, -10_000.0]]
        tokens, logprobs = draw(logits, temperature=0)
        want = -math.log(2 + math.exp(-1))
        np.testing.assert_allclose(logprobs, want, atol=1e-6)
        _, top = sampling.top_logprobs(jnp.asarray(logits), 1)
        np.testing.assert_allclose(top[0, 0], want, atol=1e-6)
        assert tokens == [0]

    def test_top_logprobs(self):
        logits = np.random.default_rng(9).standard_normal((5, 40)).astype(np.float32)
        tokens, logprobs = jax.jit(sampling.top_logprobs, static_argnums=1)(jnp.asarray(logits), 4)
        want = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
        order = np.argsort(-logits, axis=-1)[:, :4]
        np.testing.assert_array_equal(tokens, order)
        assert tokens.dtype == jnp.int32 and logprobs.dtype == jnp.float32
        np.testing.assert_allclose(logprobs, np.take_along_axis(want, order, axis=-1), atol=1e-5)


def test_filters_are_not_computed_where_no_row_wants_them():
    """A batch of greedy rows with filters runs neither the filters nor the generator."""
    calls = []

    def counted(*arguments):
        jax.debug.callback(lambda: calls.append(1))
        return original(*arguments)

    original = sampling._filter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_filter", counted)
        run = jax.jit(functools.partial(sampling.sample))
        logits = jnp.zeros((2, 8))
        for columns, filtered in (
            ({"temperature": 0, "top_k": 3}, False),
            ({"temperature": 1}, False),
            ({"temperature": [0, 1], "top_k": [3, 0]}, False),
            ({"temperature": [0, 1], "top_k": [0, 3]}, True),
            ({"top_p": [1, 0.5]}, True),
            ({"min_p": [0, 0.5]}, True),
        ):
            calls.clear()
            jax.block_until_ready(run(logits, make_rows(2, **columns)))
            jax.effects_barrier()
            assert bool(calls) == filtered
