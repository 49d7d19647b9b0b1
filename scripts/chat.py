# SPDX-License-Identifier: Apache-2.0
"""Chats with a model in the terminal.

    jpaged chat --model=DIR
    jpaged chat --model=org/name --system="Be brief." --temperature=0
    jpaged chat --model=FILE.gguf
    jpaged chat --model=DIR < messages.txt > answers.txt

Each line, in UTF-8, is a message, and the answer is written as it grows. What was said before is
part of the next prompt, whose pages are still there: a line on standard error says how many of its
tokens were found. A line that is /reset forgets what was said, and /exit, or Ctrl-D, ends.

Ctrl-C stops the answer, of which is kept what there is; pressed again it does not wait for the step
that runs, and pressed a third time it ends the program. In a pipe, what is wrong with a message
ends the program with code 2; in a terminal, the message is left out. Without --chat_template the
model must have a chat template: nothing is guessed. Unless --max_num_seqs says otherwise, the page
pool has room for one conversation of the longest length. Layers are scanned over, which begins to
answer sooner; on a CPU, long answers are quicker with --noscan_layers.
"""

from jpaged.scripts import interrupts

if __name__ == "__main__":
    interrupts.exit_at_once()  # also while the imports take their time

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator

from absl import app, flags

from jpaged import Engine, RequestOutput, SamplingParams
from jpaged.chat import ChatOptions
from jpaged.host.batch import ShapeBuckets, StepShape
from jpaged.host.config import EngineConfig
from jpaged.host.stats import Counters
from jpaged.models.sources import opened
from jpaged.placement import ModelFiles, compile_ahead
from jpaged.scripts.conversations import (
    chat_options_from_flags,
    chat_template_of,
    define_chat_flags,
)
from jpaged.scripts.flags import (
    define_engine_flags,
    engine_config_from_flags,
    log_to_stderr,
    model_path,
    run,
    usage_errors,
)
from jpaged.scripts.output import ResultWriter
from jpaged.scripts.prompts import decode_flag
from jpaged.scripts.sampling_flags import define_sampling_flags, sampling_params_from_flags
from jpaged.text import encode

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Model directory, Hugging Face's or our own, a GGUF file, or a model's name on the Hugging "
    "Face hub, org/name; one that was taught to chat, as the shipped checkpoint was not.",
)
_SYSTEM = flags.DEFINE_string("system", None, "What stands before the conversation.")
_SAMPLING = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "sequence_bias", "min_tokens"),
    *("suppress_tokens", "bad_words_ids", "allowed_token_ids", "seed", "stop"),
    "skip_special_tokens",
)
_COMMANDS = "a line is a message; /reset forgets what was said, /exit or Ctrl-D ends"
define_sampling_flags(_SAMPLING, longest="as many as there is room for")
define_chat_flags()
define_engine_flags()


def main(argv: list[str]) -> None:
    """Reads messages, answers each."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; messages are lines of the input")
    if sys.stdin is None:
        raise app.UsageError("standard input is closed, so there are no messages")
    log_to_stderr()
    with usage_errors():
        params = sampling_params_from_flags(_SAMPLING)
        options = chat_options_from_flags()
        system = [] if _SYSTEM.value is None else [_message("system", "--system", _SYSTEM.value)]
        if not _MODEL.value:
            raise ValueError(
                "no --model: name a directory, a GGUF file, or org/name, of a model that was "
                "taught to chat"
            )
        model = opened(model_path(_MODEL.value))
        # What a template says to such a conversation it says before the weights are read.
        probe = [*system, {"role": "user", "content": "What do people say to begin with?"}]
        chat_template_of(model).render(probe, **options, add_generation_prompt=True)
        config = engine_config_from_flags()
        if not flags.FLAGS["max_num_seqs"].present:
            # One answer at a time: a pool for one, and of a size that what else runs here does not
            # change, so that compiled programs fit the next time.
            config = dataclasses.replace(config, max_num_seqs=1)
        if not flags.FLAGS["scan_layers"].present:
            # On a CPU too, where unrolled steps are quicker, but compile for as long as many tokens
            # take: whoever talks waits for the first.
            config = dataclasses.replace(config, scan_layers=True)
        files = ModelFiles.of(model, config)
        shapes = _first_steps(files, config, probe, options)
        if shapes and not (config.step_shapes or config.strict_shapes or config.deterministic):
            # Shorter prompts, as of later turns, are padded to what is compiled already.
            config = dataclasses.replace(config, step_shapes=",".join(map(str, shapes)))
        # Not the decode step: on few cores the first text would wait for it as well.
        engine = Engine.load(files, config, lambda: compile_ahead(config, files, shapes[:1]))
    if params.temperature is None and engine.defaults.params.temperature is None:
        params = dataclasses.replace(params, temperature=0.7)
    if config.strict_shapes:
        with usage_errors():
            engine.warm_up(params=[params])
    dialog = Dialog(engine, params, system, options)
    terminal = sys.stdin.isatty()
    if terminal:
        _tell(_COMMANDS)
    for text in _lines_of_terminal() if terminal else _lines_of_pipe():
        command = text.strip()
        if command == "/exit":
            break
        if command == "/reset":
            dialog.reset()
            _tell("what was said is forgotten")
        elif command.startswith("/") and " " not in command and terminal:
            _tell(f"there is no command {command}; {_COMMANDS}")
        elif command:
            try:
                dialog.answer(text)
            except KeyboardInterrupt:  # before the answer began, or pressed twice
                if not terminal:
                    raise
                _go_on()
            except ValueError as e:
                reason = re.sub(r"^request '\d+': ", "", str(e))
                if not terminal:
                    raise app.UsageError(reason) from e
                _tell(reason)
    engine.save_prompts()


class Dialog:
    """What was said, and who answers.

    Attributes:
      messages: the conversation, the system's message before it.
    """

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        system: list[dict[str, str]],
        options: ChatOptions,
    ):
        """Begins a conversation in which nothing was said.

        Args:
          engine: whose model answers.
          params: for each answer.
          system: the message that stands before the conversation, or none.
          options: for the chat template.
        """
        self._engine, self._params, self._options = engine, params, options
        self._system = system
        self._writer = ResultWriter([], engine.tokenizer, as_json=False)
        self.reset()

    def reset(self) -> None:
        """Forgets what was said."""
        self.messages: list[dict[str, str]] = list(self._system)

    def answer(self, text: str) -> None:
        """Writes the answer to a message as it grows; both are said then.

        A message that comes to no answer was not said.

        Raises:
          ValueError: if it cannot be answered; one line.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._engine.chat_prompt(messages, **self._options)
        before = self._engine.stats().totals
        last: RequestOutput | None = None
        shown, note = 0, None
        try:
            with interrupts.noted() as note, self._engine.stream(prompt, self._params) as stream:
                for last in stream:
                    shown = self._write(last, shown)
                    if note.asked:
                        break
                if note.asked:
                    with contextlib.suppress(KeyError):  # it has ended
                        last = self._engine.abort(stream.request_id)
        except KeyboardInterrupt:
            pass  # pressed again: the step was cut short
        stopped = note is not None and note.asked
        if last is not None:
            self._write(last, shown)
        self._writer.text("\n")
        if last is None:
            _tell("stopped before the answer began; the message is left out")
            return
        completion = last.outputs[0]
        if completion.error is not None:
            raise ValueError(f"{completion.error}; the message is left out")
        if completion.text:
            self.messages = [*messages, {"role": "assistant", "content": completion.text}]
        _tell(_summary(last, before, self._engine.stats().totals, stopped=stopped))

    def _write(self, output: RequestOutput, shown: int) -> int:
        """Writes what of an answer has not been shown; returns how much has been then."""
        text = output.outputs[0].text
        self._writer.text(text[shown:])
        return len(text)


def _first_steps(
    files: ModelFiles, config: EngineConfig, messages: list[dict[str, str]], options: ChatOptions
) -> list[StepShape]:
    """The steps that a conversation will probably begin with: a prompt like this, and decoding."""
    if files.tokenizer is None:
        return []  # which is refused
    text = files.chat_template.render(messages, **options, add_generation_prompt=True)
    buckets = ShapeBuckets.of(config)
    length = len(encode(files.tokenizer, text, add_special_tokens=False))
    length = min(length, buckets.max_num_tokens)
    return [buckets.shape(length, 1, 1), buckets.shape(1, 1, 1)]


def _summary(output: RequestOutput, before: Counters, after: Counters, *, stopped: bool) -> str:
    """An answer in a line: how long, how fast, and what of its prompt was there already."""
    (completion,) = output.outputs
    count, prompt = len(completion.token_ids), len(output.prompt_token_ids)
    found = min(after.num_hit_tokens - before.num_hit_tokens, prompt)
    disk = after.num_disk_tokens - before.num_disk_tokens
    where = f" ({disk} of them on disk)" if disk else ""
    first = output.time_to_first_token_s or 0.0
    seconds = output.latency_s - first
    rate = f", {(count - 1) / seconds:.1f} tokens/s" if count > 1 and seconds > 0 else ""
    end = ", stopped" if stopped else ""
    if completion.finish_reason == "length":
        end = ", cut by the length limit"
    return (
        f"{count} tokens{end}, first after {first:.2f} s{rate}; "
        f"of {prompt} tokens of the prompt {found} were found{where}, {prompt - found} computed"
    )


def _message(role: str, name: str, text: str) -> dict[str, str]:
    return {"role": role, "content": decode_flag(name, text)}


def _lines_of_terminal() -> Iterator[str]:
    """Lines as they are typed; Ctrl-C drops the one that is begun."""
    ask = input
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (lines can be edited, and called back)
    else:
        ask = _ask_on_stderr  # `input` would write the mark between the answers
    while True:
        try:
            line = decode_flag("the message", ask("> "))
        except KeyboardInterrupt:
            _go_on()
        except EOFError:
            print(file=sys.stderr)
            return
        except ValueError as e:
            _tell(str(e))
        else:
            yield line


def _ask_on_stderr(mark: str) -> str:
    print(mark, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _lines_of_pipe() -> Iterator[str]:
    """Lines as they come."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as e:
            raise app.UsageError(
                f"standard input: line {number} is not UTF-8 (byte 0x{line[e.start]:02x} at "
                f"position {e.start + 1}); give it as UTF-8"
            ) from e


def _go_on() -> None:
    """The program knows of Ctrl-C, and waits for the next one."""
    interrupts.handled()
    interrupts.raise_once()
    print(file=sys.stderr)


def _tell(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
