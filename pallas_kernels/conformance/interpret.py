# SPDX-License-Identifier: Apache-2.0
"""Runs the kernels of TPUs and GPUs on any machine, and finds the races of their copies."""

import contextlib
import dataclasses
import unittest.mock
import warnings
from collections.abc import Iterator
from typing import Any

from jpaged.pallas_kernels import versions


@contextlib.contextmanager
def interpret_tpu() -> Iterator[None]:
    """Interprets what is traced within, with copies that run as late as they may.

    Memory that was never written is NaN, and page ids outside the pool are errors where the copy is
    awaited: one that is started only goes unnoticed. What the kernel runs at once waits in threads
    of XLA's pool, which has one a core, and with few cores may wait for ever. The environment
    variable PJRT_NPROC=8, set before jax makes its first array, gives the pool eight.

    Raises:
      AssertionError: at the end, if two accesses of which one writes were not ordered by a wait.
    """
    interpreter = versions.tpu_interpreter()
    with _races_recorded(interpreter) as states, interpreter.forced():
        yield
    _check_races(states)


@contextlib.contextmanager
def interpret_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Interprets the GPU kernels that are traced within, as those of a compute capability.

    Mosaic GPU's are interpreted with their copies, barriers and warpgroups, one thread block after
    the other; memory that was never written is NaN. They wait as TPU kernels do (`interpret_tpu`):
    set PJRT_NPROC=8. jax has no such interpreter for Triton's.

    Args:
      capability: (9, 0) for Mosaic GPU's kernels on Hopper, (8, 0) for Triton's.

    Raises:
      AssertionError: at the end, if two accesses of which one writes were not ordered by a barrier,
        or a copy does not start where a tile does.
      RuntimeError: for Mosaic GPU's kernels with jax 0.10.
    """
    from jpaged.pallas_kernels.gpu import chip

    mosaic = capability[0] >= 9
    interpreter = versions.mosaic_interpreter() if mosaic else versions.triton_interpreter()
    interpreted = dataclasses.replace(chip.INTERPRETED, capability=capability)
    with (
        _races_recorded(interpreter) as states,
        _torn_copies_recorded(interpreter) as torn,
        unittest.mock.patch.object(chip, "INTERPRETED", interpreted),
        warnings.catch_warnings(),
        interpreter.forced(),
    ):
        # Query rows past a tile's own may hold NaN; NumPy multiplies in threads of jax's.
        warnings.filterwarnings("ignore", "invalid value encountered in matmul")
        yield
    _check_races(states)
    assert not torn, f"{len(torn)} copies tear tiles, as the first: {torn[0]}"


@contextlib.contextmanager
def _races_recorded(interpreter: versions.Interpreter) -> Iterator[list[Any]]:
    """The states of race detection of all kernels: each starts one, and would hide the last."""
    states: list[Any] = []
    if not interpreter.race_state:
        yield states
        return
    state_type = getattr(interpreter.module, interpreter.race_state)

    def recorded(*args, **kwargs):
        states.append(state_type(*args, **kwargs))
        return states[-1]

    with unittest.mock.patch.object(interpreter.module, interpreter.race_state, recorded):
        yield states


@contextlib.contextmanager
def _torn_copies_recorded(interpreter: versions.Interpreter) -> Iterator[list[str]]:
    """What is wrong with copies to tiles, see `_torn_tiles`."""
    torn: list[str] = []
    if not interpreter.copy_to_shared:
        yield torn
        return
    copy = getattr(interpreter.module, interpreter.copy_to_shared)

    def checked(**kwargs):
        torn.extend(_torn_tiles(kwargs["src_transforms"], kwargs["dst_transforms"]))
        return copy(**kwargs)

    with unittest.mock.patch.object(interpreter.module, interpreter.copy_to_shared, checked):
        yield torn


def _torn_tiles(source: Any, target: Any) -> Iterator[str]:
    """What is wrong with a copy by TMA to tiles: the interpreter, which has none, copies it right.

    The device tiles what is copied from too, and gives zeros for rows past the end of a tile.
    """
    tiling = next((t.tiling for t in target if hasattr(t, "tiling")), ())
    indices = source[-1].indices if source else ()
    for index, size in zip(indices[len(indices) - len(tiling) :], tiling, strict=True):
        start = int(index.start if hasattr(index, "start") else index)
        if start % size:
            yield f"starts at {start}, no multiple of {size}"


def _check_races(states) -> None:
    races = sum(state.races_found for state in states)
    assert not races, f"{races} of {len(states)} kernels have a race; standard output says where"
