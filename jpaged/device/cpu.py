# SPDX-License-Identifier: Apache-2.0
"""This machine's processor."""

import os
import pathlib
import platform

import psutil


def name() -> str:
    """What it is called, for people."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def features() -> str:
    """The instruction sets that it has, as Linux names them; empty elsewhere."""
    return _cpuinfo("flags") or _cpuinfo("Features")


def num_cores() -> int:
    """Cores that this process may run on."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):
        return len(process.cpu_affinity() or ())
    return os.cpu_count() or 1


def _cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == field:
                return value.strip()
    except OSError:
        pass
    return ""
