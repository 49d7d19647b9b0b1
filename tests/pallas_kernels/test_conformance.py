# SPDX-License-Identifier: Apache-2.0
"""Our backends pass the conformance suite, and kernels with one fault each do not."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import pallas_kernels
from jpaged.pallas_kernels import conformance
from tests.pallas_kernels import specification

XLA = {
    name: functools.partial(getattr(pallas_kernels, name), backend="xla")
    for name in ("paged_attention", "write_kv", "copy_pages")
}
SPECIFICATION = {name: getattr(specification, name) for name in XLA}


# What the faults below are found by, which the specification has to pass without one.
FOUND_BY = {
    "decode around page boundaries",
    "decode without padding",
    "decode, page_size 16",
    "decode, page_size 64",
    "prefill, page_size 16",
    "mixed, page_size 16",
    "much padding",
    "sliding_window 16",
    "sliding_window 129",
    "soft_cap and sm_scale",
    "sinks, decode",
    "sinks, prefill",
    "sinks, capped and scaled",
    "9 query heads, 3 KV heads",
    "bfloat16, decode",
    "int8 pages",
}
# With them, each kind of case at its edges; the values between run nightly.
ALWAYS = FOUND_BY | {
    "decode, page_size 8",
    "prefill, page_size 256",
    "chunks around page boundaries",
    "sliding_window 1, pages below released, mixed",
    "sliding_window 4, decode",
    "sliding_window 17, pages below released, decode",
    "sinks, sliding_window 17",
    "1 query heads, 1 KV heads",
    "8 query heads, 8 KV heads",
    "16 query heads, 1 KV heads",
    "head_dim 64, mixed",
    "head_dim 80, decode",
    "head_dim 96, mixed",
    "head_dim 256, mixed",
    "bfloat16, mixed",
    "float16, mixed",
    "float8_e4m3fn pages",
    "33,000 tokens, sliding_window 100",
    "one row, without queries",
}
CASES = conformance.suite()
NIGHTLY = (pytest.mark.nightly, pytest.mark.slow)


def test_the_names_above_are_cases():
    assert set(CASES) >= ALWAYS


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        pytest.param(functions, case, id=f"{name}-{case}", marks=() if case in always else NIGHTLY)
        for name, functions, always in (
            ("xla", XLA, ALWAYS),
            ("reference", SPECIFICATION, FOUND_BY),
        )
        for case in CASES
    ],
)
def test_ours_conform(implementation, case, monkeypatch):
    # Not those as well whose names contain its name.
    monkeypatch.setattr(conformance.report, "suite", lambda dtype: {case: CASES[case]})
    results = list(conformance.run(**implementation, only=case))
    assert {result.function for result in results} == set(XLA)
    assert [result for result in results if result.status != "passed"] == []


def attention_fault(function):
    """Turns a change of the arguments into an implementation."""

    @functools.wraps(function)
    def attend(q, kv_pages, *index, **options):
        return specification.paged_attention(*function(q, kv_pages, *index, options), **options)

    return attend


@attention_fault
def sees_a_token_too_many(q, pool, table, kv_lens, cu, num_seqs, options):
    return q, pool, table, kv_lens + 1, cu, num_seqs


@attention_fault
def misses_the_newest_token(q, pool, table, kv_lens, cu, num_seqs, options):
    return q, pool, table, jnp.maximum(kv_lens - 1, 1), cu, num_seqs


def ignores(option):
    def attend(*args, **options):
        return specification.paged_attention(*args, **options | {option: None})

    attend.__name__ = f"ignores_{option}"
    return attend


@attention_fault
def scales_and_caps_sinks(q, pool, table, kv_lens, cu, num_seqs, options):
    cap = options["soft_cap"]
    options["sinks"] = cap * jnp.tanh(options["sinks"] * options["sm_scale"] / cap)
    return q, pool, table, kv_lens, cu, num_seqs


@attention_fault
def turns_the_heads_of_sinks(q, pool, table, kv_lens, cu, num_seqs, options):
    options["sinks"] = options["sinks"].reshape(pool.shape[2], -1).T.reshape(-1)
    return q, pool, table, kv_lens, cu, num_seqs


@attention_fault
def widens_the_window(q, pool, table, kv_lens, cu, num_seqs, options):
    options["sliding_window"] += 1
    return q, pool, table, kv_lens, cu, num_seqs


@attention_fault
def reads_the_layer_below(q, pool, table, kv_lens, cu, num_seqs, options):
    options["layer"] = options["layer"] - 1
    return q, pool, table, kv_lens, cu, num_seqs


@attention_fault
def sorts_the_pages(q, pool, table, kv_lens, cu, num_seqs, options):
    return q, pool, jnp.sort(table, axis=1), kv_lens, cu, num_seqs


@attention_fault
def rounds_queries_to_bfloat16(q, pool, table, kv_lens, cu, num_seqs, options):
    return q.astype(jnp.bfloat16).astype(q.dtype), pool, table, kv_lens, cu, num_seqs


@attention_fault
def interleaves_the_groups(q, pool, table, kv_lens, cu, num_seqs, options):
    tokens, heads, head_dim = q.shape
    q = q.reshape(tokens, -1, pool.shape[2], head_dim).swapaxes(1, 2)
    return q.reshape(tokens, heads, head_dim), pool, table, kv_lens, cu, num_seqs


def multiplies_dead_cells(q, pool, *index, **options):
    out = specification.paged_attention(q, pool, *index, **options)
    return out + 0 * pool[options["layer"], 0].sum()  # the null page


def gives_float32(q, pool, *index, **options):
    return specification.paged_attention(q, pool, *index, **options).astype(jnp.float32)


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        (sees_a_token_too_many, "decode around page boundaries"),
        (misses_the_newest_token, "prefill, page_size 16"),
        (ignores("sliding_window"), "sliding_window 129"),
        (widens_the_window, "sliding_window 16"),
        (ignores("soft_cap"), "soft_cap and sm_scale"),
        (ignores("kv_scale"), "int8 pages"),
        (ignores("sinks"), "sinks, decode"),
        (scales_and_caps_sinks, "sinks, capped and scaled"),
        (turns_the_heads_of_sinks, "sinks, prefill"),
        (reads_the_layer_below, "decode without padding"),
        (sorts_the_pages, "mixed, page_size 16"),
        (rounds_queries_to_bfloat16, "decode, page_size 16"),
        (interleaves_the_groups, "9 query heads, 3 KV heads"),
        (multiplies_dead_cells, "much padding"),
        (gives_float32, "bfloat16, decode"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_fault_of_attention_is_found(fault, case):
    (result,) = conformance.run(paged_attention=fault, only=case)
    assert result.status == "failed", result


def writes_padding_too(pool, k, v, table, kv_lens, cu, num_seqs, **options):
    cu = jnp.where(jnp.arange(len(cu)) > num_seqs, k.shape[0], cu)
    return specification.write_kv(pool, k, v, table, kv_lens, cu, num_seqs + 1, **options)


def writes_the_layer_below(*args, layer):
    return specification.write_kv(*args, layer=layer - 1)


def swaps_keys_and_values(pool, k, v, *index, layer):
    return specification.write_kv(pool, v, k, *index, layer=layer)


@pytest.mark.parametrize(
    "fault", [writes_padding_too, writes_the_layer_below, swaps_keys_and_values]
)
def test_a_fault_of_a_write_is_found(fault):
    (result,) = conformance.run(write_kv=fault, only="mixed, page_size 16")
    assert result.status == "failed" and "layer, page, head, slot, lane" in result.detail


def test_copies_in_turn_are_found():
    def one_by_one(pool, sources, targets):
        for source, target in zip(sources, targets, strict=True):
            pool = pool.at[:, target].set(pool[:, source])
        return pool

    (result,) = conformance.run(copy_pages=one_by_one, only="decode, page_size 64")
    assert result.status == "failed", result


def test_a_refusal_is_no_failure_and_a_crash_is_one():
    def refuses(*args, **options):
        raise NotImplementedError("head_dim=128 is beyond me")

    def crashes(*args, **options):
        raise KeyError("oops")

    results = conformance.run(paged_attention=refuses, write_kv=crashes, only="soft_cap")
    assert [(r.status, r.detail) for r in results] == [
        ("refused", "head_dim=128 is beyond me"),
        ("failed", "KeyError: 'oops'"),
    ]


def test_a_failure_says_where():
    def wrong_once(q, pool, *index, **options):
        out = specification.paged_attention(q, pool, *index, **options)
        return out.at[4, 1, 2].add(0.5)

    case = conformance.make_case([(1, 5), (6, 9)])
    with pytest.raises(AssertionError, match=r"row 1, position 6 of 9, head 1, lane 2: "):
        conformance.check_attention(wrong_once, case)


def test_the_bound_grows_with_the_sum_and_the_dtype():
    short, long = conformance.make_case([(1, 10)]), conformance.make_case([(1, 10000)])
    _, least = conformance.dense_attention(short)
    _, more = conformance.dense_attention(long)
    assert least[0].max() < 1e-4 and np.median(more[0] / least[0]) > 10
    coarse = conformance.make_case([(1, 10)], dtype=jnp.bfloat16)
    assert np.median(conformance.dense_attention(coarse)[1][0] / least[0]) > 50
