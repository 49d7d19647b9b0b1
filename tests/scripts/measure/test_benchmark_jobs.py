# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.scripts.programs import run_report


@pytest.mark.slow
@pytest.mark.nightly
def test_benchmark_of_jobs():
    report = run_report("scripts.measure.benchmark_jobs", "--num_rows=40", "--num_bare=40")
    assert report["num_rows"] == 40 and 0 < report["overhead"] < 1
    for name in ("rows_per_s", "rows_per_cpu_s", "peak_mib"):
        assert len(report[name]) == 10 and min(report[name]) > 0
    assert 0 < report["own_us"] < 1e6
