# SPDX-License-Identifier: Apache-2.0
"""scripts/generate.py where streams are closed, full or of another encoding, and when it is ended.

Nothing that was computed is lost, and what goes wrong is said in one line.
"""

import json
import signal
import subprocess
import sys
import threading

import pytest

from jpaged.text import load_tokenizer
from tests.scripts.programs import ROOT, environment, read_until, start

DEMO = ROOT / "models" / "demo"
SHELL = '"$PYTHON" -m jpaged generate --num_pages=256 --seed=1 '

pytestmark = pytest.mark.slow


def shell(command, **changes):
    """Runs generate in a shell, where streams can be closed. Returns: code, output, errors."""
    done = subprocess.run(
        ["bash", "-c", "set -o pipefail; " + command.replace("generate ", SHELL)],
        cwd=ROOT, capture_output=True, timeout=300, stdin=subprocess.DEVNULL,
        env=environment(PYTHON=sys.executable, **changes),
    )  # fmt: skip
    errors = done.stderr.decode()
    assert "Traceback" not in errors and "Exception ignored" not in errors, errors
    return done.returncode, done.stdout, errors


TWO = "--prompt=Once --prompt='The old' --max_tokens=3 "


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(TWO + "--output=json", marks=pytest.mark.nightly),
        "--prompt=Once --max_tokens=3",
    ],
)
def test_a_full_disk(flags):
    code, _, errors = shell(f"generate {flags} > /dev/full")
    assert code == 74
    assert errors.splitlines()[-1] == (
        "jpaged generate: standard output cannot be written: No space left on device"
    )


def test_closed_standard_output():
    code, _, errors = shell(f"generate {TWO} >&-")
    assert code == 2 and len(errors.splitlines()) == 1
    assert "standard output is closed" in errors


@pytest.mark.parametrize("stderr", [pytest.param("2>&-", marks=pytest.mark.nightly), "2>/dev/full"])
def test_standard_error_that_takes_nothing(stderr):
    code, output, _ = shell(f"generate {TWO} {stderr}")
    assert code == 0 and output.count(b"=== prompt ") == 2


def test_closed_standard_input():
    code, _, errors = shell("generate <&-")
    assert code == 2 and len(errors.splitlines()) == 1
    assert "standard input is closed" in errors


def test_help_that_nobody_reads():
    assert shell("generate --help > /dev/full")[0] == 74
    assert shell("generate --help | true")[0] == 141


def test_a_reader_that_has_enough_stops_the_run(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once\n" * 300)
    code, output, errors = shell(
        f"generate --prompts_file={prompts} --max_tokens=40 --max_num_seqs=2 --ignore_eos "
        "--output=json | head -n 2"
    )
    assert code == 141
    assert [json.loads(line)["finished"] for line in output.splitlines()] == [True, True]
    assert "tokens/s, compiling" not in errors  # the summary, after the last


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.nightly)])
def test_output_that_is_not_utf_8(encoding):
    args = "--prompt='Émile 你好' --prompt=Once --max_tokens=3"
    code, output, _ = shell(f"generate {args}", PYTHONIOENCODING=encoding)
    assert code == 0 and b"mile \\u4f60\\u597d" in output and output.count(b"=== prompt ") == 2
    code, output, _ = shell(f"generate {args} --output=json", PYTHONIOENCODING=encoding)
    assert (
        code == 0 and len([json.loads(line) for line in output.decode("ascii").splitlines()]) == 2
    )


def test_bytes_that_are_no_text():
    for command in (
        "generate --prompt=$'\\xff\\xfe'",
        "printf '\\xff\\xff\\n' | generate --n=1",
        "generate --prompt=x --stop=$'\\xff'",
    ):
        code, _, errors = shell(command, LANG="C.UTF-8", LC_ALL="C.UTF-8")
        assert code == 2 and len(errors.splitlines()) == 1
        assert "is not UTF-8 (byte 0xff at position 1)" in errors


def test_utf_8_whatever_the_locale():
    code, output, _ = shell(
        "generate --prompt='Émile 你好' --max_tokens=1 --output=json",
        LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0",
    )  # fmt: skip
    ids = json.loads(output)["prompt_token_ids"]
    assert code == 0 and load_tokenizer(DEMO).decode(ids) == "Émile 你好"


MANY = ("--prompt=Once", "--prompt=The old", "--num_pages=256", "--ignore_eos", "--seed=1")


def generate(*args, options=()):
    """Starts generate on two prompts."""
    return start("jpaged", "generate", *MANY, *args, options=options)


@pytest.mark.parametrize(
    ("moment", "times"),
    [
        (b"absl", 1),
        (b"jax.numpy", 1),
        (b"jpaged.scripts.prompts", 1),
        (b"jpaged.placement: loaded", 2),
        (b"page pool", 1),
        (b"0/2", 1),
        (b" 2 running", 1),
        pytest.param(b" 2 running", 2, marks=pytest.mark.nightly),
    ],
    ids=lambda value: value.decode() if isinstance(value, bytes) else str(value),
)
def test_ctrl_c_at_any_time(moment, times):
    """While it imports (Python reports each import), loads, compiles and generates."""
    with generate("--max_tokens=1000", options=("-X", "importtime")) as process:
        seen = [read_until(process.stderr, moment)]
        reader = threading.Thread(target=lambda: seen.append(process.stderr.read()))
        reader.start()
        for _ in range(times):
            process.send_signal(signal.SIGINT)
        output = process.stdout.read()
        reader.join()
    errors = b"".join(seen).decode()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "Exception ignored" not in errors
    assert output == b"" or output.startswith(b"=== prompt 1, sample 1 (aborted)\nOnce")
    if b"running" in moment and times == 1:
        assert "prompts: 0 finished, 2 aborted" in errors


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.nightly)]
)
def test_what_has_ended_is_there_when_it_is_killed(number):
    with generate("--max_tokens=300", "--output=json", "--max_num_seqs=1") as process:
        reader = threading.Thread(target=process.stderr.read)
        reader.start()
        first = process.stdout.readline()
        process.send_signal(number)
        rest = process.stdout.read()
        reader.join()
    assert process.returncode == -number and rest == b""
    output = json.loads(first)
    assert (output["request_id"], output["finished"]) == ("0", True)
    assert len(output["outputs"][0]["token_ids"]) == 300
