# SPDX-License-Identifier: Apache-2.0
"""scripts/generate.py as a user runs it: a process with flags, streams and an exit code."""

import functools
import json
import os
import pty
import signal
import subprocess
import sys

import pytest

from tests.scripts.programs import ROOT, ended, environment, read_until, start

HF_CASE = ROOT / "tests" / "fixtures" / "hf" / "llama_gqa5_hd48_untied"


run = functools.partial(ended, "jpaged", "generate")


def test_one_prompt_streams_readable_text():
    args = ("--prompt=Once upon a time", "--max_tokens=40", "--seed=1", "--temperature=0")
    done = run(*args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
    words = done.stdout.split()
    assert len(words) > 15 and sum(word.strip('.,"!?;:').isalpha() for word in words) > 12
    summary = done.stderr.splitlines()[-1]
    for part in ("prefill", "decode", "first token after", "pages at peak", "contiguous"):
        assert part in summary
    assert "page pool:" in done.stderr
    assert run(*args).stdout == done.stdout


def test_json_of_a_prompts_file(tmp_path):
    prompts = ["The old fisherman", "In the garden, Émile", "My dog"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    done = run(
        f"--prompts_file={file}", "--output=json", "--n=2", "--max_tokens=8", "--seed=3",
        "--logprobs=2", "--ignore_eos", "--max_num_seqs=4", "--page_size=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outputs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outputs) == 3
    for output in outputs:
        assert output["finished"] and len(output["outputs"]) == 2
        for sample in output["outputs"]:
            assert sample["finish_reason"] == "length" and len(sample["token_ids"]) == 8
            assert all(2 <= len(step) <= 3 for step in sample["logprobs"])
    assert "3/3" in done.stderr  # the progress bar


def test_prompts_with_parameters_of_their_own(tmp_path):
    file = tmp_path / "prompts.jsonl"
    objects = [
        {"prompt": "The old fisherman", "max_tokens": 3, "seed": 7},
        {"prompt": [5, 6, 7], "n": 2, "logprobs": 1},
        {"prompt": "My dog", "allowed_token_ids": [40, 41], "presence_penalty": 1},
        {"prompt": "Once", "beam_width": 2, "temperature": None},
    ]
    file.write_text("".join(json.dumps(o) + "\n" for o in objects), encoding="utf-8")
    flags = ("--output=json", "--max_tokens=6", "--ignore_eos", "--seed=1")
    done = run(f"--prompts_file={file}", *flags)
    assert done.returncode == 0, done.stderr
    outputs = {o["request_id"]: o for o in map(json.loads, done.stdout.splitlines())}
    samples = [outputs[str(i)]["outputs"] for i in range(4)]
    lengths = [[len(sample["token_ids"]) for sample in found] for found in samples]
    assert lengths == [[3], [6, 6], [6], [6]]
    assert outputs["1"]["prompt_token_ids"] == [5, 6, 7] and samples[1][0]["logprobs"]
    assert set(samples[2][0]["token_ids"]) == {40, 41}
    assert samples[3][0]["score"] < 0
    # A line is what these flags are.
    done = run("--prompt=The old fisherman", *flags, "--seed=7", "--max_tokens=3")
    (alone,) = json.loads(done.stdout)["outputs"]
    assert alone["token_ids"] == samples[0][0]["token_ids"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "top_k": -1}', "line 2: top_k=-1 must be at least 0"),
        ('{"prompt": "a", "tempreature": 1}', "line 2: unknown field 'tempreature'; there are "),
        # What only the model knows, before anything is generated.
        ('{"prompt": "a", "logit_bias": {"99999": 1}}', "line 2: logit_bias has token 99999, "),
        ('{"prompt": [99999]}', "line 2: token id 99999 is outside the vocabulary, [0, "),
    ],
)
def test_what_is_wrong_in_a_file_is_named_by_its_line(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "good"}\n' + line + "\n", encoding="utf-8")
    done = run(f"--prompts_file={file}", "--max_tokens=2")
    assert done.returncode == 2 and done.stdout == "", done.stdout
    last = done.stderr.splitlines()[-1]
    assert f"jpaged generate: {file}: {message}" in last, done.stderr
    assert "loaded" not in done.stderr  # not even the weights


def test_show_pages_draws_the_fullest_step():
    # 5 tokens of prompt and 4 of the 5 sampled ones are written: 3 pages a sample, of which all
    # share the first; the second is copied by the first two that write to it.
    args = (
        "--prompt=Once upon a time", "--n=3", "--max_tokens=5", "--seed=1", "--ignore_eos",
        "--page_size=4", "--num_pages=12", "--output=json",
    )  # fmt: skip
    done = run(*args, "--show_pages")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["prompt_token_ids"]) == 5
    lines = done.stderr.splitlines()
    start = lines.index("The fullest step; an owner is request#sample, from 0:")
    assert lines[start + 1 : start + 10] == [
        "11 pages of 4 cells: 7 live (1 shared, 67.9% filled), 4 free (0 cached)",
        "   1  3CABabc... .",
        "A-Z one owner, full; a-z one owner, partial; 2-9 so many owners, full; . free",
        "  A 0#0 3 pages (1 shared)   B 0#1 3 pages (1 shared)   C 0#2 3 pages (1 shared)",
        "shared: 1 by A B C",
        "",
        "pages at the fullest step: 7 live (1 shared), 4 free (0 cached); sharing saves 8 cells",
        "pages over the whole run: sharing saved 36.4% on average; copies on write 2, prefix hit "
        "rate 0.0%, preemptions 0, swapped 0",
        lines[-1],
    ]
    assert "\x1b" not in done.stderr  # a pipe is no terminal
    without = run(*args)
    assert json.loads(without.stdout)["outputs"] == json.loads(done.stdout)["outputs"]
    assert "The fullest step" not in without.stderr
    assert without.stderr.splitlines()[-3:-1] == lines[-3:-1]


@pytest.mark.parametrize(
    ("no_color", "page"),
    [
        ("", "\x1b[32ma\x1b[0m"),
        pytest.param("1", "a", marks=(pytest.mark.nightly, pytest.mark.slow)),
    ],
)
def test_show_pages_on_a_terminal(no_color, page):
    terminal, stderr = pty.openpty()
    args = ("--prompt=Once", "--max_tokens=1", "--show_pages", "--num_pages=9")
    done = subprocess.run(
        [sys.executable, "-m", "jpaged", "generate", *args],
        cwd=ROOT, env=environment(NO_COLOR=no_color), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=stderr, timeout=300,
    )  # fmt: skip
    os.close(stderr)
    with open(terminal, "rb", buffering=0) as pipe:
        seen = pipe.read(10_000).decode()
    assert done.returncode == 0, seen
    # The only step is seen, though its only token ends the request.
    assert f"\n  1  {page}" in seen
    assert ("\x1b" in seen) == (no_color == "")
    assert done.stdout.startswith(b"Once")


def test_standard_input_and_stop_string():
    done = run("--max_tokens=60", "--seed=1", "--stop=.", stdin="The old fisherman\nOnce\n")
    assert done.returncode == 0, done.stderr
    assert "=== prompt 2, sample 1\nOnce" in done.stdout
    assert "." not in done.stdout


def test_a_form_feed_is_part_of_a_prompt():
    done = run("--max_tokens=1", "--output=json", stdin="The old\x0cfisherman\n\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_a_reader_that_leaves_early_causes_no_traceback():
    args = ("--prompt=Once", "--max_tokens=400", "--ignore_eos", "--seed=1")
    with start("jpaged", "generate", *args) as process:
        process.stdout.read(10)
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert b"Traceback" not in errors and b"BrokenPipe" not in errors


def test_model_without_tokenizer_takes_token_ids():
    expected = json.loads((HF_CASE / "expected.json").read_text())
    prompt, continuation = expected["prompts"][3], expected["continuations"][3]
    args = (f"--model={HF_CASE}", "--max_tokens=24", "--temperature=0")
    done = run(*args, "--prompt=" + " ".join(map(str, prompt)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(token) for token in prompt + continuation]
    done = run(*args, "--prompt=hello")
    assert done.returncode == 2 and "no tokenizer.json" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt="], "a --prompt is empty"),
        (["--prompt=x", "--temprature=1"], "temprature"),
        (["--prompt=x", "--n=0"], "n=0 must be at least 1"),
        (["--prompt=x", "--temperature=-1"], "temperature=-1.0 must be finite and at least 0"),
        (["--prompt=x", "--top_p=0"], "top_p=0.0 must be above 0 and at most 1"),
        (["--prompt=x", "--top_p=1.5"], "top_p=1.5 must be above 0 and at most 1"),
        (
            ["--prompt=x", "--beam_width=65"],
            "beam_width=65 exceeds the 64 beams that a step computes",
        ),
        (["--prompt=x", "--beam_width=4", "--top_k=3"], "top_k=3 has no meaning in beam search"),
        (["--prompt=x", "--model=nowhere"], "model directory 'nowhere' does not exist"),
        (["--prompt=x", "--dtype=int4"], "dtype"),
        (["--prompt=x", "--backend=tpu"], "its kernels run on TPUs only"),
        (["--prompt=x", "--page_size=0"], "page_size=0 must be at least 1"),
        (["--prompt=" + "word " * 2000], "prompt 1: a prompt of "),
        (["--prompt=x", "--num_pages=4", "--max_tokens=100"], "but the pool has 3"),
        (["--prompt=x", "--prompts_file=y"], "exclude each other"),
        (["--prompts_file=missing.txt"], "missing.txt"),
        (["x"], "unexpected arguments"),
        ([], "standard input has no prompts"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40] or "nothing",
)
def test_bad_input_is_one_line_and_exit_code_2(args, message):
    done = run(*args)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout.strip() in ("", "x")


def test_interrupt_prints_what_was_produced():
    process = start(
        "jpaged",
        "generate",
        "--prompt=Once upon a time",
        "--ignore_eos",
        "--max_tokens=1000",
    )
    # The prompt comes at once, the first word after it with the first tokens.
    first = read_until(process.stdout, b"Once upon a time") + process.stdout.read1(1)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=120)
    assert process.returncode == 130, err.decode()
    assert len((first + rest).decode()) > len("Once upon a time")
    assert b"tokens/s" in err and b"Traceback" not in err


def test_interrupt_of_many_prints_them_all(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\n" * 3)
    process = start(
        "jpaged",
        "generate",
        f"--prompts_file={prompts}",
        "--ignore_eos",
        "--max_tokens=1000",
        "--output=json",
    )
    # The progress bar tells that it generates.
    seen = read_until(process.stderr, b"3 running")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, (seen + err).decode()
    outputs = [json.loads(line) for line in out.decode().splitlines()]
    assert [o["outputs"][0]["finish_reason"] for o in outputs] == ["abort"] * 3
