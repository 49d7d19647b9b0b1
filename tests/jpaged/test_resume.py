# SPDX-License-Identifier: Apache-2.0
"""A request that resumes from what another came to ends as that one: tokens, numbers, text."""

import dataclasses
import functools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from jpaged import Completion, SamplingParams
from tests.jpaged.exact import EXACT, drawn, run_steps, with_prefix
from tests.jpaged.tiny import tiny_engine, windowed

PROMPTS = with_prefix([1, 9, 20], prefix=12)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@functools.cache
def tokenizer():
    """Of tokens that are one to three letters, so that stop strings begin inside of them."""
    words = [LETTERS[i % 26] * (1 + i // 26 % 3) for i in range(96)]
    vocab = {"[UNK]": 0} | {f"{word}{i}": i + 1 for i, word in enumerate(words)}
    made = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="[UNK]"))
    made.decoder = decoders.Fuse()
    return made


def stop_of(params):
    """A string that is found late in an answer, and begins one token before it is whole."""
    (output,) = engines()["paged"].generate([PROMPTS[0]], params)
    tokens = output.outputs[0].token_ids
    first, second = (tokenizer().id_to_token(token) for token in tokens[8:10])
    return first[-1:] + second


@functools.cache
def engines():
    """By what is different between them, each with pages for some of the requests only."""
    settings = EXACT | dict(num_pages=23, preemption="recompute")
    return {
        "paged": tiny_engine(tokenizer(), **settings),
        "uncached": tiny_engine(tokenizer(), **settings, prefix_cache=False),
        "windowed": tiny_engine(tokenizer(), windowed(), **settings),
    }


@functools.cache
def kinds():
    plain = drawn(7, max_tokens=24, ignore_eos=True)
    return {
        "greedy": SamplingParams(max_tokens=24, temperature=0, ignore_eos=True),
        "drawn": plain,
        "samples": dataclasses.replace(plain, n=3),
        "best_of": dataclasses.replace(plain, n=2, best_of=4, logprobs=None),
        # More than run at once.
        "many": dataclasses.replace(plain, n=11, max_tokens=9, logprobs=None),
        "stop": dataclasses.replace(plain, stop=(stop_of(plain), "?"), n=2),
        "penalties": dataclasses.replace(
            plain, repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=0.9
        ),
        "biases": dataclasses.replace(
            plain,
            logit_bias=((5, 3.0), (9, -8.0)),
            sequence_bias=(((5, 6), 4.0),),
            bad_words_ids=((5, 5),),
            stop_token_ids=(11, 12, 13, 14, 15, 16),
            min_tokens=9,
            top_k=40,
            top_p=0.95,
        ),
        "beams": SamplingParams(max_tokens=12, beam_width=3, n=2, logprobs=1, ignore_eos=True),
    }


@functools.cache
def whole(engine, kind):
    """What comes of the prompts where nothing is resumed."""
    return shown(engines()[engine].generate(PROMPTS, kinds()[kind]))


def shown(outputs):
    """All that a caller sees but ids and times."""
    return [(output.prompt_token_ids, output.outputs, output.finished) for output in outputs]


KINDS = ["greedy", "drawn", "samples", "best_of", "many", "stop", "penalties", "biases", "beams"]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["paged", "uncached", "windowed"]),
    st.sampled_from(KINDS),
    st.lists(st.integers(1, 40), min_size=1, max_size=2),
)
def test_it_ends_as_the_whole_wherever_it_was_left(name, kind, moments):
    engine, params, want = engines()[name], kinds()[kind], whole(name, kind)
    before = [[] for _ in PROMPTS]
    done = {}
    for num_steps in moments:
        ids = {
            engine.add_request(prompt, params, resume=resume): index
            for index, (prompt, resume) in enumerate(zip(PROMPTS, before, strict=True))
            if index not in done
        }
        for _ in range(num_steps):
            done |= {ids[output.request_id]: output for output in engine.step()}
        engine.check_invariants()
        for request_id, index in ids.items():
            if index not in done:
                before[index] = engine.progress(request_id)
                engine.abort(request_id)
        engine.reset_prefix_cache()
        assert not engine.step()
    totals = engine.stats().totals
    generated = totals.num_generated_tokens
    ids = {
        engine.add_request(prompt, params, resume=resume): index
        for index, (prompt, resume) in enumerate(zip(PROMPTS, before, strict=True))
        if index not in done
    }
    given_tokens = sum(len(c.token_ids) for i in ids.values() for c in before[i])
    done |= {ids[request_id]: output for request_id, output in run_steps(engine).items()}
    assert shown(done[index] for index in range(len(PROMPTS))) == want
    if kind not in ("beams", "best_of"):
        # What was known is not generated again.
        all_tokens = sum(len(c.token_ids) for i in ids.values() for c in done[i].outputs)
        assert engine.stats().totals.num_generated_tokens - generated == all_tokens - given_tokens


def test_a_sample_that_has_ended_is_not_computed():
    engine, params = engines()["paged"], kinds()["stop"]
    ((_, outputs, _), *_) = whole("paged", "stop")
    # That text ends one and not the other is what this shows.
    assert [output.finish_reason for output in outputs] == ["stop", "length"]
    running = dataclasses.replace(outputs[1], token_ids=outputs[1].token_ids[:3], text="",
                                  finish_reason=None, logprobs=outputs[1].logprobs[:3],
                                  cumulative_logprob=sum_of(outputs[1], 3))  # fmt: skip
    before = engine.stats().totals.num_generated_tokens
    engine.add_request(PROMPTS[0], params, resume=[outputs[0], running])
    (output,) = run_steps(engine).values()
    assert output.outputs == outputs
    generated = engine.stats().totals.num_generated_tokens - before
    assert generated == len(outputs[1].token_ids) - 3


def sum_of(completion, count):
    total = 0.0
    for token, values in zip(completion.token_ids[:count], completion.logprobs, strict=False):
        total += values[token]
    return total


def sample(*token_ids, reason=None, **options):
    return Completion(**(dict(
        text="", token_ids=list(token_ids), cumulative_logprob=0.0, logprobs=None,
        finish_reason=reason,
    ) | options))  # fmt: skip


@pytest.mark.parametrize(
    ("params", "resume", "message"),
    [
        ({}, "text", "resume='text' must be a list of Completion"),
        ({}, [3], r"resume\[0\]=3 must be a Completion"),
        ({}, [sample(1), sample(1)], "resume has 2 samples, but the request has 1"),
        ({"n": 2}, [sample(1), sample(1, 97)], r"resume\[1\]: token id 97 is outside the vocabul"),
        ({}, [sample("x")], r"resume\[0\].token_ids=.*must be a list of integers"),
        ({}, [sample(1, 2, 3, 4)], r"resume\[0\] goes on and has 4 tokens, where .* room for 4"),
        ({"n": 2}, [sample(*range(5), reason="length")], "has ended and has 5 tokens, where"),
        ({}, [sample(1, reason="length")], "all samples have ended, so there is nothing to go on"),
        ({}, [sample(1, reason="abort")], "finish_reason='abort' must be None, 'stop', 'length'"),
        ({"logprobs": 1}, [sample(1, 2)], r"\[0\].logprobs must be those of 2 tokens.*they are 0"),
        ({}, [sample(1, cumulative_logprob="x")], "cumulative_logprob='x' must be"),
        ({"beam_width": 2}, [sample(1)], "beams are begun anew; leave resume away with beam_w"),
        ({"stop": ["b"]}, [sample(2)], "cannot be resumed: a stop string has ended sample 0"),
    ],
)
def test_what_cannot_be_is_refused(params, resume, message):
    engine = engines()["paged"]
    with pytest.raises(ValueError, match=message):
        engine.add_request([1, 2], SamplingParams(max_tokens=4, **params), resume=resume)
    assert not engine.has_unfinished_requests
    engine.check_invariants()


def test_progress_is_of_live_requests():
    with pytest.raises(KeyError, match=re.escape("no live request 'x'")):
        engines()["paged"].progress("x")
