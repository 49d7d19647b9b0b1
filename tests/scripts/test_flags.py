# SPDX-License-Identifier: Apache-2.0
"""The command line of `jpaged generate` at the door: each flag with each wrong value, and all."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from absl import app, flags

from jpaged.host.config import EngineConfig
from jpaged.scripts.flags import (
    define_engine_flags,
    enable_compilation_cache,
    engine_config_from_flags,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Flags are a program's own, so this is a process of its own. `given` is a list of command lines.
DRIVER = """
import json, sys
from absl import app, flags
from absl.testing import flagsaver
from jpaged.scripts import generate
from jpaged.scripts.flags import engine_config_from_flags

results = []
for given in json.loads(sys.stdin.buffer.read().decode("utf-8", "surrogatepass")):
    with flagsaver.flagsaver():
        try:
            params, _, _ = generate.read_flags(flags.FLAGS(["generate", *given]))
            engine_config_from_flags()
            results.append(["ok", repr(params[0])])
        except (flags.Error, app.UsageError, ValueError, OSError) as error:  # as scripts.flags does
            results.append(["refused", " ".join(str(error).split())])
        except BaseException as error:
            results.append(["broken", f"{type(error).__name__}: {error}"])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def parse():
    def parse(lines):
        done = subprocess.run(
            [sys.executable, "-c", DRIVER],
            cwd=ROOT,
            input=json.dumps(lines, ensure_ascii=False).encode("utf-8", "surrogatepass"),
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    return parse


INTEGERS = [
    "max_tokens", "top_k", "n", "best_of", "beam_width", "seed", "stop_token_ids", "logprobs",
    "page_size", "num_pages", "max_num_seqs", "max_num_batched_tokens", "max_model_len",
    "swap_bytes", "priority",
]  # fmt: skip
FLOATS = [
    "temperature", "top_p", "min_p", "length_penalty", "memory_fraction", "swap_bytes_per_s",
    "flops_per_s",
]  # fmt: skip
BOOLS = [
    "ignore_eos", "skip_special_tokens", "show_pages", "prefix_cache", "deterministic",
    "scan_layers",
]  # fmt: skip
CHOICES = ["output", "early_stopping", "dtype", "reservation", "preemption", "backend"]
NO_NUMBERS = ["", "x", "None", "null", "[]", "{}", "true", "1,2", "--", "\udcff", "1e", "½", "0x"]


def test_each_wrong_value_of_each_flag_is_refused_by_name(parse):
    wrong = {name: [*NO_NUMBERS, "nan", "inf", "1.5", "1e5", "9" * 5000] for name in INTEGERS}
    wrong |= {name: [*NO_NUMBERS, "nan", "inf", "-inf", "1e400"] for name in FLOATS}
    wrong |= {name: ["", "2", "maybe", "None", "1.0", "\udcff"] for name in BOOLS}
    wrong |= {name: ["", "2", "None", "TEXT ", "\udcff"] for name in CHOICES}
    others = {"stop_token_ids", "top_k", "seed", "logprobs", "swap_bytes", "priority"}
    for name in set(INTEGERS) - others:
        wrong[name] += ["0", "-1", "-" + "9" * 30]
    for name in ("top_k", "seed"):
        wrong[name] += ["-1", str(2**32), "9" * 30]
    wrong["logprobs"] += ["-1"]
    wrong["swap_bytes"] += ["-1"]
    wrong["priority"] += [str(2**63), "-" + "9" * 30]
    wrong["temperature"] += ["-1", "-1e-9"]
    wrong["top_p"] += ["0", "-0.1", "1.01"]
    wrong["min_p"] += ["-0.1", "1.01"]
    wrong["memory_fraction"] += ["0", "1.01", "-1"]
    wrong |= {"stop": ["", "\udcff", "a\udc80"], "prompt": ["", "\udcff", "\ud800"], "model": [""]}
    wrong |= {"prompts_file": ["", "nowhere"], "flagfile": ["nowhere"], "verbosity": ["", "x"]}
    wrong |= {"stderrthreshold": ["x", ""], "log_dirs": ["x"]}
    cases = [(name, value) for name, values in wrong.items() for value in values]
    # A beam search may have other fields refused first.
    other = {"prompts_file": [], "prompt": []}
    results = parse([[*other.get(n, ["--prompt=x"]), f"--{n}={v}"] for n, v in cases])
    assert len(cases) > 450
    for (name, value), (kind, message) in zip(cases, results, strict=True):
        assert kind == "refused", (name, value, message)
        assert name in message, (name, value, message)


REFUSED = [
    (["--prompt=x", "--presence_penalty=2.5"], "presence_penalty=2.5 must be between -2 and 2"),
    (["--prompt=x", "--frequency_penalty=-3"], "frequency_penalty=-3.0 must be between -2 and 2"),
    (["--prompt=x", "--logit_bias=5"], "--logit_bias=5 must be token ids, a colon and a number"),
    (["--prompt=x", "--logit_bias=5:x"], "--logit_bias=5:x must be token ids, a colon"),
    (["--prompt=x", "--logit_bias=5 6:1"], "--logit_bias has the tokens (5, 6): give one"),
    (["--prompt=x", "--logit_bias=:1"], "--logit_bias=:1' must have token ids"),
    (["--prompt=x", "--logit_bias=5:101"], "logit_bias=((5, 101.0),) must be between -100 and 100"),
    (["--prompt=x", "--logit_bias=5:1", "--logit_bias=5:2"], "logit_bias=((5, 1.0), (5, 2.0))"),
    (["--prompt=x", "--sequence_bias=5 x:1"], "--sequence_bias=5 x:1' must have token ids"),
    (["--prompt=x", "--sequence_bias=5:nan"], "sequence_bias=(((5,), nan),) must be between"),
    (["--prompt=x", "--bad_words_ids="], "--bad_words_ids=' must have token ids"),
    (["--prompt=x", "--bad_words_ids=5 -6"], "--bad_words_ids=5 -6' must have token ids, such as"),
    (["--prompt=x", "--allowed_token_ids=-1"], "allowed_token_ids=(-1,) must be free of negative"),
    (["--prompt=x", "--beam_width=2", "--presence_penalty=1"], "presence_penalty=1.0 has no mean"),
    (["--prompt=x", "--beam_width=2", "--frequency_penalty=1"], "frequency_penalty=1.0 has no me"),
    (["--prompts_file=nowhere.jsonl"], "--prompts_file=nowhere.jsonl: No such file"),
    (["--prompt=x", "--prompts_file=y.jsonl"], "exclude each other"),
    (["--prompt=x", "x"], "unexpected arguments ['x']"),
    (["--prompt=x", "--", "--n=2"], "unexpected arguments ['--n=2']"),
    (["--prompt=x", "-"], "unexpected arguments ['-']"),
    (["--prompt=x", "--temprature=1"], "temprature"),
    (["--prompt=x", "--temprature"], "temprature"),
    (["--prompt=x", "--=1"], "unexpected arguments ['--=1']"),
    (["--prompt=x", "--n"], "n"),
    (["--prompt"], "prompt"),
    (["--prompt=x", "--non=1"], "non"),
    (["--prompt=x", "--noignore_eos=1"], "noignore_eos"),
    (["--prompt=x", "--noignore_eoss"], "noignore_eoss"),
    (["--prompt=x", "--prompts_file=y"], "exclude each other"),
    (["--prompt=x", "--prompt="], "a --prompt is empty"),
    (["--prompts_file=."], "Is a directory"),
    (["--prompt=x", "--best_of=2", "--n=3"], "best_of=2 must be at least n=3"),
    (["--prompt=x", "--beam_width=2", "--n=3"], "beam_width=2 must be at least n=3"),
    (["--prompt=x", "--beam_width=2", "--best_of=2"], "best_of=2 has no meaning in beam search"),
    (["--prompt=x", "--beam_width=2", "--temperature=0"], "temperature=0.0 has no meaning"),
    (["--prompt=x", "--beam_width=2", "--top_p=0.5"], "top_p=0.5 has no meaning"),
    (["--prompt=x", "--beam_width=2", "--min_p=0.5"], "min_p=0.5 has no meaning"),
    (["--prompt=x", "--beam_width=2", "--stop=a"], "stop=('a',) has no meaning"),
    (["--prompt=x", "--stop=a", "--stop="], "stop"),
    (["--prompt=x", "--deterministic", "--max_num_batched_tokens=64"], "deterministic needs"),
    (["--prompt=x", "--model=~nobody_of_this_name/x"], "--model=~nobody_of_this_name/x"),
]

SERVED = [
    (["--prompt=x", "--logit_bias=15:-2.5", "--logit_bias=3:1"], "((3, 1.0), (15, -2.5))"),
    (["--prompt=x", "--sequence_bias=10 45:-2"], "sequence_bias=(((10, 45), -2.0),)"),
    (["--prompt=x", "--bad_words_ids=10,45", "--bad_words_ids=7"], "=((10, 45), (7,))"),
    (["--prompt=x", "--allowed_token_ids=1", "--allowed_token_ids=2"], "allowed_token_ids=(1, 2)"),
    (["--prompt=x", "--presence_penalty=-2"], "presence_penalty=-2.0"),
    (["--prompt=x"], "temperature=None"),
    (["--prompt=x", "--n=2", "--n=3"], "n=3"),  # of a flag that is repeated the last counts
    (["--prompt=x", "--prompt=x"], "n=1"),
    (["--prompt", "x", "-n", "2"], "n=2"),
    (["--prompt=--n=2"], "n=1"),
    (["--prompt=x", "--seed=0x10", "--top_k=1_000"], "top_k=1000"),
    (["--prompt=x", "--noskip_special_tokens"], "skip_special_tokens=False"),
    (["--prompt=x", "--skip_special_tokens=false"], "skip_special_tokens=False"),
    (["--prompt=x", "--stop=a", "--stop=<|im_end|>"], "stop=('a', '<|im_end|>')"),
    (["--prompt=x", "--beam_width=4"], "beam_width=4"),
    (["--prompt=x", "--early_stopping=never"], "early_stopping='never'"),
    (["--prompt=x", "--undefok=foo", "--foo=1"], "n=1"),
]


def test_together(parse):
    results = parse([line for line, _ in REFUSED + SERVED])
    for (line, part), (kind, message) in zip(REFUSED + SERVED, results, strict=True):
        assert kind == ("refused" if (line, part) in REFUSED else "ok"), (line, message)
        assert part in message, (line, message)


class TestCompilationCache:
    def test_what_cannot_be_written_is_one_line(self):
        values = flags.FlagValues()
        define_engine_flags(values)
        values(["program", "--compilation_cache_dir=/proc/nothing"])
        with pytest.raises(app.UsageError) as error:
            enable_compilation_cache(values)
        text = str(error.value)
        assert text.startswith("--compilation_cache_dir=/proc/nothing: ") and "\n" not in text


class TestEngineFlags:
    def test_every_field_has_a_flag_with_its_default_and_a_help_text(self):
        values = flags.FlagValues()
        define_engine_flags(values)
        define_engine_flags(values)  # once more is no error
        values(["program"])
        assert engine_config_from_flags(values) == EngineConfig()
        assert all(values[name].help for name in values)

    def test_values_reach_the_config(self):
        values = flags.FlagValues()
        define_engine_flags(values)
        values(["program", "--page_size=8", "--noscan_layers", "--memory_fraction=0.5"])
        expected = EngineConfig(page_size=8, scan_layers=False, memory_fraction=0.5)
        assert engine_config_from_flags(values) == expected

    def test_bad_values_are_usage_errors(self):
        values = flags.FlagValues()
        define_engine_flags(values)
        values(["program", "--page_size=0"])
        with pytest.raises(app.UsageError, match="page_size=0 must be at least 1"):
            engine_config_from_flags(values)


class TestRun:
    """A program that needs a device, and ends in one line where it cannot go on."""

    PROGRAM = """
from absl import flags
from jpaged.scripts.flags import require_device, run

WORD = flags.DEFINE_string("word", None, "Any.")


def main(argv):
    assert len(argv) == 1, argv
    require_device()
    if WORD.value == "fault":
        raise AssertionError("a fault of the program's own")
    print(WORD.value)


run(main)
"""

    def run(self, *given, platforms="cpu"):
        return subprocess.run(
            [sys.executable, "-c", self.PROGRAM, *given],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": platforms},
            timeout=120,
        )

    @pytest.mark.parametrize("platforms", ["nosuch", "cpu,nosuch", "cuda", "tpu"])
    def test_a_platform_that_is_not_there(self, platforms):
        done = self.run("--word=x", platforms=platforms)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        line = done.stderr.splitlines()[-1]
        assert f"jax has no device, with JAX_PLATFORMS={platforms}: " in line
        assert "JAX_PLATFORMS=cpu" in line and "Traceback" not in done.stderr

    def test_a_fault_of_its_own_keeps_its_traceback(self):
        done = self.run("--word=fault")
        assert done.returncode == 1 and "a fault of the program's own" in done.stderr
        assert "Traceback" in done.stderr

    def test_help_is_what_was_asked_for(self):
        done = self.run("--help")
        assert done.returncode == 0 and "--word: Any." in done.stdout, done.stderr

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("--word=café\n".encode(), None),
            ("--word=café\n".encode("latin-1"), "word.flags: not UTF-8 (byte 0xe9 at position 11)"),
            ("--word=café\n".encode("utf-16"), "word.flags: not UTF-8 (byte 0xff at position 1)"),
            (b"\xef\xbb\xbf--word=x\n", "a --flagfile begins with a byte order mark"),
        ],
    )
    def test_flag_files(self, tmp_path, content, says):
        (tmp_path / "word.flags").write_bytes(content)
        done = self.run(f"--flagfile={tmp_path / 'word.flags'}")
        if says is None:
            assert (done.returncode, done.stdout) == (0, "café\n"), done.stderr
        else:
            assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
            assert says in done.stderr
