# SPDX-License-Identifier: Apache-2.0
"""An engine's thread: callers share steps, and each gets its results or an error."""

import concurrent.futures
import gc
import subprocess
import sys
import threading
import time

import jax
import pytest

from jpaged import SamplingParams
from jpaged.integrations.engine_thread import EngineFailedError, EngineThread
from jpaged.jobs import Row
from jpaged.recovery import EngineDeadError
from tests.jpaged.tiny import tiny_engine
from tests.scripts.programs import ROOT, environment


def of(name, length=6):
    params = SamplingParams(max_tokens=length, ignore_eos=True)
    return Row(row_id=name, prompt=[1, 2, 3], params=params)


def tokens(results):
    return [result.output.outputs[0].token_ids for result in results]


@pytest.fixture
def engine():
    return tiny_engine(deterministic=True, max_num_seqs=8, max_num_batched_tokens=32, num_pages=65)


@pytest.fixture
def thread(engine):
    thread = EngineThread(engine)
    yield thread
    thread.close()


def num_steps(engine):
    """As `stats` says, which is refused while the thread is in a step."""
    return engine._totals.num_steps


def names():
    return [thread.name for thread in threading.enumerate()]


def test_callers_share_steps_and_have_their_results_in_order(engine, thread):
    calls = [[of(f"{c}-{i}", 20 - 3 * i) for i in range(2)] for c in range(4)]
    before = num_steps(engine)
    alone = [tokens(thread.run(rows)) for rows in calls]
    one_by_one = num_steps(engine) - before
    before = num_steps(engine)
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        together = list(pool.map(thread.run, calls))
    # All eight run at once: hardly more steps than one call takes.
    assert num_steps(engine) - before < one_by_one / 2
    assert [tokens(results) for results in together] == alone
    assert [len(ids) for ids in alone[0]] == [20, 17]
    for rows, results in zip(calls, together, strict=True):
        assert [result.row.row_id for result in results] == [row.row_id for row in rows]


def test_a_call_does_not_wait_for_those_before_it(engine, thread):
    ended = []
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        long = pool.submit(thread.run, [of("long", 100)])
        long.add_done_callback(lambda _: ended.append("long"))
        while not num_steps(engine):
            time.sleep(0.001)
        thread.run([of("short", 2)])
        ended.append("short")
    assert ended == ["short", "long"]


def test_equal_rows_of_several_calls_are_each_answered(thread):
    row = of("same")
    wrong = Row(row_id="wrong", error="it is wrong")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = list(pool.map(thread.run, [[row, wrong, row]] * 3))
    (first, _, second) = found[0]
    for results in found:
        assert tokens([results[0], results[2]]) == tokens([first, second]) == tokens([first] * 2)
        assert results[1].output is None and results[1].error == "it is wrong"
    assert thread.run([]) == []


def failing(engine, monkeypatch, error):
    """Has the device fail in its third step, and recovers when told."""
    calls, run_step = iter(range(1000)), engine._runner.run

    def fail(*args):
        if next(calls) == 2:
            raise error
        return run_step(*args)

    monkeypatch.setattr(engine._runner, "run", fail)


def test_a_failure_reaches_all_callers_and_the_next_is_served(engine, thread, monkeypatch):
    want = tokens(thread.run([of("a"), of("b")]))
    # More than the window: some wait outside the engine.
    calls = [[of(f"{c}-{i}", 50) for i in range(20)] for c in range(4)]
    failing(engine, monkeypatch, jax.errors.JaxRuntimeError("INTERNAL: the device failed"))
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(thread.run, rows) for rows in calls]
        done, _ = concurrent.futures.wait(
            futures, 60, return_when=concurrent.futures.FIRST_EXCEPTION
        )
        failed = [f for f in done if f.exception()]
        assert failed
        for future in failed:
            error = future.exception()
            assert isinstance(error, EngineFailedError)
            assert "JaxRuntimeError: INTERNAL: the device failed" in str(error)
            assert isinstance(error.__cause__, jax.errors.JaxRuntimeError)
        # A call that came after the failure is served; none hangs.
        assert not concurrent.futures.wait(futures, 60).not_done
    assert tokens(thread.run([of("a"), of("b")])) == want
    assert not engine.has_unfinished_requests
    engine.check_invariants()


def test_a_dead_engine_fails_each_call(engine, thread, monkeypatch):
    def fail():
        raise RuntimeError("the device is gone")

    failing(engine, monkeypatch, RuntimeError("INTERNAL"))
    monkeypatch.setattr(engine._live, "_recover_device", fail)
    with pytest.raises(EngineFailedError, match="RuntimeError: INTERNAL"):
        thread.run([of("a", 50)])
    for _ in range(3):
        with pytest.raises(EngineFailedError, match=r"EngineDeadError: .*the device is gone"):
            thread.run([of("a", 50)])
    with pytest.raises(EngineDeadError):
        engine.step()


def test_closing_ends_the_calls_that_wait(engine, thread):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(thread.run, [of(f"{c}", 120)] * 40) for c in range(2)]
        while not num_steps(engine):
            time.sleep(0.001)
        thread.close()
        for future in futures:
            with pytest.raises(EngineFailedError, match="the engine was closed"):
                future.result(60)
    assert "jpaged-engine" not in names()
    with pytest.raises(EngineFailedError, match="the engine was closed"):
        thread.run([of("a")])
    thread.close()
    assert not engine.has_unfinished_requests


def test_the_thread_ends_when_nobody_knows_it(engine):
    thread = EngineThread(engine)
    thread.run([of("a")])
    assert "jpaged-engine" in names()
    del thread
    gc.collect()
    assert "jpaged-engine" not in names()


@pytest.mark.slow
def test_a_process_ends_while_calls_wait():
    """Also those of threads that nobody waits for, in a step: without a word."""
    code = """
import contextlib, threading, time
from tests.jpaged.integrations.test_engine_thread import *
engine = tiny_engine(num_pages=65)
thread = EngineThread(engine)
def call():
    with contextlib.suppress(EngineFailedError):
        thread.run([of(str(i), 120) for i in range(200)])
threading.Thread(target=call, daemon=True).start()
while not num_steps(engine):
    time.sleep(0.001)
print("ends")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")
