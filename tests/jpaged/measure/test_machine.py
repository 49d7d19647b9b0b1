# SPDX-License-Identifier: Apache-2.0
import time

import jax
import psutil
import pytest

from jpaged.measure import machine


def test_the_process_is_as_old_as_psutil_says():
    age = time.time() - psutil.Process().create_time()
    assert machine.seconds_since_process_start() == pytest.approx(age, abs=1.5)


def test_the_clock_counts_compiling_alone():
    clock = machine.CompileClock()
    double = jax.jit(lambda x: 2 * x + 1)
    double(1.0)
    compiled = clock.seconds
    assert compiled > 0
    double(2.0)
    assert clock.seconds == compiled


def test_the_machine_is_described():
    hardware = machine.hardware()
    assert hardware.keys() == {"cpu", "cpu_cores", "memory_gib", "platform", "device"}
    assert hardware["cpu"] and hardware["cpu_cores"] >= 1 and hardware["memory_gib"] > 0
    assert machine.versions()["jax"] == jax.__version__
