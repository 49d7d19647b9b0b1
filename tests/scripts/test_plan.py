# SPDX-License-Identifier: Apache-2.0
"""`jpaged plan` as users run it."""

import json
import os
import subprocess
import sys

from jpaged.models import DEMO
from tests.models.hub_server import hub as serving
from tests.scripts.programs import ROOT, ended

# Several refusals cost one start: what each says, a line each.
REFUSING = """
import sys
from absl import app, flags
from absl.testing import flagsaver
from jpaged.scripts import plan
for line in sys.stdin.read().splitlines():
    with flagsaver.flagsaver():
        flags.FLAGS(["plan", *line.split()])
        try:
            plan.main(["plan"])
        except app.UsageError as e:
            print(" ".join(str(e).split()))
"""


def test_a_model_of_the_hub_of_which_its_config_alone_is_downloaded(tmp_path):
    files = {"config.json": (DEMO / "config.json").read_bytes(), "model.safetensors": b"weights"}
    with serving({"org/name": files}) as (endpoint, sent):
        done = subprocess.run(
            [sys.executable, "-m", "jpaged", "plan", "--model=org/name", "--chip=v5e",
             "--num_pages=65", "--max_model_len=1024", "--output=json"],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
            env=os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sent == ["config.json"]
    found = json.loads(done.stdout)
    assert (found["model"], found["chip"], found["num_pages"]) == ("org/name", "v5e", 65)
    assert found["longest"] == 1024 and found["problems"] == found["changes"] == []
    assert found["pool_bytes"] == 65 * found["page_bytes"]
    assert found["kinds"][0]["window"] is None
    assert found["token_bytes"] == found["page_bytes"] // 16 and found["steps"] is None


def test_what_does_not_fit_is_said_with_what_would():
    done = ended(
        "jpaged", "plan", "--model=llama-3.1-8b", "--chip=h100",
        "--prompt_len=1000", "--output_len=300",
    )  # fmt: skip
    assert done.returncode == 1 and not done.stderr
    # As README has it.
    assert done.stdout in (ROOT / "README.md").read_text(encoding="utf-8")


def test_bad_usage_is_one_line(tmp_path):
    no_json = tmp_path / "config.json"
    no_json.write_text("{")
    refused = {
        "--chip=h100": "--model is missing; name a directory",
        "--model=demo": "--chip is missing; choose among a100, ",
        f"--model={tmp_path}/none --chip=h100": f"model directory '{tmp_path}/none' does not exist",
        f"--model={no_json} --chip=h100": f"{no_json} is not valid JSON",
        "--model=qwen3-8b --chip=h100 --num_devices=3": "num_kv_heads=8 does not split over 3 ",
        "--model=demo --chip=h100 --memory_gib=-1": "memory_gib=-1.0 must be above 0",
        "--model=demo --chip=h100 --prompt_len=0": "prompt_len=0 must be at least 1",
        "--model=demo --chip=h100 --max_model_len=1": "max_model_len=1 must be at least 2",
        "--model=demo --chip=h100 --max_model_len=99999": "exceeds the model's max_position_embed",
        "--model=demo --chip=l4 --compile": "steps are compiled for a100, a100-40gb, b200",
        "--model=demo --chip=v5e --compile": "no libtpu to compile with: install the package",
    }
    done = subprocess.run(
        [sys.executable, "-c", REFUSING], cwd=ROOT, input="\n".join(refused),
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"TPU_LIBRARY_PATH": str(tmp_path / "libtpu.so")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for said, message in zip(done.stdout.splitlines(), refused.values(), strict=True):
        assert message in said
    assert "make libtpu" in said
