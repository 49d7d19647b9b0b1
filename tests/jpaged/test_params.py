# SPDX-License-Identifier: Apache-2.0
"""Every rule of SamplingParams, at its edge, with the message a user sees."""

import dataclasses
import math
import re

import pytest

from jpaged.host.params import SamplingParams

REFUSED = [
    ("max_tokens", 0, "at least 1"),
    ("max_tokens", -3, "at least 1"),
    ("temperature", -0.1, "finite and at least 0 (0 is greedy)"),
    ("temperature", math.inf, "finite and at least 0 (0 is greedy)"),
    ("temperature", math.nan, "finite and at least 0 (0 is greedy)"),
    ("top_k", -1, "at least 0 (0 keeps every token)"),
    ("top_p", 0.0, "above 0 and at most 1 (1 keeps every token)"),
    ("top_p", -0.5, "above 0 and at most 1 (1 keeps every token)"),
    ("top_p", 1.01, "above 0 and at most 1 (1 keeps every token)"),
    ("top_p", math.nan, "above 0 and at most 1 (1 keeps every token)"),
    ("min_p", -0.01, "between 0 and 1 (0 keeps every token)"),
    ("min_p", 1.01, "between 0 and 1 (0 keeps every token)"),
    ("min_p", math.nan, "between 0 and 1 (0 keeps every token)"),
    ("repetition_penalty", 0.0, "finite and above 0 (1 is none)"),
    ("repetition_penalty", -1.0, "finite and above 0 (1 is none)"),
    ("repetition_penalty", math.nan, "finite and above 0 (1 is none)"),
    ("repetition_penalty", 1e38, "between 1e-30 and 1e+30"),
    ("temperature", 1e38, "at most 1e+30"),
    ("max_tokens", 2**31, "below 2**31"),
    ("min_tokens", -1, "at least 0"),
    ("suppress_tokens", (3, -1), "free of negative numbers"),
    ("presence_penalty", 2.1, "between -2 and 2 (0 is none)"),
    ("presence_penalty", math.nan, "between -2 and 2 (0 is none)"),
    ("frequency_penalty", -2.1, "between -2 and 2 (0 is none)"),
    ("logit_bias", ((1, 100.5),), "between -100 and 100"),
    ("logit_bias", ((1, math.nan),), "between -100 and 100"),
    ("logit_bias", ((-1, 1.0),), "free of negative tokens"),
    ("sequence_bias", (((), 1.0),), "free of sequences without a token"),
    ("sequence_bias", (((1, -1), 1.0),), "free of negative numbers"),
    ("sequence_bias", (((1,), math.inf),), "between -1e+30 and 1e+30"),
    ("bad_words_ids", ((1,), ()), "free of sequences without a token"),
    ("bad_words_ids", ((1, -1),), "free of negative numbers"),
    ("allowed_token_ids", (), "of at least one token"),
    ("allowed_token_ids", (3, -1), "free of negative numbers"),
    ("stop_token_ids", (3, -1), "free of negative numbers"),
    ("n", 0, "at least 1"),
    ("n", 16385, "at most 16384"),
    ("best_of", 16385, "at most 16384, or None"),
    ("beam_width", 16385, "at most 16384, or None"),
    ("seed", -1, "in [0, 2**32), or None"),
    ("seed", 2**32, "in [0, 2**32), or None"),
    ("stop", ("end", ""), "free of empty strings"),
    ("logprobs", -1, "at least 0, or None"),
    ("logprobs_mode", "processed", "'raw', 'temperature' or 'filters'"),
    ("prompt_logprobs", -1, "at least 0, or None"),
    ("best_of", 0, "at least n=1, or None"),
    ("beam_width", 0, "at least n=1, or None"),
    ("length_penalty", math.inf, "finite"),
    ("length_penalty", math.nan, "finite"),
    ("early_stopping", "always", "False, True or 'never'"),
    ("priority", 2**63, "in [-2**63, 2**63)"),
    ("priority", -(2**63) - 1, "in [-2**63, 2**63)"),
]

OPTIONAL = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_tokens",
    "suppress_tokens", "length_penalty", "early_stopping", "sequence_bias", "bad_words_ids",
    "allowed_token_ids",
)  # fmt: skip

ACCEPTED = [
    ("max_tokens", 1),
    ("temperature", 0),
    ("temperature", 100.0),
    ("top_k", 0),
    ("top_k", 10**6),
    ("top_p", 1e-9),
    ("top_p", 1.0),
    ("min_p", 0.0),
    ("min_p", 1.0),
    ("n", 1),
    ("seed", None),
    ("seed", 0),
    ("seed", 2**32 - 1),
    ("logprobs", None),
    ("logprobs", 0),
    ("best_of", 1),
    ("beam_width", None),
    ("beam_width", 1),
    ("length_penalty", -2.0),
    ("early_stopping", True),
    ("early_stopping", "never"),
    ("priority", -(2**63)),
    ("priority", 2**63 - 1),
]


@pytest.mark.parametrize(("name", "value", "rule"), REFUSED)
def test_a_value_outside_its_range_is_refused(name, value, rule):
    none = ", or None" if name in OPTIONAL and "None" not in rule else ""
    message = f"{name}={value!r} must be {rule}{none}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SamplingParams(**{"max_tokens": 4, name: value})


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_the_edge_of_a_range_is_part_of_it(name, value):
    assert getattr(SamplingParams(**{"max_tokens": 4, name: value}), name) == value


def test_every_number_has_a_rule():
    """A field added later must be ruled here, or be named as one that takes anything."""
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    booleans = {
        field.name
        for field in dataclasses.fields(SamplingParams)
        if field.type in (bool, bool | None)
    }
    assert {name for name, *_ in REFUSED} == fields - booleans


def test_the_first_broken_rule_is_reported_in_order_of_the_fields():
    with pytest.raises(ValueError, match="max_tokens=0"):
        SamplingParams(max_tokens=0, n=0, top_p=2.0)


def test_one_stop_string_is_a_tuple_of_one():
    assert SamplingParams(max_tokens=1, stop="end").stop == ("end",)


def test_an_empty_stop_string_alone_is_refused():
    with pytest.raises(ValueError, match=re.escape("stop=('',) must be free of empty strings")):
        SamplingParams(max_tokens=1, stop="")


def test_lists_become_tuples_so_that_the_caller_cannot_change_them():
    stop, stop_token_ids = ["a", "b"], [1, 2]
    params = SamplingParams(max_tokens=1, stop=stop, stop_token_ids=stop_token_ids)
    stop.append("c")
    stop_token_ids.append(3)
    assert params.stop == ("a", "b")
    assert params.stop_token_ids == (1, 2)


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("logit_bias", {"15": -100, 3: 2.5}, ((3, 2.5), (15, -100.0))),
        ("logit_bias", [(15, 1), [3, 2]], ((3, 2.0), (15, 1.0))),
        ("logit_bias", {}, ()),
        ("logit_bias", None, ()),
        ("sequence_bias", [[[10, 45], -2], [[9], 1]], (((10, 45), -2.0), ((9,), 1.0))),
        ("sequence_bias", {(10, 45): -2.0}, (((10, 45), -2.0),)),
        ("sequence_bias", [[[9], 1.0], [[9], 2.0]], (((9,), 2.0),)),
        ("bad_words_ids", [[10, 45], (9,)], ((10, 45), (9,))),
    ],
)
def test_what_belongs_to_tokens_is_kept_as_tuples(name, given, kept):
    params = SamplingParams(**{name: given})
    assert getattr(params, name) == kept
    assert dataclasses.replace(params, n=2) == SamplingParams(**{name: kept}, n=2)
    hash(params)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        *(
            ("logit_bias", value, "a dictionary from token ids to numbers, each token once")
            for value in (
                5, "15", [5], {"x": 1.0}, {1.5: 1.0}, {True: 1.0}, {1: "2"}, {1: None},
                {"1": 1, 1: 2}, {"9" * 5000: 1}, {"1_0": 1}, {" 1": 1},
            )
        ),
        *(
            ("sequence_bias", value, "a list of [token ids, number] or None")
            for value in (5, "x", [[1, 2]], {1: 2.0}, [[[1], "2"]], [[["1"], 2.0]], [[[1]]])
        ),
        *(
            ("bad_words_ids", value, "a list of lists of token ids or None")
            for value in (5, "x", [1, 2], [["1"]], {1: 2}, [None])
        ),
    ],
)  # fmt: skip
def test_what_does_not_belong_to_tokens_is_refused(name, value, kind):
    with pytest.raises(ValueError, match=f"^{name}=.* must be {re.escape(kind)}$"):
        SamplingParams(**{name: value})


def test_too_many_sequences_are_refused():
    most = [[token] for token in range(2**14)]
    SamplingParams(bad_words_ids=most)
    with pytest.raises(ValueError, match=r"bad_words_ids=.* must be of at most 16384 sequences"):
        SamplingParams(bad_words_ids=[*most, [1, 2]])


def test_parameters_cannot_change_once_checked():
    params = SamplingParams(max_tokens=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.max_tokens = 0
    with pytest.raises(ValueError, match="n=0"):
        dataclasses.replace(params, n=0)


def test_the_defaults_sample_from_the_whole_distribution_once():
    params = SamplingParams().resolve()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)
    assert (params.n, params.seed, params.logprobs, params.ignore_eos) == (1, None, None, False)
    assert (params.stop, params.stop_token_ids) == ((), ())


@pytest.mark.parametrize("name", ["best_of", "beam_width"])
def test_n_of_fewer_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name}=3 must be at least n=4, or None$"):
        SamplingParams(max_tokens=1, n=4, **{name: 3})
    SamplingParams(max_tokens=1, n=3, **{name: 3})


@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("temperature", 0.7, 1.0),
        ("top_k", 5, 0),
        ("top_p", 0.9, 1.0),
        ("min_p", 0.1, 0.0),
        ("presence_penalty", 0.5, 0.0),
        ("frequency_penalty", -0.5, 0.0),
        ("best_of", 2, None),
        ("stop", ("end",), ()),
    ],
)
def test_what_beam_search_would_ignore_is_refused(name, value, neutral):
    rule = f"{name}={value!r} has no meaning in beam search: leave it at {neutral!r}, or beam_width"
    with pytest.raises(ValueError, match=f"^{re.escape(rule)} at None$"):
        SamplingParams(max_tokens=1, beam_width=2, **{name: value})


@pytest.mark.parametrize(
    ("params", "num_samples"),
    [({}, 1), ({"n": 3}, 3), ({"n": 2, "best_of": 5}, 5), ({"n": 2, "beam_width": 4}, 1)],
)
def test_sequences_that_grow_from_the_prompt(params, num_samples):
    assert SamplingParams(max_tokens=1, **params).num_samples == num_samples
