# SPDX-License-Identifier: Apache-2.0
"""Whatever interrupts a call, the next one finds an engine that serves, or that says why not."""

import pathlib
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from jpaged import SamplingParams
from jpaged.host.outputs import GenerationInterrupted
from jpaged.recovery import Change, EngineDeadError
from tests.jpaged.exact import EXACT, drawn, everything, run_steps
from tests.jpaged.tiny import prompts_of, tiny_engine

NIGHTLY = [pytest.mark.nightly, pytest.mark.slow]
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PROMPTS = prompts_of([5, 17, 30])
CROWD = [drawn(seed, n=2) for seed in range(3)]


def random_interrupts(count, seed):
    """See tests/jpaged/interrupts.py, which sets the handler of SIGINT itself."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.jpaged.interrupts", str(count), str(seed)],
        cwd=ROOT, capture_output=True, text=True, timeout=1100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) >= count


@pytest.mark.slow
def test_some_real_interrupts():
    random_interrupts(15, 1)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_thousand_real_interrupts():
    random_interrupts(1000, 2)


OTHER_FLOORS = tuple(f"jpaged.{floor}" for floor in ("models", "pallas_kernels", "scripts"))


class Interrupting:
    """Raises KeyboardInterrupt at the n-th line of the runtime, counted over `with` blocks."""

    def __init__(self, line):
        self.left = line

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_):
        sys.settrace(self._before)

    def _trace(self, frame, event, _):
        module = frame.f_globals.get("__name__", "")
        runs = module.startswith("jpaged.") and not module.startswith(OTHER_FLOORS)
        if not runs or frame.f_code.co_name == "__del__":
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._trace


class At(Interrupting):
    """Calls something at the n-th line instead, as a signal handler could."""

    def __init__(self, line, function):
        super().__init__(line)
        self._function = function

    def _trace(self, frame, event, argument):
        if self.left <= 0:
            return None
        try:
            return super()._trace(frame, event, argument)
        except KeyboardInterrupt:
            self._function()
            return None


@pytest.fixture(scope="module")
def engine():
    """Too small for the crowd, so that it preempts and swaps; compiled."""
    engine = tiny_engine(**EXACT, num_pages=24, preemption="swap")
    engine.warm_up()
    engine.generate(PROMPTS, CROWD)
    return engine


@pytest.fixture(scope="module")
def want(engine):
    return everything(engine.generate(PROMPTS, CROWD))


def begin(engine):
    """Requests of all kinds of owners, in the middle of what they do."""
    stream = engine.stream(PROMPTS[0], CROWD[0])
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, CROWD[index], f"mine-{index}")
    engine.add_request(PROMPTS[1], drawn(max_tokens=40), "parent")
    next(stream)
    return stream


CALLS = {
    "step": lambda engine: engine.step(),
    "add_request": lambda engine: engine.add_request(PROMPTS[1], CROWD[1], "late"),
    "fork": lambda engine: engine.fork("parent", 2),
    "abort": lambda engine: engine.abort("mine-1"),
    "generate": lambda engine: engine.generate(PROMPTS[:1], CROWD[0]),
}


def interrupt_at(engine, want, name, line):
    """Returns: whether the call was over before that line, and if not, that all was right."""
    stream = begin(engine)
    interrupting = Interrupting(line)
    try:
        with interrupting:
            CALLS[name](engine)
    except KeyboardInterrupt:
        assert interrupting.left == 0
    else:
        stream.close()
        engine.stats()
        for request_id in list(engine._live.by_id):
            engine.abort(request_id)
        engine.step()
        return True
    # Twice in a row: what repairs the engine is interrupted too.
    try:
        with Interrupting(1 + line % 97):
            engine.stats()
    except KeyboardInterrupt:
        pass
    done = {}
    while engine.has_unfinished_requests:
        done |= {output.request_id: output for output in engine.step()}
    # The request that abort() ended may have been about to be returned, as may be those of step().
    assert len({"mine-0", "mine-1", "mine-2", "parent"} - set(done)) <= (name in ("abort", "step"))
    assert all(output.finished for output in done.values())
    *_, last = stream
    assert last.finished
    engine.check_invariants()
    assert everything(engine.generate(PROMPTS, CROWD)) == want, f"{name}, line {line}"
    return False


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_at_some_lines_of_a_call(engine, want, name):
    lines = {"step": 157, "generate": 1597}.get(name, 61)
    for line in range(1, 100_000, lines):
        if interrupt_at(engine, want, name, line):
            return


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_at_each_line_of_a_call(engine, want, name):
    for line in range(1, 100_000):
        if interrupt_at(engine, want, name, line):
            return


class TestDevice:
    """Failures below the engine: of a step, of its results, of the pool."""

    @pytest.mark.parametrize("lost", ["_kv_pages", "_tokens"])
    def test_what_is_lost_is_made_anew(self, engine, want, lost):
        engine.add_request(PROMPTS[0], CROWD[0], "mine")
        engine.step()
        getattr(engine._runner, lost).delete()
        with pytest.raises((RuntimeError, ValueError), match="deleted"):
            for _ in range(3):
                engine.step()
        assert engine.has_unfinished_requests
        (output,) = engine.step()
        assert [c.finish_reason for c in output.outputs] == ["abort"] * len(output.outputs)
        assert everything(engine.generate(PROMPTS, CROWD)) == want

    @pytest.mark.parametrize("where", ["run", "swap"])
    def test_a_call_that_fails(self, engine, want, monkeypatch, where):
        function = getattr(engine._runner, where)

        def fail(*args):
            function(*args)
            raise RuntimeError("INTERNAL: the device failed")

        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, where, fail)
            stream = engine.stream(PROMPTS[0], CROWD[0])
            with pytest.raises(RuntimeError, match="the device failed"):
                engine.generate(PROMPTS, CROWD)
        (last,) = stream
        assert last.finished and last.outputs[0].finish_reason == "abort"
        assert everything(engine.generate(PROMPTS, CROWD)) == want

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_around_the_donation(self, engine, want, monkeypatch, when):
        programs = engine._runner.programs
        step = programs.step

        def interrupted(*args, **kwargs):
            if when == "after":
                step(*args, **kwargs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(programs, "step", interrupted)
            with pytest.raises(GenerationInterrupted):
                engine.generate(PROMPTS, CROWD)
        assert everything(engine.generate(PROMPTS, CROWD)) == want

    def test_the_old_pool_goes_before_there_is_another(self, engine, monkeypatch):
        held = []
        new_pages = engine._runner._new_pages

        def look():
            held.append(engine._runner._kv_pages)
            return new_pages()

        monkeypatch.setattr(engine._runner, "_new_pages", look)
        engine.add_request(PROMPTS[0], CROWD[0])
        engine._runner._kv_pages.delete()
        with pytest.raises((RuntimeError, ValueError), match="deleted"):
            engine.step()
        assert held == []
        assert engine.step()[0].finished
        assert held == [None]

    def test_a_device_that_is_gone(self, monkeypatch):
        engine = tiny_engine(**EXACT)
        stream = engine.stream(PROMPTS[0], CROWD[0])
        engine.add_request(PROMPTS[0], CROWD[0])
        next(stream)
        engine._runner._kv_pages.delete()

        def fail():
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

        monkeypatch.setattr(engine._runner, "_new_pages", fail)
        with pytest.raises((RuntimeError, ValueError), match="deleted"):
            engine.generate(PROMPTS, CROWD)
        messages = set()
        for call in (
            engine.step,
            engine.stats,
            lambda: engine.add_request([1], CROWD[0]),
            lambda: engine.generate([[1]], CROWD[0]),
            lambda: engine.stream([1], CROWD[0]),
            lambda: engine.abort("0"),
            lambda: engine.has_unfinished_requests,
        ):
            with pytest.raises(
                EngineDeadError, match=r"RESOURCE_EXHAUSTED.*Make a new Engine"
            ) as e:
                call()
            messages.add(str(e.value))
        assert len(messages) == 1 and "\n" not in messages.pop()
        # Who streams is told the end, and no more.
        (last,) = stream
        assert last.finished
        stream.close()

    def test_weights_that_are_gone(self):
        engine = tiny_engine(**EXACT)
        # Copies: the engine's own are those of other tests.
        weights = engine._runner.params = jax.tree.map(jnp.copy, engine._runner.params)
        while isinstance(weights, dict):
            weights = next(iter(weights.values()))
        weights.delete()
        with pytest.raises((RuntimeError, ValueError), match="deleted"):
            engine.generate([[1]], CROWD[0])
        with pytest.raises(EngineDeadError, match="weights are not on the device any more"):
            engine.generate([[1]], CROWD[0])


class TestChange:
    def test_it_is_cut_short_until_it_has_ended(self):
        change = Change()
        assert not change.was_cut_short()
        with change:
            assert change.was_cut_short()
        assert not change.was_cut_short()
        with pytest.raises(ZeroDivisionError), change:
            1 / 0  # noqa: B018
        assert change.was_cut_short()
        change.settle(lambda: None)
        assert not change.was_cut_short()

    def test_another_thread_is_refused_while_it_lasts(self):
        change, entered, leave = Change(), threading.Event(), threading.Event()

        def work():
            with change:
                entered.set()
                leave.wait()

        thread = threading.Thread(target=work)
        thread.start()
        entered.wait()
        with pytest.raises(RuntimeError, match="another thread is in a call of this engine"):
            change.check_caller()
        leave.set()
        thread.join()
        change.check_caller()
        assert not change.was_cut_short()

    def test_a_thread_that_died_in_it_is_not_waited_for(self):
        change = Change()
        thread = threading.Thread(target=change.__enter__)
        thread.start()
        thread.join()
        assert change.was_cut_short()

    def test_a_signal_handler_may_look_during_a_step(self, engine, want):
        """Nothing is taken for cut short while it runs, but nothing may be changed in there."""
        seen = []

        def handler(signum, frame):
            seen.append(engine.stats().num_running)
            assert engine.has_unfinished_requests
            for call in (lambda: engine.add_request([1], CROWD[0]), engine.pool_snapshot):
                try:
                    call()
                except RuntimeError as e:
                    seen.append(str(e))

        def step(*args):
            signal.raise_signal(signal.SIGUSR1)
            return schedule(*args)

        before = signal.signal(signal.SIGUSR1, handler)
        schedule = engine._live.pipeline.scheduler.schedule
        engine._live.pipeline.scheduler.schedule = step
        try:
            assert everything(engine.generate(PROMPTS, CROWD)) == want
        finally:
            del engine._live.pipeline.scheduler.schedule
            signal.signal(signal.SIGUSR1, before)
        assert any(isinstance(s, int) for s in seen)
        assert any("inside another call of this engine" in str(s) for s in seen)
        engine.check_invariants()

    def test_the_second_thread_is_refused_and_the_first_goes_on(self, engine, want):
        """Between the steps of `generate` too."""
        refused = []

        def work():
            for call in (engine.stats, lambda: engine.generate([[1]], CROWD[0]), engine.step):
                with pytest.raises(RuntimeError, match="another thread is in a call") as e:
                    call()
                refused.append(e)

        def on_step():
            engine.stats()  # whose turn it is may call
            if not refused:
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()

        assert everything(engine.generate(PROMPTS, CROWD, on_step=on_step)) == want
        assert len(refused) == 3

    @pytest.mark.parametrize(
        "lines", [range(1, 100, 3), pytest.param(range(1, 900), marks=NIGHTLY)]
    )
    def test_a_look_at_any_line_harms_nothing(self, engine, want, lines):
        """In the repair too, which begins with a stream that was left."""
        for line in lines:
            stream = engine.stream(PROMPTS[1], drawn(7, max_tokens=30))
            next(stream)
            stream.close()
            with At(line, engine.stats):
                outputs = engine.generate(PROMPTS[:1], CROWD[:1])
            assert everything(outputs) == want[:1], line
        engine.check_invariants()

    def test_a_thread_that_comes_between_check_and_change_is_refused(self, monkeypatch):
        """As a long tokenization lets it; the step that began meanwhile is not harmed."""
        engine = tiny_engine(**EXACT)
        (want,) = everything(engine.generate(PROMPTS[:1], CROWD[:1]))
        request_id = engine.add_request(PROMPTS[0], CROWD[0])
        make, run = engine._maker.make, engine._runner.run
        made, go, in_step, leave = (threading.Event() for _ in range(4))

        def slow_make(*args, **kwargs):
            request = make(*args, **kwargs)
            made.set()
            assert go.wait(60)
            return request

        def slow_run(*args):
            in_step.set()
            assert leave.wait(60)
            return run(*args)

        def add():
            with pytest.raises(RuntimeError, match="another thread is in a call") as e:
                engine.add_request(PROMPTS[1], CROWD[1])
            refused.append(e)

        refused = []
        monkeypatch.setattr(engine._maker, "make", slow_make)
        monkeypatch.setattr(engine._runner, "run", slow_run)
        first, second = threading.Thread(target=add), threading.Thread(target=engine.step)
        first.start()
        assert made.wait(60)
        second.start()
        assert in_step.wait(60)
        go.set()
        first.join()
        leave.set()
        second.join()
        monkeypatch.undo()
        assert refused
        assert everything([run_steps(engine)[request_id]]) == [want]

    def test_threads_take_turns_behind_a_lock(self, engine, want):
        lock, found = threading.Lock(), {}

        def work(index):
            with lock:
                stream = engine.stream(PROMPTS[index], CROWD[index])
            last = None
            while True:
                with lock:
                    output = next(stream, None)
                if output is None:
                    break
                last = output
            found[index] = everything([last])[0]

        threads = [threading.Thread(target=work, args=[index]) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[index] for index in range(3)] == want


def test_an_interrupted_start_leaves_nothing(monkeypatch):
    """Whatever is interrupted while an engine is made or warmed up, another one works."""
    engine = tiny_engine(**EXACT)
    run = engine._runner.run

    def interrupted(*args, **kwargs):
        run(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.warm_up()
    monkeypatch.undo()
    engine.warm_up()
    assert engine.generate([[1, 2]], SamplingParams(max_tokens=3))[0].finished
    with pytest.raises(KeyboardInterrupt), Interrupting(150):
        tiny_engine(**EXACT)
    engine = tiny_engine(**EXACT)
    assert engine.generate([[1, 2]], SamplingParams(max_tokens=3))[0].finished
