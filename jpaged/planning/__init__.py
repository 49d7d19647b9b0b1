# SPDX-License-Identifier: Apache-2.0
"""What a model and its pages would take of a device, without weights or device.

`make_plan` gives the numbers by which an engine of the same settings sizes its pool, and says what
to change where something does not fit; `compile_steps` has the device's compiler say what the
steps of such an engine take.
"""

from jpaged.planning.chips import CHIPS, DeviceMemory, memory_of
from jpaged.planning.plan import KindPlan, Plan
from jpaged.planning.planner import compile_steps, make_plan, step_problems

__all__ = [
    "CHIPS",
    "DeviceMemory",
    "KindPlan",
    "Plan",
    "compile_steps",
    "make_plan",
    "memory_of",
    "step_problems",
]
