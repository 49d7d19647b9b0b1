# SPDX-License-Identifier: Apache-2.0
"""What a step does on the host, by name in traces of jax's profiler; `measure.profile` reads them.

Without a trace an annotation costs less than a microsecond.
"""

import jax

STEP = "step"
# In the order in which a step does them.
PHASES = ("schedule", "pack", "swap", "dispatch", "read", "detokenize")

phase = jax.profiler.TraceAnnotation


def step(number: int) -> jax.profiler.StepTraceAnnotation:
    """Surrounds a call that dispatches a step and reads the one before."""
    return jax.profiler.StepTraceAnnotation(STEP, step_num=number)
