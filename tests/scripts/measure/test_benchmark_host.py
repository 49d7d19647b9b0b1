# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.scripts.programs import run, run_report


def test_benchmark_of_the_host():
    report = run_report(
        *("scripts.measure.benchmark_host", "--num_seqs=8", "--num_tokens=100", "--steps=20"),
        fresh=True,
    )
    parts = ("schedule_us", "build_batch_us", "update_us", "total_us", "fork_us")
    assert all(0 < report[part] < 1e6 for part in parts)
    others = {"num_seqs", "num_tokens", "page_size", "steps", "python", "cpu_cores"}
    assert report.keys() == {*parts, *others, "total_p99_us", "fork_pages"}


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--num_tokens=9"], "num_tokens=9 must exceed"), (["--steps=0"], "--steps")],
)
def test_bad_usage_is_one_line(args, message):
    said = run("scripts.measure.benchmark_host", *args, code=2)
    assert message in said
    assert said.count("\n") == 1, said
