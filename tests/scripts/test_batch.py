# SPDX-License-Identifier: Apache-2.0
"""scripts/batch.py, killed and run again."""

import json
import signal
import subprocess
import time

import pytest

from tests.scripts.programs import ended, start

pytestmark = [pytest.mark.slow, pytest.mark.nightly]


def test_killed_and_run_again(tmp_path):
    rows = [
        {"custom_id": f"r{i}", "prompt": "Once upon a time", "n": 1 + i % 2, "stop": [" young"]}
        for i in range(60)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--max_num_seqs=4", "--num_pages=25", "--max_tokens=60", "--sync_rows=1"]

    def command(name):
        return ["jpaged", "batch", f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/{name}",
                *flags]  # fmt: skip

    path, sizes = tmp_path / "out.jsonl", []
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        before = path.stat().st_size if path.exists() else 0
        process = start(*command("out.jsonl"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not path.exists() or path.stat().st_size < before + 2000:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait() == code
        sizes.append(path.stat().st_size)
    for name in ("out.jsonl", "whole.jsonl"):
        done = ended(*command(name))
        assert done.returncode == 0, done.stderr
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    done = ended(*command("out.jsonl"), "--seed=1")
    assert done.returncode == 2 and "parameters.seed was 0, and is 1" in done.stderr
