# SPDX-License-Identifier: Apache-2.0
"""Times and rates, by a clock that moves only where something takes time."""

import threading
import time

import jax
import pytest

from jpaged import SamplingParams
from jpaged.device.step_result import StepResult
from jpaged.host.growth.base import Outcome
from jpaged.host.stats import Counters
from jpaged.host.step import StepPlan
from jpaged.host.step_builder import ScheduledStep
from jpaged.results import ResultReader
from tests.jpaged.tiny import prompts_of, tiny_engine


class Clock:
    """Seconds; and when the device, which works in order, will have done what it was given."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        self.device_done = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def dispatch(self, seconds):
        self.device_done = max(self.now, self.device_done) + seconds

    def wait(self, until):
        self.now = max(self.now, until)


class Result:
    """Of the step that was given to the device last."""

    def __init__(self, clock):
        self._clock, self._done = clock, clock.device_done

    def outcomes(self):
        self._clock.wait(self._done)
        return [Outcome([], [], None, [])]


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def reader_of(totals):
    return ResultReader(None, None, (), totals, "float32")


PREFILL = [ScheduledStep(StepPlan(num_prefill_tokens=10))]
DECODE = [ScheduledStep(StepPlan())]


class TestReader:
    def test_steps_back_to_back(self, clock):
        totals = Counters()
        reader = reader_of(totals)
        reader.start_clock()
        clock.dispatch(2)
        prefill = Result(clock)
        clock.now += 0.1  # the host is faster
        clock.dispatch(0.5)
        reader.read(PREFILL, prefill)
        reader.read(DECODE, Result(clock))
        assert (totals.prefill_s, totals.decode_s) == pytest.approx((2, 0.5))

    def test_compiling_before_a_step_is_no_part_of_it(self, clock):
        totals = Counters()
        reader = reader_of(totals)
        reader.start_clock()
        clock.now += 5
        reader.skip(5, overlapped=False)
        clock.dispatch(2)
        reader.read(PREFILL, Result(clock))
        assert (totals.prefill_s, totals.compile_s) == pytest.approx((2, 5))

    def test_compiling_beside_a_step_is_not_taken_off_it(self, clock):
        """Of 3 s of compiling and 2 s of the step, which began together, 3 s passed."""
        totals = Counters()
        reader = reader_of(totals)
        reader.start_clock()
        clock.dispatch(2)
        clock.now += 3
        reader.skip(3, overlapped=True)
        reader.read(PREFILL, Result(clock))
        assert (totals.prefill_s, totals.compile_s) == pytest.approx((3, 3))


def test_a_cold_run_by_hand(clock, monkeypatch):
    """Compiling takes 5 s a step and 4 s a sampler; the device 2 s a prefill, 0.5 s a decode."""
    # No costs of preemption to be measured by this clock.
    engine = tiny_engine(max_num_batched_tokens=32, preemption="recompute")
    runner = engine._runner
    programs = runner.programs

    def timed(name, compile_s, device_s):
        function = getattr(programs, name)

        def call(*args, **kwargs):
            before = programs.num_compilations
            result = function(*args, **kwargs)
            clock.now += compile_s * (programs.num_compilations - before)
            clock.dispatch(device_s(*args))
            return result

        monkeypatch.setattr(programs, name, call)

    timed("step", 5, lambda *args: 2 if args[2].token_ids.shape[0] > 4 else 0.5)
    timed("sample", 4, lambda *_: 0)
    read, run, done = StepResult.outcomes, runner.run, {}

    def wait(arrays):
        clock.wait(clock.device_done)
        return arrays

    def run_and_note(*args):
        result = run(*args)
        done[id(result)] = clock.device_done
        return result

    def read_late(self):
        clock.wait(done[id(self)])
        return read(self)

    monkeypatch.setattr(runner, "run", run_and_note)
    monkeypatch.setattr(jax, "block_until_ready", wait)
    monkeypatch.setattr(StepResult, "outcomes", read_late)
    (prompt,) = prompts_of([20])
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    for compile_s in (2 * (5 + 4), 0):
        engine.reset_prefix_cache()
        engine.reset_stats()
        start = clock.now
        (output,) = engine.generate([prompt], params)
        stats = engine.stats()
        assert stats.totals.compile_s == pytest.approx(compile_s)
        # The cold run has the figures of the warm one.
        assert stats.totals.prefill_s == pytest.approx(2)
        assert stats.totals.decode_s == pytest.approx(4 * 0.5)
        assert stats.prefill_tokens_per_s == pytest.approx(20 / 2)
        assert stats.decode_tokens_per_s == pytest.approx(4 / 2)
        assert clock.now - start == pytest.approx(compile_s + 4)
        assert output.latency_s == pytest.approx(compile_s + 4)
        assert output.time_to_first_token_s == pytest.approx(compile_s / 2 + 2)


def test_compiling_what_swaps_is_no_part_of_a_step(monkeypatch):
    """The device is waited for first, so that its work and the compilation do not overlap."""
    engine = tiny_engine(preemption="swap", num_pages=9)
    clock = Clock(monkeypatch)
    runner, pages = engine._runner, engine._runner._kv_pages
    monkeypatch.setattr(jax, "block_until_ready", lambda _: clock.wait(clock.device_done))

    def get_pages(*args):
        if not compiled:
            compiled.append(True)
            runner.programs._compilations[threading.get_ident()] += 1
            clock.now += 7
        return pages[:, :1].swapaxes(0, 1)

    compiled = []
    runner.programs.get_pages = get_pages
    clock.dispatch(2)
    start = clock.now
    assert runner.swap([(1, 0)], []) == 7
    assert clock.now == start + 9
    clock.dispatch(2)
    assert runner.swap([(1, 0)], []) == 0
    assert clock.now == start + 9  # nothing is waited for
