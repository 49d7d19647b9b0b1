# SPDX-License-Identifier: Apache-2.0
"""A record on the command line, from the run to the page."""

from tests.scripts.programs import run


def test_a_simulated_run_and_its_page(tmp_path):
    record, page = tmp_path / "run.jsonl", tmp_path / "run.jsonl.html"
    run(
        "jpaged", "simulate", "--policies=contiguous-max,paged", "--num_requests=20", "--rate=inf",
        f"--record={record}",
    )  # fmt: skip
    assert run("jpaged", "view", str(record)) == f"{page}\n"
    assert page.read_text().startswith("<!DOCTYPE html>")
    before = page.read_bytes()
    lines = record.read_bytes().splitlines(keepends=True)
    for number, (data, message) in enumerate(
        [
            (b"Once upon a time\n", "1.jsonl is no record of a run: make one with --record=FILE"),
            (lines[0], "2.jsonl has no step: the run was over, or was killed, before one"),
        ],
        1,
    ):
        (other := tmp_path / f"{number}.jsonl").write_bytes(data)
        said = run("jpaged", "view", str(other), f"--output={page}", code=2)
        assert said.count("\n") == 1 and message in said and page.read_bytes() == before
