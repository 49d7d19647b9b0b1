# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from absl import app, flags

from jpaged.scripts import profile_flags
from tests.scripts.programs import ended, run


@pytest.fixture
def given():
    """Sets flags, as if they stood on the command line."""
    values = flags.FlagValues()
    for name, value in (("profile", None), ("profile_steps", 40), ("profile_start", "decode")):
        define = flags.DEFINE_integer if isinstance(value, int) else flags.DEFINE_string
        define(name, value, "", flag_values=values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_flags.flags, "FLAGS", values)
        yield lambda *args: values(["program", *args])


def test_flags_make_a_config_or_none(given, tmp_path):
    given()
    assert profile_flags.profile_config_from_flags() is None
    given(f"--profile={tmp_path / 'p'}", "--profile_steps=7", "--profile_start=first")
    config = profile_flags.profile_config_from_flags()
    assert (config.steps, config.start) == (7, "first")
    assert (tmp_path / "p").is_dir()
    (tmp_path / "file").write_text("")
    given(f"--profile={tmp_path / 'file'}")
    with pytest.raises(app.UsageError, match=r"--profile=.*file cannot be written: File exists"):
        profile_flags.profile_config_from_flags()


def test_without_a_traced_step_it_says_what_to_do(capsys):
    profile_flags.show_profile(None)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--profile_start=first" in said


@pytest.mark.slow
def test_generate_writes_a_profile(tmp_path):
    done = ended(
        "jpaged", "generate", "--model=tests/fixtures/hf/llama_gqa5_hd48_untied", "--prompt=1 5 9",
        "--max_tokens=12", "--ignore_eos", "--temperature=0", "--num_pages=32", "--deterministic",
        "--max_num_seqs=2", "--max_num_batched_tokens=8", "--profile_steps=4",
        f"--profile={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3 + 12
    page = (tmp_path / "breakdown.txt").read_text("utf-8")
    assert page in done.stderr
    found = json.loads((tmp_path / "breakdown.json").read_text("utf-8"))
    assert found["steps"] == 4 and f"profile: {found['trace']}\n" in done.stderr
    assert found["floor"]["copy_bytes_per_s"] > 0 and found["floor"]["product_flops_per_s"] > 0


def test_a_profile_without_a_device_is_refused():
    said = run("jpaged", "benchmark", "--scheduler_only", "--profile=p", code=2)
    assert "--scheduler_only has no device, and takes no --profile" in said
    assert said.count("\n") == 1
