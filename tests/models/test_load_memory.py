# SPDX-License-Identifier: Apache-2.0
"""What loading takes beside the parameters: host memory holds them once."""

import sys

import pytest

from tests.scripts.programs import run_report


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which Linux alone has")
def test_parameters_are_in_memory_once(tmp_path):
    peaks = run_report("tests.models.loaded", str(tmp_path), fresh=True)
    assert len(peaks) == 7
    assert all(0.5 < peak <= 1.3 for peak in peaks.values()), peaks
