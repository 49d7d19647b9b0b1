# SPDX-License-Identifier: Apache-2.0
"""`jpaged chat` and `jpaged generate --chat` as users run them: pipes, terminals and signals."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import time

import pytest

from jpaged import Engine, EngineConfig, SamplingParams
from tests.chatting import TEMPLATE, chatty_model
from tests.scripts.programs import ended, start

GREEDY = ("--temperature=0", "--max_tokens=12", "--num_pages=200", "--page_size=4")
STATS = re.compile(
    r"^\[(\d+) tokens(, stopped|, cut by the length limit|), first after [\d.]+ s(?:, [\d.]+ "
    r"tokens/s)?; of (\d+) tokens of the prompt (\d+) were found, (\d+) computed\]$",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chatty_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def engine(model):
    """What the program is held to."""
    return Engine.load(model, EngineConfig(num_pages=200, page_size=4))


@pytest.fixture(scope="module")
def run(model):
    def run(program, *args, stdin="", code=0):
        own = () if any(arg.startswith("--model") for arg in args) else (f"--model={model}",)
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        done = ended("jpaged", program, *own, *args, stdin=data)
        assert done.returncode == code, done.stderr.decode()
        return done.stdout.decode(), done.stderr.decode()

    return run


def answers_of(engine, turns, system=()):
    """The answers to turns that follow each other, and the numbers of tokens of their prompts."""
    messages, answers, lengths = list(system), [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        (output,) = engine.chat(messages, SamplingParams(max_tokens=12, temperature=0))
        answers.append(output.outputs[0].text)
        lengths.append(len(output.prompt_token_ids))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers, lengths


@pytest.mark.slow
def test_a_pipe(run, engine):
    turns = ["Once upon a time", "The old fisherman, née Müller ", "My dog"]
    stdout, stderr = run("chat", *GREEDY, stdin="\n".join(turns))
    answers, lengths = answers_of(engine, turns)
    assert stdout == "".join(f"{answer}\n" for answer in answers)
    stats = [tuple(map(int, match[3:])) for match in stats_of(stderr)]
    assert [prompt for prompt, _, _ in stats] == lengths
    assert all(prompt == found + computed for prompt, found, computed in stats)
    # The pages of what was said are found: all of the prompt before, but for a page that is begun.
    assert stats[0][1] == 0
    assert all(found >= lengths[i] // 4 * 4 for i, (_, found, _) in enumerate(stats[1:]))


def stats_of(stderr):
    return [("", *match) for match in STATS.findall(stderr)]


@pytest.mark.slow
def test_commands_and_the_system_message(run, engine):
    turns = ["Once", "My dog"]
    lines = [turns[0], "", "/reset ", turns[1], "/exit", "never said"]
    stdout, stderr = run("chat", *GREEDY, "--system=Be kind.", stdin="\r\n".join(lines) + "\r\n")
    system = [{"role": "system", "content": "Be kind."}]
    want = [answers_of(engine, [turn], system)[0][0] for turn in turns]
    assert stdout == "".join(f"{answer}\n" for answer in want)
    assert stderr.count("[what was said is forgotten]") == 1 and len(stats_of(stderr)) == 2


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["--model=demo"], "", "the model has no chat template, so nothing says how it was taught"),
        (["--model=nowhere"], "", "model directory 'nowhere' does not exist"),
        (["--model="], "", "no --model: name a directory, a GGUF file"),
        (["Hello"], "", r"unexpected arguments \['Hello'\]; messages are lines of the input"),
        (["--temperature=-1"], "", "temperature=-1.0 must be finite and at least 0"),
        (["--chat_template={{ raise_exception('no') }}"], "", "refuses the conversation: no"),
        (["--chat_template=gone.jinja"], "", r"'gone\.jinja' is neither a template nor the name"),
        (["--chat_template_kwargs=[1]"], "", r"--chat_template_kwargs=\[1\] must be a JSON object"),
        (["--chat_template_kwargs={"], "", "--chat_template_kwargs is not valid JSON"),
        ([], b"a\n\xff\n", r"standard input: line 2 is not UTF-8 \(byte 0xff at position 1\)"),
        ([], "word " * 2000, r"prompt of \d+ tokens"),
    ],
)  # fmt: skip
def test_refusals(run, args, stdin, message):
    _, stderr = run("chat", *GREEDY, *args, stdin=stdin, code=2)
    (last,) = [line for line in stderr.splitlines() if line.startswith("jpaged chat: ")]
    assert re.search(message, last) and stderr.endswith(f"{last}\n")


def test_a_template_that_refuses_the_system_message_does_so_first(run, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(TEMPLATE + "{{ raise_exception('no system') if messages[0].role == 'system' }}")
    stdout, stderr = run("chat", f"--chat_template={path}", "--system=a", code=2)
    assert stdout == "" and stderr.splitlines() == [
        "jpaged chat: chat template refuses the conversation: no system (--help lists the flags)"
    ]


class Terminal:
    """`jpaged chat` on a terminal of its own, standard error apart."""

    def __init__(self, *args):
        self.terminal, slave = pty.openpty()
        self.process = start(
            "jpaged", "chat", *args, changes={"TERM": "dumb"}, stdin=slave, stdout=slave
        )
        os.close(slave)
        self.seen = {self.terminal: "", self.process.stderr.fileno(): ""}

    @property
    def out(self):
        return self.seen[self.terminal]

    @property
    def err(self):
        return self.seen[self.process.stderr.fileno()]

    def wait(self, condition):
        """Reads until the condition holds; it is asked each time that there is more."""
        end = time.monotonic() + 60
        while not condition():
            ready, _, _ = select.select(list(self.seen), [], [], max(end - time.monotonic(), 0))
            assert ready, f"waited in vain: {self.seen}"
            for stream in ready:
                try:
                    data = os.read(stream, 4096)
                except OSError:  # the terminal of a program that has ended
                    data = b""
                assert data or self.process.poll() is None, f"it has ended: {self.seen}"
                self.seen[stream] += data.decode()

    def type(self, text):
        os.write(self.terminal, text.encode())

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def end(self):
        code = self.process.wait(timeout=60)
        if not self.process.stderr.closed:
            os.close(self.terminal)
            self.process.stderr.close()
        return code


@pytest.fixture
def chat(model):
    chat = Terminal(
        f"--model={model}", "--temperature=0", "--stop=zzz", "--num_pages=80", "--page_size=4"
    )
    yield chat
    chat.process.kill()
    chat.end()


@pytest.mark.slow
def test_a_terminal(chat):
    greeting = "[a line is a message; /reset forgets"
    chat.wait(lambda: chat.out.endswith("> ") and greeting in chat.err)
    # Ctrl-C where nothing is answered drops the line, and the program goes on.
    chat.type("never said")
    chat.wait(lambda: "never said" in chat.out)
    time.sleep(0.5)  # until it waits for the next key, as it does for people
    chat.interrupt()
    chat.wait(lambda: chat.out.count("> ") == 2)
    # Ctrl-C stops an answer, and what there is of it is part of the conversation.
    chat.type("Once upon a time\n")
    chat.wait(lambda: chat.out.partition("a time\r\n")[2].strip())
    chat.interrupt()
    chat.wait(lambda: len(stats_of(chat.err)) == 1 and chat.out.endswith("> "))
    first = stats_of(chat.err)[0]
    assert first[2] == ", stopped" and 0 < int(first[1]) < 1000
    chat.type("And then?\n")
    chat.wait(lambda: len(stats_of(chat.err)) == 2 and chat.out.endswith("> "))
    # Its pages are there still: an answer that stops is no accident.
    prompt, found = map(int, stats_of(chat.err)[1][3:5])
    assert prompt >= int(first[3]) + int(first[1]) and found >= int(first[3]) // 4 * 4 > 0
    # What cannot be answered is left out.
    chat.type("word " * 300 + "\n")  # a terminal's line has 4,095 characters at most
    chat.wait(lambda: "tokens" in chat.err.rpartition("computed]\n")[2])
    assert "request" not in chat.err
    chat.wait(lambda: chat.out.endswith("> "))
    chat.type("/help\n")
    no_command = "[there is no command /help; a line is a message; /reset forgets"
    chat.wait(lambda: chat.out.endswith("/help\r\n> ") and no_command in chat.err)
    chat.type("/reset\n")
    forgotten = "[what was said is forgotten]"
    chat.wait(lambda: chat.out.endswith("/reset\r\n> ") and forgotten in chat.err)
    time.sleep(0.5)
    chat.type("\x04")
    assert chat.end() == 0


@pytest.mark.slow
def test_ctrl_c_in_a_pipe_that_waits(model):
    process = start("jpaged", "chat", f"--model={model}", *GREEDY, stdin=subprocess.PIPE)
    try:
        process.stdin.write(b"Once\n")
        process.stdin.flush()
        assert process.stdout.readline()  # answered while the pipe is open
        assert any(line.endswith(b"computed]\n") for line in process.stderr)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        _, stderr = process.communicate()
    assert b"Traceback" not in stderr


TOOL = {"type": "function", "function": {"name": "tide", "parameters": {}}}


@pytest.mark.slow
def test_generate_of_conversations(run, engine, tmp_path):
    one = [{"role": "user", "content": "Once"}]
    two = {"messages": [{"role": "user", "content": "My dog"}], "tools": [TOOL]}
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps(one)}\n{json.dumps(two)}\n")
    stdout, _ = run(
        "generate", "--chat", *GREEDY, f"--prompts_file={path}", "--output=json", "--n=2"
    )
    outputs = {int(o["request_id"]): o for o in map(json.loads, stdout.splitlines())}
    assert outputs[0]["prompt_token_ids"] == engine.chat_prompt(one)
    assert outputs[1]["prompt_token_ids"] == engine.chat_prompt(two["messages"], [TOOL])
    (want,) = engine.chat(one, SamplingParams(max_tokens=12, temperature=0))
    assert [o["text"] for o in outputs[0]["outputs"]] == [want.outputs[0].text] * 2


@pytest.mark.slow
@pytest.mark.nightly
def test_generate_of_conversations_as_text(run, engine, tmp_path):
    one = [{"role": "user", "content": "Once"}]
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps(one)}\n" * 2)
    (want,) = engine.chat(one, SamplingParams(max_tokens=12, temperature=0))
    stdout, _ = run("generate", "--chat", *GREEDY, f"--prompts_file={path}")
    assert f"=== prompt 1, sample 1\n{want.outputs[0].text}\n\n" in stdout


@pytest.mark.slow
def test_generate_by_a_template_of_ones_own(run, engine, tmp_path):
    one = [{"role": "user", "content": "Once"}]
    stdout, _ = run("generate", "--chat", *GREEDY, f"--prompt={json.dumps(one)}")
    (want,) = engine.chat(one, SamplingParams(max_tokens=12, temperature=0))
    assert stdout == f"{want.outputs[0].text}\n"
    path = tmp_path / "t.jinja"
    path.write_text("{{ greeting }} {{ messages[0].content }}")
    stdout, _ = run(
        "generate", "--chat", *GREEDY, f"--chat_template={path}", "--output=json",
        '--chat_template_kwargs={"greeting": "Oh"}', f"--prompt={json.dumps(one)}",
    )  # fmt: skip
    want = engine.tokenizer.encode("Oh Once", add_special_tokens=False).ids
    assert json.loads(stdout)["prompt_token_ids"] == want


@pytest.mark.parametrize(
    ("args", "lines", "message"),
    [
        (["--chat"], ["Hello"], "prompt 1: the conversation is not valid JSON: Expecting value"),
        (["--chat"], ["3"], "prompt 1: 3 must be a JSON list of messages, or an object with"),
        (["--chat"], ['{"messages": [], "mesages": 1}'], "prompt 1: unknown field 'mesages'"),
        (["--chat"], ["[" * 100000], "prompt 1: the conversation is not valid JSON: it is nested"),
        (["--chat"], ['[{"role": "user", "content": "a"}]', "[]"], "prompt 2: messages is empty"),
        (["--chat"], ['[{"content": "a"}]'], "prompt 1: message 0: role is missing"),
        (
            ["--chat"], ['[{"role": "narrator", "content": "a"}]'],
            "prompt 1: chat template refuses the conversation: narrators do not talk",
        ),
        (["--chat", "--model=demo"], ['[{"role": "user", "content": "a"}]'], "no chat template"),
        (["--chat", "--model=nowhere"], ["[]"], "model directory 'nowhere' does not exist"),
        (["--chat_template=x"], ["a"], "--chat_template is for conversations; give --chat too"),
    ],
)  # fmt: skip
def test_generate_refuses(run, args, lines, message):
    stdout, stderr = run("generate", *GREEDY, *args, stdin="\n".join(lines), code=2)
    assert stdout == "" and stderr.startswith("jpaged generate: ") and stderr.count("\n") == 1
    assert message in stderr


def test_a_model_without_a_tokenizer(run, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("x")
    _, stderr = run("chat", f"--model={tmp_path}", code=2)
    assert "has no config.json: not a model directory" in stderr
    (tmp_path / "config.json").write_text("{}")
    _, stderr = run("chat", f"--model={tmp_path}", code=2)
    assert "has no tokenizer.json, so it cannot be talked to" in stderr
