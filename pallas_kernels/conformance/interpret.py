# SPDX-License-Identifier: Apache-2.0
"""Runs TPU kernels on any machine, and finds the races of their copies."""

import contextlib
import unittest.mock
from collections.abc import Iterator


@contextlib.contextmanager
def interpret_tpu() -> Iterator[None]:
    """Interprets what is traced within, with copies that run as late as they may.

    Memory that was never written is NaN, and page ids outside the pool are errors where the copy is
    awaited: one that is started only goes unnoticed. jax's interpreter can wait for itself for ever
    on a machine with one core; two CPU devices (`jax_num_cpu_devices`) prevent that.

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
    races = sum(state.races_found for state in states)
    assert not races, f"{races} of {len(states)} kernels have a race; standard output says where"
