# SPDX-License-Identifier: Apache-2.0
"""Random programs over a whole engine, in a pool too small for them.

Whatever is added, forked, searched, aborted and stepped in whatever order, nothing may be lost or
held twice, and each request must get what it gets when it is alone. "Alone" is another engine with
pages for all, one shape of step, and so the same bits.
"""

import functools
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jpaged import SamplingParams
from tests.jpaged.tiny import prompts_of, tiny_engine

EXACT = dict(deterministic=True, page_size=4, max_num_batched_tokens=7, max_num_seqs=6)
MAX_LIVE = 9

# Some begin alike, for half a page, a page, or more.
(HEAD,) = prompts_of([24], seed=7)
PROMPTS = [
    HEAD[:keep] + tail
    for keep, tail in zip((0, 2, 4, 9, 24, 24), prompts_of([3, 9, 1, 6, 2, 8]), strict=True)
]

BEAM_STOPS = [(), (3, 5, 8, 13, 21, 34, 55, 89)]

sampled = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 24),
    temperature=st.sampled_from([0.0, 1.3]),
    n=st.sampled_from([1, 1, 2, 9]),
    seed=st.integers(0, 3),
    stop_token_ids=st.sampled_from([(), tuple(range(0, 97, 4))]),
    logprobs=st.just(1),
)
searched = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 8),
    beam_width=st.integers(1, 4),
    early_stopping=st.sampled_from([False, True, "never"]),
    stop_token_ids=st.sampled_from(BEAM_STOPS),
    logprobs=st.just(1),
)


@functools.cache
def roomy():
    return tiny_engine(**EXACT | dict(prefix_cache=False, num_pages=400))


@functools.cache
def alone(prompt, params):
    """What a request gets by itself; of samples, however many there are, each the same."""
    (output,) = roomy().generate([list(prompt)], params)
    return [(c.token_ids, c.logprobs, c.finish_reason) for c in output.outputs]


class EngineProgram(RuleBasedStateMachine):
    num_steps = 0
    seen: ClassVar[dict[str, int]] = {}

    @initialize(
        num_pages=st.sampled_from([20, 28]),
        preemption=st.sampled_from(["recompute", "swap", "auto"]),
        prefix_cache=st.booleans(),
        host_pages=st.sampled_from([0, 6, 40]),
    )
    def make(self, num_pages, preemption, prefix_cache, host_pages):
        self.engine = engine_of(num_pages, preemption, prefix_cache, host_pages)
        for request_id in list(self.engine._live.by_id):  # of a program that failed
            self.engine.abort(request_id)
        self.engine.reset_prefix_cache()
        self.engine.reset_stats()
        self.live = {}  # request id: prompt, params, tokens that it began with

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        while self.engine.has_unfinished_requests:
            self.step()
            self.books_balance()
        assert not self.live
        totals = self.engine.stats().totals
        for name in ("num_preemptions", "num_swapped_pages", "num_hit_tokens", "num_page_copies"):
            EngineProgram.seen[name] = EngineProgram.seen.get(name, 0) + getattr(totals, name)
        self.engine.reset_prefix_cache()

    @precondition(lambda self: len(self.live) < MAX_LIVE)
    @rule(prompt=st.sampled_from(PROMPTS), params=sampled | searched)
    def add(self, prompt, params):
        self.live[self.engine.add_request(prompt, params)] = prompt, params, []

    @precondition(lambda self: 0 < len(self.live) < MAX_LIVE)
    @rule(data=st.data(), k=st.integers(1, 3))
    def fork(self, data, k):
        request_id = data.draw(st.sampled_from(list(self.live)))
        prompt, params, _ = self.live[request_id]
        try:
            forks = self.engine.fork(request_id, k)
        except ValueError:
            assert params.n > 1 or params.beam_width is not None
            return
        for fork in forks:
            request = self.engine._live.by_id[fork]
            known = request.sequences[0].generated_token_ids
            own = SamplingParams(
                max_tokens=request.params.max_tokens - len(known),
                temperature=request.params.temperature,
                seed=request.seed,
                stop_token_ids=request.params.stop_token_ids,
                logprobs=1,
            )
            self.live[fork] = prompt, own, known

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(list(self.live)))
        output = self.engine.abort(request_id)
        prompt, params, known = self.live.pop(request_id)
        if params.beam_width is None:
            for completion, want in zip(
                output.outputs, alone((*prompt, *known), params), strict=False
            ):
                tokens = completion.token_ids
                assert tokens == (known + want[0])[: len(tokens)]

    @precondition(lambda self: self.live)
    @rule(count=st.integers(1, 6))
    def steps(self, count):
        for _ in range(count):
            self.step()

    def step(self):
        EngineProgram.num_steps += 1
        for output in self.engine.step():
            prompt, params, known = self.live.pop(output.request_id)
            want = alone((*prompt, *known), params)
            assert output.finished and len(output.outputs) == len(want)
            for completion, (tokens, logprobs, reason) in zip(output.outputs, want, strict=True):
                assert completion.token_ids == known + tokens
                assert completion.logprobs[len(known) :] == logprobs
                assert completion.finish_reason == reason

    @invariant()
    def books_balance(self):
        if hasattr(self, "engine"):
            self.engine.check_invariants()


@functools.cache
def engine_of(num_pages, preemption, prefix_cache, host_pages):
    """One for each kind: to make an engine takes longer than to run a program."""
    page_bytes = 2 * 2 * 4 * 32 * 4  # layers, heads, slots, lanes, bytes
    engine = tiny_engine(
        **EXACT,
        num_pages=num_pages,
        preemption=preemption,
        prefix_cache=prefix_cache,
        swap_bytes=host_pages * page_bytes,
        swap_bytes_per_s=1e8,
        flops_per_s=1e10,
    )
    # What is compiled changes when samples are read, and so what a program comes to.
    searches = [
        SamplingParams(max_tokens=8, beam_width=width, stop_token_ids=stops)
        for width in range(1, 5)
        for stops in BEAM_STOPS
    ]
    engine.warm_up(num_logprobs=1, params=searches)
    return engine


def run_programs(num_programs, derandomize=False):
    EngineProgram.num_steps, EngineProgram.seen = 0, {}
    run_state_machine_as_test(
        EngineProgram,
        settings=settings(
            max_examples=num_programs,
            stateful_step_count=30,
            deadline=None,
            derandomize=derandomize,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.slow
def test_random_programs():
    """The same ones each time, as so few may not come to all that they could."""
    run_programs(6, derandomize=True)
    assert EngineProgram.num_steps >= 60
    assert EngineProgram.seen["num_preemptions"] and EngineProgram.seen["num_page_copies"]


@pytest.mark.nightly
def test_many_random_programs():
    run_programs(250)
    assert EngineProgram.num_steps >= 10_000
    assert all(EngineProgram.seen.values()), EngineProgram.seen
