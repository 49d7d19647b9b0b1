# SPDX-License-Identifier: Apache-2.0
"""Outputs go to whom their request belongs, in any interleaving of those who run steps."""

import functools
import gc
import itertools

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jpaged import SamplingParams
from jpaged.streams import RequestStream
from tests.jpaged.exact import EXACT, drawn
from tests.jpaged.tiny import prompts_of, tiny_engine, token_ids

PROMPTS = prompts_of([3, 9, 20])


@functools.cache
def shared():
    """One for all, as to make one takes longer than a test; too small for a crowd."""
    return tiny_engine(**EXACT, num_pages=20)


@pytest.fixture
def engine():
    yield shared()
    for request_id in list(shared()._live.by_id):
        shared().abort(request_id)
    shared().step()
    assert not shared().has_unfinished_requests
    shared().check_invariants()


@functools.cache
def alone(index, num_tokens):
    (output,) = shared().generate([PROMPTS[index]], params_of(index, num_tokens))
    return output.outputs[0].token_ids


def params_of(index, num_tokens):
    return SamplingParams(max_tokens=num_tokens, temperature=1.2, seed=index)


def tokens(output):
    return output.outputs[0].token_ids


class TestStream:
    def test_it_is_a_closeable_iterator(self, engine):
        stream = engine.stream(PROMPTS[0], params_of(0, 5))
        assert isinstance(stream, RequestStream) and iter(stream) is stream
        assert stream.request_id in engine._live.by_id
        assert [len(tokens(output)) for output in stream] == [1, 2, 3, 4, 5]
        assert list(stream) == [] and next(stream, None) is None

    def test_each_step_of_its_own_is_told(self, engine):
        used = []
        stream = engine.stream(
            PROMPTS[0], params_of(0, 3), on_step=lambda: used.append(engine.stats().num_used_pages)
        )
        # The first step is read by the second; after the last one nothing is in use.
        seen = [len(used) for _ in stream]
        assert seen == [2, 3, 4] and all(used[:3]) and used[3] == 0

    def test_two_side_by_side(self, engine):
        streams = [engine.stream(PROMPTS[i], params_of(i, 9)) for i in range(2)]
        seen = [[], []]
        for outputs in itertools.zip_longest(*streams):
            for output, own in zip(outputs, seen, strict=True):
                if output is not None:
                    own.append(output)
        for index, outputs in enumerate(seen):
            assert [output.finished for output in outputs].count(True) == 1
            lengths = [len(tokens(output)) for output in outputs]
            assert lengths == sorted(set(lengths))
            assert outputs[-1].finished and tokens(outputs[-1]) == alone(index, 9)

    def test_one_that_is_read_late_has_the_newest_only(self, engine):
        late = engine.stream(PROMPTS[0], params_of(0, 6))
        assert token_ids(engine.generate([PROMPTS[1]], params_of(1, 20))) == [[alone(1, 20)]]
        (output,) = late
        assert output.finished and tokens(output) == alone(0, 6)

    def test_step_reports_nothing_of_a_stream(self, engine):
        stream = engine.stream(PROMPTS[0], params_of(0, 4))
        engine.add_request(PROMPTS[1], params_of(1, 2), "mine")
        reported = []
        while engine.has_unfinished_requests:
            reported += engine.step()
        assert [output.request_id for output in reported] == ["mine"]
        assert [tokens(output) for output in stream] == [alone(0, 4)]

    def test_what_ends_while_others_run_steps_waits_for_step(self, engine):
        engine.add_request(PROMPTS[1], params_of(1, 2), "streamed", stream=True)
        engine.add_request(PROMPTS[1], params_of(1, 3), "mine")
        list(engine.stream(PROMPTS[0], params_of(0, 12)))
        assert not engine._live.by_id and engine.has_unfinished_requests
        outputs = {output.request_id: output for output in engine.step()}
        assert {name: tokens(output) for name, output in outputs.items()} == {
            "streamed": alone(1, 2),
            "mine": alone(1, 3),
        }
        assert engine.step() == [] and not engine.has_unfinished_requests

    @pytest.mark.parametrize("how", ["close", "forget", "with", "error"])
    @pytest.mark.parametrize("begun", [False, True])
    def test_one_that_goes_holds_nothing(self, engine, how, begun):
        stream = engine.stream(PROMPTS[2], params_of(2, 30))
        if begun:
            next(stream)
            assert engine.stats().num_used_pages > 0
        if how == "close":
            stream.close()
            stream.close()
            assert list(stream) == []
        elif how == "with":
            with stream:
                pass
        elif how == "error":
            with pytest.raises(ZeroDivisionError), stream:
                1 / 0  # noqa: B018
        del stream
        gc.collect()
        assert not engine.has_unfinished_requests
        assert engine.stats().num_used_pages == 0

    def test_abort_ends_it_with_what_there_is(self, engine):
        stream = engine.stream(PROMPTS[0], params_of(0, 30))
        first = next(stream)
        output = engine.abort(stream.request_id)
        assert output.finished and output.outputs[0].finish_reason == "abort"
        (last,) = stream
        assert last is output and tokens(last)[: len(tokens(first))] == tokens(first)
        with pytest.raises(KeyError, match="no live request"):
            engine.abort(stream.request_id)

    def test_abort_of_what_has_ended_and_was_not_reported(self, engine):
        engine.add_request(PROMPTS[1], params_of(1, 3), "mine")
        engine.generate([PROMPTS[0]], params_of(0, 12))
        output = engine.abort("mine")
        assert output.outputs[0].finish_reason == "length" and tokens(output) == alone(1, 3)
        assert not engine.has_unfinished_requests
        with pytest.raises(KeyError, match="no live request"):
            engine.abort("mine")

    def test_a_fork_of_one_is_reported_by_step(self, engine):
        stream = engine.stream(PROMPTS[0], params_of(0, 10))
        for _ in range(3):
            next(stream)
        (fork,) = engine.fork(stream.request_id)
        list(stream)
        reported = []
        while engine.has_unfinished_requests:
            reported += engine.step()
        assert [output.request_id for output in reported] == [fork]
        assert tokens(reported[0])[:3] == alone(0, 10)[:3]

    def test_nothing_to_do_is_no_error(self, engine):
        assert engine.step() == [] == engine.step()
        assert engine.generate([], drawn()) == []


class TestGenerate:
    def test_on_output_is_called_once_for_each_as_it_ends(self, engine):
        seen, steps = [], itertools.count()
        outputs = engine.generate(
            PROMPTS,
            [params_of(0, 9), params_of(1, 2), params_of(2, 5)],
            on_step=lambda: next(steps),
            on_output=lambda index, output: seen.append((index, output, next(steps))),
        )
        assert sorted((index, output) for index, output, _ in seen) == list(enumerate(outputs))
        assert [index for index, *_ in seen] == [1, 2, 0]
        assert all(output.finished for output in outputs)
        assert seen[0][2] + 2 < seen[-1][2]

    def test_an_error_of_on_output_ends_the_others(self, engine):
        with pytest.raises(BrokenPipeError):
            engine.generate(PROMPTS, params_of(0, 9), on_output=_broken_pipe)
        assert not engine.has_unfinished_requests

    def test_one_inside_another_and_beside_a_stream(self, engine):
        inner = []

        def once():
            if not inner:
                inner.append(engine.generate([PROMPTS[1]], params_of(1, 7)))

        stream = engine.stream(PROMPTS[2], params_of(2, 11))
        outer = engine.generate([PROMPTS[0]], params_of(0, 3), on_step=once)
        assert token_ids(outer) == [[alone(0, 3)]] and token_ids(inner[0]) == [[alone(1, 7)]]
        assert tokens(list(stream)[-1]) == alone(2, 11)


def _broken_pipe(*_):
    raise BrokenPipeError


class Consumers(RuleBasedStateMachine):
    """Many of them on one engine, against what each gets alone."""

    num_ended = 0

    @initialize()
    def begin(self):
        self.engine = shared()
        self.streams, self.added = {}, {}  # what was asked for; what was seen
        self.seen, self.ended = {}, set()
        self.number = 0

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for stream in list(self.streams):
            while stream in self.streams:
                self.advance(stream)
        while self.engine.has_unfinished_requests:
            self.step()
        assert not self.added
        self.engine.check_invariants()

    asked = st.tuples(st.integers(0, 2), st.sampled_from([1, 2, 5, 12]))

    def look(self, name, asked, output):
        """What every consumer must find: its own, growing, right, and ended once."""
        assert name not in self.ended, "an output after the last one"
        got, before = tokens(output), self.seen.get(name, [])
        assert got[: len(before)] == before and got == alone(*asked)[: len(got)]
        assert output.finished or len(got) > len(before)
        self.seen[name] = got
        if output.finished:
            self.ended.add(name)
            Consumers.num_ended += 1
            assert got == alone(*asked) or output.outputs[0].finish_reason == "abort"

    @precondition(lambda self: len(self.streams) < 4)
    @rule(asked=asked)
    def stream(self, asked):
        self.streams[self.engine.stream(PROMPTS[asked[0]], params_of(*asked))] = asked

    @precondition(lambda self: len(self.added) < 4)
    @rule(asked=asked, stream=st.booleans())
    def add(self, asked, stream):
        self.number += 1
        name = f"added {self.number}"
        self.engine.add_request(PROMPTS[asked[0]], params_of(*asked), name, stream=stream)
        self.added[name] = asked

    def advance(self, stream):
        output = next(stream, None)
        if output is None:
            assert stream in self.ended
            del self.streams[stream]
        else:
            self.look(stream, self.streams[stream], output)

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), count=st.integers(1, 4))
    def read(self, data, count):
        stream = data.draw(st.sampled_from(list(self.streams)))
        for _ in range(count):
            if stream in self.streams:
                self.advance(stream)

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), forget=st.booleans())
    def close(self, data, forget):
        stream = data.draw(st.sampled_from(list(self.streams)))
        del self.streams[stream]
        if not forget:
            stream.close()
            assert next(stream, None) is None

    @rule(asked=st.lists(asked, max_size=3))
    def generate(self, asked):
        ended = []
        outputs = self.engine.generate(
            [PROMPTS[index] for index, _ in asked],
            [params_of(*each) for each in asked],
            on_output=lambda index, output: ended.append(index),
        )
        assert [tokens(output) for output in outputs] == [alone(*each) for each in asked]
        assert sorted(ended) == list(range(len(asked)))

    @rule()
    def step(self):
        for output in self.engine.step():
            name = output.request_id
            self.look(name, self.added[name], output)
            if output.finished:
                del self.added[name]

    @precondition(lambda self: self.added)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(list(self.added)))
        output = self.engine.abort(name)
        assert output.finished
        self.look(name, self.added.pop(name), output)

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def abort_stream(self, data):
        stream = data.draw(st.sampled_from(list(self.streams)))
        if stream.request_id not in self.engine._live.by_id:
            return
        self.engine.abort(stream.request_id)
        while stream in self.streams:
            self.advance(stream)


def run_consumers(num_programs, derandomize):
    Consumers.num_ended = 0
    run_state_machine_as_test(
        Consumers,
        settings=settings(
            max_examples=num_programs,
            stateful_step_count=25,
            deadline=None,
            derandomize=derandomize,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.slow
def test_any_interleaving():
    run_consumers(30, derandomize=True)
    assert Consumers.num_ended >= 75


@pytest.mark.nightly
@pytest.mark.slow
def test_many_interleavings():
    run_consumers(400, derandomize=False)
