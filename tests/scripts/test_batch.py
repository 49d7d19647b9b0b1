# SPDX-License-Identifier: Apache-2.0
"""scripts/batch.py, ended in every way and run again: the bytes of a run that nothing stopped."""

import functools
import json
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.chat import ChatTemplate
from jpaged.jobs import run
from jpaged.jobs.inputs import open_input
from jpaged.jobs.openai import RecordMaker, RowReader, encode_record
from jpaged.jobs.output import OutputFile
from jpaged.jobs.settings import with_fallbacks
from jpaged.models import DEMO
from tests.chatting import chatty_model
from tests.scripts.programs import ROOT, ended, environment, start

PROMPTS = ("Once upon a time", "The dog", "Lily and Tom were in the garden, and")
# So small that requests are preempted; `whole` sees to it.
CONFIG = EngineConfig(
    max_num_seqs=8, page_size=4, num_pages=25, deterministic=True, max_num_batched_tokens=32
)
FLAGS = [
    *("--max_num_seqs=8", "--page_size=4", "--num_pages=25", "--max_num_batched_tokens=32"),
    *("--max_tokens=16", "--sync_rows=1"),
]


@functools.cache
def demo_engine():
    return Engine.load(DEMO, CONFIG)


def write_rows(path, number):
    rows = [
        {"custom_id": f"r{i}", "prompt": PROMPTS[i % 3], "n": 1 + i % 3, "stop": [" young"]}
        | ({"seed": i} if i % 4 == 0 else {})
        | ({"logprobs": 2} if i % 5 == 0 else {})
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def whole(source, path):
    """What the job comes to in this process, without a stop."""
    engine = demo_engine()
    before = engine.stats().totals.num_preemptions
    given = open_input([str(source)])
    reader = RowReader(
        params=SamplingParams(max_tokens=16),
        tokenizer=engine.tokenizer,
        template=engine.chat_template,
        complete=lambda params: with_fallbacks(params, engine.defaults),
    )
    maker = RecordMaker(engine.tokenizer, "demo")

    def encode(result):
        return encode_record(maker.record(result))

    with OutputFile(path, given.check(), encode) as output:
        report = run(map(reader.row, given), output, engine)
        output.sync()
        output.sort()
    assert report.num_errors == report.num_left == 0
    assert engine.stats().totals.num_preemptions > before
    return path.read_bytes()


def command(source, path, *flags):
    return ["jpaged", "batch", f"--input={source}", f"--output={path}", *FLAGS, *flags]


def started(source, path, *flags, **options):
    return start(
        *command(source, path, *flags),
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options,
    )


def wait_for(process, path, size):
    while not path.exists() or path.stat().st_size < size:
        assert process.poll() is None
        time.sleep(0.01)


def ids_of(data):
    return [json.loads(line)["custom_id"] for line in data.splitlines()]


def go_on(source, path, *flags, stdin=""):
    done = ended(*command(source, path, *flags), stdin=stdin)
    assert done.returncode == 0, done.stderr
    return path.read_bytes()


@pytest.mark.slow
def test_killed_and_run_again(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", 18)
    want = whole(source, tmp_path / "whole.jsonl")
    path = tmp_path / "out.jsonl"
    process = started(source, path)
    wait_for(process, path, 2000)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert path.stat().st_size < len(want)
    assert go_on(source, path) == want


@pytest.mark.slow
def test_a_strict_engine_compiles_what_rows_ask_for(tmp_path):
    own = [
        {}, {"logprobs": 2}, {"logprobs": 30}, {"logprobs": 3, "logprobs_mode": "filters"},
        {"prompt_logprobs": 1}, {"beam_width": 2}, {"presence_penalty": 0.5},
        {"logprobs": 10**6}, {"beam_width": 2**14},
        {"allowed_token_ids": [3], "suppress_tokens": [3]},
    ]  # fmt: skip
    rows = [
        {"custom_id": f"r{i}", "prompt": PROMPTS[0], "max_tokens": 3} | each
        for i, each in enumerate(own)
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = "--max_num_batched_tokens=32", "--max_num_seqs=4"
    found = []
    for flags in ((), ("--strict_shapes",)):
        path = tmp_path / f"out{len(found)}.jsonl"
        io = f"--input={source}", f"--output={path}"
        done = ended("jpaged", "batch", *io, *settings, *flags)
        assert done.returncode == 1, done.stderr
        found.append(path.read_bytes())
    assert found[0] == found[1]
    records = [json.loads(line) for line in found[1].splitlines()]
    assert [record["error"] is None for record in records] == [True] * 7 + [False] * 3
    assert "strict_shapes" not in found[1].decode()


def test_a_conversation_is_answered_as_its_template_says(tmp_path):
    engine = demo_engine()
    template = ChatTemplate.load(chatty_model(tmp_path / "model"))
    row = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}
    source = tmp_path / "in.jsonl"
    wrong = {"messages": [{"role": "narrator", "content": "x"}]}
    source.write_text(f"{json.dumps(row)}\n{json.dumps(wrong)}\n")
    reader = RowReader(tokenizer=engine.tokenizer, template=template)
    good, bad = map(reader.row, open_input([str(source)]))
    # tests/chatting.py has the template.
    want = engine.tokenizer.encode("You said: hello\n", add_special_tokens=False).ids
    assert list(good.prompt) == want and good.kind == "chat"
    assert "narrators do not talk" in bad.error
    results = []

    class Sink:
        def write(self, result):
            results.append(RecordMaker(engine.tokenizer, "demo").record(result))

        def tick(self):
            pass

    run([good], Sink(), engine)
    (answer,) = engine.generate([want], SamplingParams(max_tokens=4, temperature=0))
    body = results[0]["response"]["body"]
    message = {"role": "assistant", "content": answer.outputs[0].text}
    assert body["choices"][0]["message"] == message
    assert body["usage"]["prompt_tokens"] == len(want)


@pytest.mark.slow
@pytest.mark.nightly
class TestEnds:
    """Of a job of 60 rows, as programs."""

    @pytest.fixture(scope="class")
    def job(self, tmp_path_factory):
        directory = tmp_path_factory.mktemp("job")
        source = write_rows(directory / "in.jsonl", 60)
        return source, whole(source, directory / "whole.jsonl")

    @pytest.mark.parametrize("grace_s", [0, 60])
    def test_sigterm(self, job, tmp_path, grace_s):
        source, want = job
        path = tmp_path / "out.jsonl"
        process = started(source, path, f"--grace_s={grace_s}", stderr=subprocess.PIPE)
        wait_for(process, path, 2000)
        process.terminate()
        _, stderr = process.communicate()
        assert process.returncode == 75, stderr
        num_done = len(ids_of(path.read_bytes()))
        assert 0 < num_done < 60
        said = stderr.decode().splitlines()[-1]
        assert said == f"jpaged batch: {num_done} of 60 rows are done; run the same command again"
        assert go_on(source, path) == want

    def test_in_order_from_standard_input(self, job, tmp_path):
        source, want = job
        path = tmp_path / "out.jsonl"
        with source.open("rb") as stdin:
            process = started("-", path, "--ordered", stdin=stdin)
            wait_for(process, path, 4000)
            process.kill()
            process.wait()
        there = ids_of(path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1])
        assert there == [f"r{i}" for i in range(len(there))]
        assert go_on("-", path, "--ordered", stdin=source.read_text()) == want

    def test_a_disk_that_is_full_and_freed(self, job, tmp_path):
        source, want = job
        path = tmp_path / "out.jsonl"
        process = started(
            source,
            path,
            "--compilation_cache_dir=",  # whose files are larger
            stderr=subprocess.PIPE,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),
        )
        _, stderr = process.communicate()
        assert process.returncode == 74, stderr
        assert b"cannot be written: File too large" in stderr and b"Traceback" not in stderr
        data = path.read_bytes()
        assert 0 < len(data) <= 5000 and data.endswith(b"\n")
        assert go_on(source, path) == want

    def test_other_settings_are_refused_or_mixed(self, job, tmp_path):
        source, want = job
        path = tmp_path / "out.jsonl"
        process = started(source, path)
        wait_for(process, path, 2000)
        process.kill()
        process.wait()
        done = ended(*command(source, path, "--seed=1", "--mix"))
        assert done.returncode == 2 and "parameters.seed was 0, and is 1" in done.stderr
        done = ended(*command(source, path, "--page_size=8"))
        assert done.returncode == 2 and "engine.page_size was 4, and is 8" in done.stderr
        data = go_on(source, path, "--page_size=8", "--num_pages=49", "--mix")
        assert ids_of(data) == ids_of(want)

    def test_a_device_that_fails(self, job, tmp_path):
        source, want = job
        path = tmp_path / "out.jsonl"
        code = f"""
import sys
import jax
from jpaged import cli
from jpaged.engine import Engine
step = Engine.step
calls = iter(range(10**6))
def fail(engine):
    if next(calls) == 100:
        raise jax.errors.JaxRuntimeError("INTERNAL: it fell off the bus\\nwith details")
    return step(engine)
Engine.step = fail
sys.argv = {["jpaged", *command(source, path, "--sync_rows=1000")[1:]]}
cli.main()
"""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True,
            stdin=subprocess.DEVNULL, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 71, done.stderr
        assert "Traceback" not in done.stderr
        assert (
            "the device failed: INTERNAL: it fell off the bus with details: results so far"
            in (done.stderr.splitlines()[-1])
        )
        assert 0 < len(ids_of(path.read_bytes())) < 60
        assert go_on(source, path) == want

    def test_shards(self, job, tmp_path):
        source, want = job
        for number in (1, 2, 3):
            path = tmp_path / f"of{number}.jsonl"
            shards = [[f"--num_shards={number}", f"--shard={i}"] for i in range(number)]
            for flags in shards:
                done = ended(*command(source, path, f"--num_shards={number}", "--merge"))
                assert done.returncode == 75 and "has not begun" in done.stderr
                done = ended(*command(source, path, *flags))
                assert done.returncode == 0, done.stderr
            assert go_on(source, path, f"--num_shards={number}", "--merge") == want
            # It is a job's output like any other.
            assert go_on(source, path) == want


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(4))  # a test may take minutes
def test_killed_a_hundred_times(tmp_path, seed):
    kill_at_random(tmp_path, num_rows=300, num_kills=25, seed=seed)


def kill_at_random(directory, num_rows, num_kills, seed):
    """Kills a job at random moments; each time that it gets to its end, it begins anew.

    Returns: how many jobs came to their end, and how many of the kills found a record written.
    """
    source = write_rows(directory / "in.jsonl", num_rows)
    want = whole(source, directory / "whole.jsonl")
    path, manifest = directory / "out.jsonl", directory / "out.jsonl.manifest.json"
    begun = time.monotonic()
    assert go_on(source, path) == want
    longest = time.monotonic() - begun
    path.unlink()
    manifest.unlink()
    rng = random.Random(seed)
    num_killed = num_ended = num_begun = 0
    while num_killed < num_kills:
        process = started(source, path)
        try:
            assert process.wait(rng.uniform(0, longest)) == 0
            assert path.read_bytes() == want
            path.unlink()
            manifest.unlink()
            num_ended += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            num_killed += 1
            num_begun += path.exists() and path.stat().st_size > 0
            if path.exists():
                data = path.read_bytes()
                there = ids_of(data[: data.rfind(b"\n") + 1])
                assert len(there) == len(set(there))
    assert go_on(source, path) == want
    return num_ended + 1, num_begun


LONG = [*FLAGS[:2], "--num_pages=500", *FLAGS[3:], "--snapshot_s=0.05"]


def write_long_rows(path, length):
    """Rows that run together until one is killed; with all kinds of state."""
    rows = [
        {"n": 2, "logprobs": 1},
        {"temperature": 0},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"min_tokens": length - 5, "logit_bias": {"5": 2}, "stop_token_ids": [11, 12, 13]},
    ]
    always = {"ignore_eos": True, "max_tokens": length}
    lines = [
        {"custom_id": f"r{i}", "prompt": PROMPTS[i % 3]} | always | row
        for i, row in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def generated(metrics):
    """Tokens that a run has generated itself, as it tells Prometheus."""
    (line,) = [
        line
        for line in metrics.read_text().splitlines()
        if line.startswith("jpaged:generation_tokens_total")
    ]
    return int(float(line.split()[-1]))


def kill_while_running(source, path, num_bytes):
    """Kills a job when its snapshot has grown to a size, and no row has ended."""
    snapshot = path.with_name(f"{path.name}.snapshot")
    process = start(
        *["jpaged", "batch", f"--input={source}", f"--output={path}", *LONG],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(process, snapshot, num_bytes)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not path.read_bytes()
    return snapshot


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (120, [3000]),
        pytest.param(500, [3000, 9000, 15000], marks=pytest.mark.nightly),
    ],
)
def test_rows_that_ran_go_on_from_their_tokens(tmp_path, length, sizes):
    source = write_long_rows(tmp_path / "in.jsonl", length)
    path, metrics = tmp_path / "whole.jsonl", tmp_path / "metrics.prom"
    run_whole = ["jpaged", "batch", f"--input={source}", f"--output={path}", *LONG[:-1]]
    assert ended(*run_whole, f"--metrics_file={metrics}").returncode == 0
    want, number = path.read_bytes(), generated(metrics)
    path = tmp_path / "out.jsonl"
    for size in sizes:  # each goes on from what the one before has left
        kill_while_running(source, path, size)
    again = ["jpaged", "batch", f"--input={source}", f"--output={path}", *LONG]
    done = ended(*again, f"--metrics_file={metrics}")
    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if "rows that ran go on from" in line]
    known = int(said.split(" tokens ")[0].split()[-1])
    assert "4 rows that ran go on from the" in said and known > 30 * len(sizes)
    assert generated(metrics) == number - known
    assert path.read_bytes() == want
    assert not list(tmp_path.glob("*.snapshot*"))


@pytest.mark.slow
@pytest.mark.nightly
def test_a_snapshot_that_cannot_be_used(tmp_path):
    source, path = write_long_rows(tmp_path / "in.jsonl", 120), tmp_path / "out.jsonl"
    run_whole = [f"--input={source}", f"--output={tmp_path / 'whole.jsonl'}", *LONG[:-1]]
    assert ended("jpaged", "batch", *run_whole).returncode == 0
    snapshot = kill_while_running(source, path, 3000)
    data = snapshot.read_bytes()
    snapshot.write_bytes(data[:-5])
    done = ended("jpaged", "batch", f"--input={source}", f"--output={path}", *LONG)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is ignored, so rows that ran begin anew: it is damaged") == 1
    assert "Traceback" not in done.stderr and "go on from the" not in done.stderr
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    other = tmp_path / "other.jsonl"
    other.with_name("other.jsonl.snapshot").write_bytes(data)
    done = ended("jpaged", "batch", f"--input={source}", f"--output={other}", *LONG, "--seed=1")
    assert done.returncode == 0 and done.stderr.count("it is of another job") == 1
