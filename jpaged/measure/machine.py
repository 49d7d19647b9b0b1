# SPDX-License-Identifier: Apache-2.0
"""What a measurement was made on, and clocks that only a whole process has."""

import os
import pathlib
import platform
import time
from importlib import metadata
from typing import Any

import jax
import psutil

from jpaged.device import cpu


def hardware() -> dict[str, Any]:
    """`cpu`, `cpu_cores`, `memory_gib`, and of JAX's default device `platform` and `device`."""
    device = jax.local_devices()[0]
    return {
        "cpu": cpu.name(),
        "cpu_cores": cpu.num_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "platform": device.platform,
        "device": device.device_kind,
    }


def versions() -> dict[str, str]:
    """Those of `python`, `jax` and `jaxlib`."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
    }


def seconds_since_process_start() -> float:
    """From /proc to a hundredth of a second; psutil's clock is only good to a second on Linux."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return time.time() - psutil.Process().create_time()


class CompileClock:
    """Counts the seconds that JAX spends on tracing, lowering and compiling.

    Attributes:
      seconds: spent so far; reading a program from the cache counts too.
      cache_hits, cache_misses: of the persistent compilation cache.
    """

    def __init__(self):
        """Starts; JAX calls it from now on, until the process ends."""
        self.seconds = 0.0
        self.cache_hits = 0
        self.cache_misses = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs

    def _on_event(self, event: str, **_: Any) -> None:
        self.cache_hits += event == "/jax/compilation_cache/cache_hits"
        self.cache_misses += event == "/jax/compilation_cache/cache_misses"
