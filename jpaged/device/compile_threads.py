# SPDX-License-Identifier: Apache-2.0
"""Compiles steps in threads, while weights are read or other steps run."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import jax

from jpaged.device.memory import PoolPlan
from jpaged.device.programs import Programs
from jpaged.host.batch import StepShape
from jpaged.host.warm_up import WarmUpPlan
from jpaged.models.config import ModelConfig

# Each may take gigabytes of memory, and compilers have threads of their own.
_MOST_THREADS = 4
# By Python's own, 5 ms, a thread that reads weights would wait for so long at each call of NumPy
# while another one traces, and next to nothing would be read meanwhile.
_TURN_S = 1e-4


class _ShortTurns(contextlib.ContextDecorator):
    """Has Python's threads take short turns, in all of the process, while a thread is inside.

    What others set meanwhile does not last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside, self._usual_s = 0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_inside:
                self._usual_s = sys.getswitchinterval()
                sys.setswitchinterval(min(_TURN_S, self._usual_s))
            self._num_inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                sys.setswitchinterval(self._usual_s)


_short_turns = _ShortTurns()


class Lowering(Protocol):
    """What traces steps: an `ahead.AheadCompiler`."""

    @property
    def lower_step(self) -> Callable[[StepShape, WarmUpPlan], Iterable[jax.stages.Lowered]]:
        """Takes a shape, and what else is wanted of it."""
        ...


class CompileThreads:
    """Threads that compile the steps that come first, for whoever waits for these.

    What is traced is the work of one of them, for Python runs one at a time; what was traced is
    compiled by all, in order. They end when all is done.

    Attributes:
      programs: what is compiled.
      plan: of the pool that it is compiled for.
      model_config: of the model that it is compiled for.
    """

    def __init__(
        self,
        programs: Programs,
        plan: PoolPlan,
        model_config: ModelConfig,
        wanted: WarmUpPlan,
        compiler: Callable[[], Lowering],
    ):
        """Begins.

        Args:
          programs: of the runner that will call them.
          plan: the pool's dimensions.
          model_config: the model's shape.
          wanted: the steps, and what they call.
          compiler: makes what compiles, in a thread, as that takes time too.
        """
        self.programs, self.plan, self.model_config = programs, plan, model_config
        self._closed = False
        self._pending: dict[StepShape, Future[list[Future[None]]]] = {
            shape: Future() for shape in wanted.shapes
        }
        self._took: dict[StepShape, list[float]] = {shape: [] for shape in wanted.shapes}
        self._pool = ThreadPoolExecutor(min(_usable_cores(), _MOST_THREADS), "compile")
        self._pool.submit(self._lower, list(self._pending.items()), compiler, wanted)

    def wait(self, shape: StepShape) -> bool:
        """Waits until what steps of a shape call is compiled, where that was begun.

        Returns:
          Whether this is the first call for a shape that was.

        Raises:
          Exception: whatever the compiler had to say, once: the next call finds nothing begun.
        """
        lowered = self._pending.get(shape)
        if lowered is None:
            return False
        try:
            for compiled in lowered.result():
                compiled.result()
        except Exception:  # Ctrl-C is none: whoever waits again waits for the same
            del self._pending[shape]
            raise
        del self._pending[shape]
        return True

    def seconds(self) -> dict[StepShape, float]:
        """What compiling each shape took so far, of one core or more; what is shared, the first."""
        return {shape: sum(took) for shape, took in self._took.items()}

    def close(self) -> None:
        """Begins nothing more, and does not wait for what is begun."""
        self._closed = True

    @_short_turns
    def _lower(
        self,
        shapes: list[tuple[StepShape, Future[list[Future[None]]]]],
        compiler: Callable[[], Lowering],
        wanted: WarmUpPlan,
    ) -> None:
        begun: dict[jax.stages.Lowered, Future[None]] = {}
        made: Lowering | None = None
        for shape, future in shapes:
            start = time.perf_counter()
            try:
                parts: list[Future[None]] = []
                if not self._is_over():
                    made = made or compiler()
                    for lowered in made.lower_step(shape, wanted):
                        if lowered not in begun:
                            begun[lowered] = self._pool.submit(self._compile, lowered, shape)
                        parts.append(begun[lowered])
            except BaseException as e:
                future.set_exception(e)
            else:
                self._took[shape].append(time.perf_counter() - start)
                future.set_result(parts)
        self._pool.shutdown(wait=False)

    def _compile(self, lowered: jax.stages.Lowered, shape: StepShape) -> None:
        start = time.perf_counter()
        if not self._is_over():
            lowered.compile()
        self._took[shape].append(time.perf_counter() - start)

    def _is_over(self) -> bool:
        """Whether nobody wants more: at its end, the interpreter waits for threads."""
        return self._closed or not threading.main_thread().is_alive()


def _usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
