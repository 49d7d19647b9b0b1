# SPDX-License-Identifier: Apache-2.0
"""Compiles for accelerators that are not there, and reads what their compilers say.

The real TPU compiler is in the package libtpu and runs on any x86-64 Linux machine. It refuses what
a chip cannot do, says what a program takes of each memory, and writes out the schedule of every
kernel. It does not run anything, so nothing here is a time.
"""

from jpaged.pallas_kernels.aot.gpu import GPU_TARGETS, GpuCompiler, GpuTarget, find_cuda_compiler
from jpaged.pallas_kernels.aot.schedule import Loop, Schedule, read_schedule
from jpaged.pallas_kernels.aot.tpu import TARGETS, Target, TpuCompiler, find_libtpu

__all__ = [
    "GPU_TARGETS",
    "TARGETS",
    "GpuCompiler",
    "GpuTarget",
    "Loop",
    "Schedule",
    "Target",
    "TpuCompiler",
    "find_cuda_compiler",
    "find_libtpu",
    "read_schedule",
]
