# SPDX-License-Identifier: Apache-2.0
"""First steps compiled while weights are read: found when they are called; faults and Ctrl-C."""

import dataclasses
import json
import shutil
import signal
import sys
import threading

import jax
import pytest

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.device import compile_threads
from jpaged.host.batch import StepShape
from jpaged.host.outputs import GenerationInterrupted
from jpaged.models.stored_tensor import CheckpointError
from jpaged.placement import ModelFiles, compile_ahead
from tests.jpaged.test_engine import CASES, FIXTURES
from tests.jpaged.tiny import token_ids

CASE = FIXTURES / CASES[0]
STEPS = [StepShape(16, 1), StepShape(1, 1)]
SETTINGS = dict(max_model_len=96, max_num_seqs=1, compilation_cache_dir="")
GREEDY = SamplingParams(max_tokens=8, temperature=0)
PROMPT = json.loads((CASE / "expected.json").read_text())["prompts"][0][:12]


def load(path=CASE, params=(), **config):
    config = EngineConfig(**SETTINGS | config)
    files = ModelFiles.of(path, config)
    return Engine.load(files, config, lambda: compile_ahead(config, files, STEPS, params))


@pytest.fixture(scope="module")
def expected():
    return token_ids(Engine.load(CASE, EngineConfig(**SETTINGS)).generate([PROMPT], GREEDY))


def test_a_shape_that_steps_of_one_token_a_row_do_not_get_has_no_bursts(monkeypatch):
    """Compiled, they would be waited for with the shape, and never called."""
    config = EngineConfig(**SETTINGS | {"max_num_seqs": 4}, step_shapes="64x4,4x4", decode_steps=8)
    wanted = []
    monkeypatch.setattr("jpaged.placement.CompileThreads", lambda *given: wanted.append(given[3]))
    files = ModelFiles.of(CASE, config)
    for shapes in ([StepShape(64, 4)], [StepShape(64, 4), StepShape(4, 4)]):
        compile_ahead(config, files, shapes)
    assert [plan.bursts for plan in wanted] == [(), (StepShape(4, 4),)]


class Compiler:
    """Stands in the way of what threads compile; what this thread does goes on.

    Attributes:
      begun: how many programs came.
      go: what they wait for; set when the test ends.
      error: what they end with.
    """

    def __init__(self, monkeypatch):
        self.begun, self.go, self.error = 0, threading.Event(), None
        monkeypatch.setattr(jax.stages.Lowered, "compile", self._instead_of(jax.stages.Lowered))

    def _instead_of(self, lowered):
        real = lowered.compile

        def compile(program):
            self.begun += 1
            assert self.go.wait(300)
            if self.error is not None:
                raise self.error
            return real(program)

        return compile


@pytest.fixture
def compiler(monkeypatch):
    compiler = Compiler(monkeypatch)
    yield compiler
    compiler.go.set()


def test_what_was_compiled_ahead_is_what_steps_call(expected):
    engine = load(scan_layers=True)
    assert token_ids(engine.generate([PROMPT], GREEDY)) == expected
    # Two steps, and a sampler for both; all of them traced by another thread.
    assert engine.stats().num_compilations == 3
    assert engine._runner.programs.num_compiled_here == 0
    assert engine.stats().totals.compile_s > 0


def test_log_probabilities_of_other_modes_are_compiled_ahead_too(expected):
    params = dataclasses.replace(GREEDY, logprobs=1, logprobs_mode="filters")
    engine = load(params=[params], scan_layers=True)
    assert token_ids(engine.generate([PROMPT], params)) == expected
    assert engine.stats().num_compilations == 4
    assert engine._runner.programs.num_compiled_here == 0


def test_a_strict_engine_compiles_all_of_its_steps_so(expected):
    engine = Engine.load(CASE, EngineConfig(step_shapes="16x1,1x1", strict_shapes=True, **SETTINGS))
    assert token_ids(engine.generate([PROMPT], GREEDY)) == expected
    # Beside copies of pages, which no shape of a step changes.
    assert engine.stats().num_compilations == 3 + engine._runner.programs.num_compiled_here


def test_threads_take_short_turns_while_steps_are_traced_and_no_longer(monkeypatch):
    usual, seen, both = sys.getswitchinterval(), [], threading.Barrier(2, timeout=60)
    config = EngineConfig(**SETTINGS)
    files = ModelFiles.of(CASE, config)

    class Tracer:
        def lower_step(self, shape, wanted):
            both.wait()  # beside the other one
            seen.append(sys.getswitchinterval())
            both.wait()
            if shape == STEPS[1]:
                raise RuntimeError("not traced")
            return []

    monkeypatch.setattr("jpaged.placement._compiler_of", lambda *given: Tracer())
    for each in [compile_ahead(config, files, STEPS) for _ in range(2)]:
        assert each.wait(STEPS[0])
        with pytest.raises(RuntimeError, match="not traced"):
            each.wait(STEPS[1])
        each._pool.shutdown(wait=True)
    assert seen == [pytest.approx(1e-4)] * 4
    assert sys.getswitchinterval() == usual == pytest.approx(5e-3)


def test_a_fault_is_what_the_first_step_says_and_the_next_one_compiles(compiler, expected):
    compiler.error = RuntimeError("no room for this program")
    engine = load()
    compiler.go.set()
    with pytest.raises(RuntimeError, match="no room for this program"):
        engine.generate([PROMPT], GREEDY)
    compiler.error = None
    assert token_ids(engine.generate([PROMPT], GREEDY)) == expected
    engine.check_invariants()


def test_ctrl_c_does_not_wait_for_the_compiler(compiler, expected):
    engine, main = load(), threading.get_ident()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    try:
        with pytest.raises(GenerationInterrupted):
            engine.generate([PROMPT], GREEDY)
    finally:
        signal.signal(signal.SIGINT, before)
    compiler.go.set()
    assert token_ids(engine.generate([PROMPT], GREEDY)) == expected
    assert engine._runner.programs.num_compiled_here == 0


def test_damaged_weights_are_told_at_once_and_nothing_more_is_compiled(
    compiler, tmp_path, monkeypatch
):
    monkeypatch.setattr(compile_threads, "_MOST_THREADS", 1)
    shutil.copytree(CASE, tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.glob("*.safetensors")
    # The first tensor: not finite.
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start : start + 64] = b"\xff" * 64
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        load(tmp_path)
    compiler.go.set()
    for thread in threading.enumerate():
        if thread.name.startswith("compile"):
            thread.join()
    assert compiler.begun <= 1
