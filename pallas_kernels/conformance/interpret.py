# SPDX-License-Identifier: Apache-2.0
"""Runs the kernels of TPUs and GPUs on any machine, and finds the races of their copies."""

import contextlib
import dataclasses
import unittest.mock
import warnings
from collections.abc import Iterator
from typing import Any

import jax


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
    # Imported here, so that who interprets nothing depends on nothing private. Up to jax 0.11 what
    # the interpreter finds stands here only.
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    from jax._src.pallas.mosaic.interpret.race_detection_state import RaceDetectionState
    from jax.experimental.pallas import tpu as pltpu

    states: list[RaceDetectionState] = []

    def recorded(*args, **kwargs):
        # Every kernel starts a state of its own, and would hide the one before.
        states.append(RaceDetectionState(*args, **kwargs))
        return states[-1]

    pltpu.reset_tpu_interpret_mode_state()
    try:
        with (
            unittest.mock.patch.object(interpret_pallas_call, "RaceDetectionState", recorded),
            pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)),
        ):
            yield
    finally:
        pltpu.reset_tpu_interpret_mode_state()
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
    # As above: nothing private for who interprets nothing.
    from jax._src import config
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.gpu import chip

    mode: Any = True
    if capability[0] >= 9:
        params = getattr(plgpu, "InterpretGPUParams", None)
        if params is None:
            raise RuntimeError(
                f"jax {jax.__version__} cannot interpret Mosaic GPU's products; jax 0.11 can"
            )
        mode = params(detect_races=True)
    states = []
    name = "GPURaceDetectionState"
    state_type: Any = getattr(gpu_callbacks, name, None)

    def recorded(*args, **kwargs):
        states.append(state_type(*args, **kwargs))
        return states[-1]

    copy: Any = getattr(gpu_callbacks, "copy_gmem_to_smem", None)
    torn: list[str] = []

    def checked(**kwargs):
        torn.extend(_torn_tiles(kwargs["src_transforms"], kwargs["dst_transforms"]))
        return copy(**kwargs)

    interpreted = dataclasses.replace(chip.INTERPRETED, capability=capability)
    gpu_callbacks.reset_gpu_interpret_mode_state()
    before = config.pallas_tpu_interpret_mode_context_manager.swap_local(mode)
    try:
        with (
            unittest.mock.patch.object(gpu_callbacks, name, recorded, create=True),
            unittest.mock.patch.object(gpu_callbacks, "copy_gmem_to_smem", checked, create=True),
            unittest.mock.patch.object(chip, "INTERPRETED", interpreted),
            warnings.catch_warnings(),
        ):
            # Query rows past a tile's own may hold NaN; NumPy multiplies in threads of jax's.
            warnings.filterwarnings("ignore", "invalid value encountered in matmul")
            yield
    finally:
        config.pallas_tpu_interpret_mode_context_manager.set_local(before)
        gpu_callbacks.reset_gpu_interpret_mode_state()
    _check_races(states)
    assert not torn, f"{len(torn)} copies tear tiles, as the first: {torn[0]}"


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
