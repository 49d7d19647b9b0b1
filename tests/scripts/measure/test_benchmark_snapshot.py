# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.scripts.programs import run_report


@pytest.mark.slow
@pytest.mark.nightly
def test_benchmark_of_snapshots():
    report = run_report(
        "scripts.measure.benchmark_snapshot", "--num_rows=3", "--num_tokens=40", "--logprobs=1"
    )
    for name in ("generate", "pause", "write", "resume", "orbax_write", "orbax_read"):
        assert report[f"{name}_s"] > 0
    # Pages of 16 tokens, of 6 layers, 2 heads and 64 lanes of 4 bytes.
    assert report["page_bytes"] >= 3 * 3 * 6 * 2 * 16 * 64 * 4
    assert report["pause_s"] <= report["write_s"]
    # Of each token its id; how many likeliest there are, two of them, and their log-probabilities.
    assert report["snapshot_bytes"] >= 3 * 40 * (4 + 4 + 2 * 12) / 2
