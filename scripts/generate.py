# SPDX-License-Identifier: Apache-2.0
"""Generates text from prompts.

    jpaged generate --prompt="Once upon a time"
    jpaged generate --model=DIR --prompts_file=prompts.txt --output=json > answers.jsonl
    echo "The old fisherman" | jpaged generate
    jpaged generate --prompt="Once upon a time" --n=4 --show_pages
    jpaged generate --prompts_file=prompts.jsonl --output=json > answers.jsonl
    jpaged generate --model=DIR --chat --prompts_file=conversations.jsonl
    jpaged generate --prompts_file=prompts.txt --profile=DIR

Prompts, in UTF-8, come from --prompt, which may be repeated, from --prompts_file, one a line, or
from standard input. A model directory without a tokenizer takes prompts as token ids:
--prompt="1 15 27". A file whose name ends in .jsonl has a JSON object a line, such as
{"prompt": "Once", "max_tokens": 9}: text or token ids, and parameters of its own, which win over
the flags, with names and values of `SamplingParams`; null is the default of one. With --chat each
prompt is a conversation in JSON, a list of messages such as [{"role": "user", "content": "Hello"}]
or an object with messages, tools, documents and parameters, and what is written as text is the
answer alone. Text or JSON goes to standard output, everything else to standard error.

Each result is written as soon as its request has ended, so the order is that in which they end:
"prompt 3" in text counts the prompts from 1, and "request_id" in JSON from 0. What the encoding of
standard output lacks is escaped.

Ctrl-C prints what there is and exits with code 130. Bad input exits with code 2, a request that
ended with an error with 1, standard output that cannot be written with 74, one that nobody reads
with 141.
"""

from jpaged.scripts import interrupts

if __name__ == "__main__":
    interrupts.exit_at_once()  # also while the imports take their time

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from jpaged import Engine, RequestOutput, SamplingParams
from jpaged.defaults import model_defaults
from jpaged.device.compile_threads import CompileThreads
from jpaged.host.compile_plan import CompilePlan
from jpaged.host.config import EngineConfig
from jpaged.host.outputs import GenerationInterrupted
from jpaged.host.stats import EngineStats
from jpaged.host.viewer import PoolSnapshot, draw
from jpaged.jobs.settings import with_fallbacks
from jpaged.placement import ModelFiles, compile_ahead, files_of
from jpaged.scripts.conversations import (
    chat_options_from_flags,
    chat_template_of,
    define_chat_flags,
    opened,
    read_conversations,
    render_conversations,
)
from jpaged.scripts.flags import (
    define_engine_flags,
    engine_config_from_flags,
    log_to_stderr,
    model_path,
    require_device,
    run,
    usage_errors,
)
from jpaged.scripts.job import encoded, first_shapes, plan_of, wait_for_all
from jpaged.scripts.json_prompts import read_json_prompts
from jpaged.scripts.monitor_flags import define_monitor_flags, monitored
from jpaged.scripts.output import EndingSamples, GrowingSample, ResultWriter
from jpaged.scripts.profile_flags import (
    define_profile_flags,
    profile_config_from_flags,
    profiled,
)
from jpaged.scripts.prompts import read_prompts
from jpaged.scripts.sampling_flags import (
    define_sampling_flags,
    sampling_params_from_flags,
)

_MODEL = flags.DEFINE_string(
    "model",
    "demo",
    "Model directory, Hugging Face's or our own, a GGUF file, or a model's name on the Hugging "
    "Face hub, org/name; demo is the shipped checkpoint.",
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file",
    None,
    "File with one prompt a line; - is standard input. One that ends in .jsonl has JSON objects, "
    "with a prompt and parameters of its own.",
)
_OUTPUT = flags.DEFINE_enum(
    "output", "text", ["text", "json"], "json prints one object a request, one a line."
)
_SHOW_PAGES = flags.DEFINE_bool(
    "show_pages",
    False,
    "Draw who owned which page after the step that left most pages in use, the last of them if "
    "there are several, to standard error. At the end all pages are free. NO_COLOR is respected.",
)
_PRINT_COMPILE_PLAN = flags.DEFINE_bool(
    "print_compile_plan",
    False,
    "Before the first step, compile every step shape that the job can have, and print each to "
    "standard error: how many steps will have it if every answer is as long as it may be, how much "
    "of them is padding, and what compiling took. `jpaged warmup` has the same without the job.",
)
_CHAT = flags.DEFINE_bool(
    "chat", False, "Each prompt is a conversation in JSON, to be answered by the chat template."
)
define_sampling_flags()
define_chat_flags()
define_engine_flags()
define_profile_flags()
define_monitor_flags()


def main(argv: list[str]) -> None:
    """Reads prompts, generates, prints."""
    log_to_stderr()
    with usage_errors():
        params, prompts, model = read_flags(argv)
        profile = profile_config_from_flags()
        options = chat_options_from_flags()
        if _CHAT.value:
            model = opened(model)
            prompts = render_conversations(prompts, chat_template_of(model), options)
        elif options:
            raise ValueError(f"--{next(iter(options))} is for conversations; give --chat too")
        require_device()
        config = engine_config_from_flags()
        engine = _engine(config, files_of(model, config), prompts, params)
        params = [with_fallbacks(own, engine.defaults) for own in params]
        prompts = encoded(prompts, engine.tokenizer, rendered=_CHAT.value)
        if engine.config.strict_shapes:
            engine.warm_up(params=params)
    as_json = _OUTPUT.value == "json"
    shown = [""] * len(prompts) if _CHAT.value else prompts
    writer = ResultWriter(shown, engine.tokenizer, as_json=as_json)
    fullest = _Fullest(engine)
    first = params[0]
    streams = first.num_samples == first.n and first.beam_width is None
    with contextlib.ExitStack() as stack:
        with usage_errors():
            tell = stack.enter_context(monitored(engine, lambda: len(writer.written), len(prompts)))
        look = stack.enter_context(profiled(engine, profile))

        def on_step() -> None:
            fullest.look()
            look()
            tell()

        if len(prompts) == 1 and streams and not as_json:
            interrupted = _stream(engine, prompts[0], first, writer, on_step)
        else:
            interrupted = _generate(engine, prompts, params, writer, on_step)
    if fullest.snapshot is not None:
        color = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        print("The fullest step; an owner is request#sample, from 0:", file=sys.stderr)
        print(draw(fullest.snapshot, color=color), end="\n\n", file=sys.stderr)
    print(_summary(writer, engine.stats(), fullest.stats), file=sys.stderr)
    if interrupted:
        raise KeyboardInterrupt
    engine.save_prompts()
    if writer.num_errors:
        sys.exit(1)


def read_flags(argv: list[str]) -> tuple[list[SamplingParams], list[Any], pathlib.Path]:
    """Returns what the flags ask for, before anything has been loaded.

    Args:
      argv: the program's name, and arguments that are no flags.

    Returns:
      The parameters of each prompt, the prompts, which are text, token ids or, with --chat, what
      `render_conversations` takes, and the model directory.

    Raises:
      app.UsageError, ValueError: if something is missing or wrong.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; give a prompt as --prompt=...")
    params = sampling_params_from_flags()
    if not _MODEL.value:
        raise ValueError("--model is empty; name a directory, or leave the flag out")
    path = _PROMPTS_FILE.value
    lines = read_prompts(_PROMPT.value, path)
    given: Sequence[tuple[Any, SamplingParams]] = [(prompt, params) for prompt in lines]
    if _CHAT.value:
        given = read_conversations(lines, params)
    elif path is not None and _has_json_lines():
        given = read_json_prompts(lines, path, params)
    # Last, as it may download one.
    model = model_path(_MODEL.value)
    return [own for _, own in given], [prompt for prompt, _ in given], model


def _engine(
    config: EngineConfig, files: ModelFiles, prompts: list[Any], params: list[SamplingParams]
) -> Engine:
    """Loads the model, while threads compile what the job begins with; with its plan, all of it."""
    begun: list[tuple[CompilePlan, CompileThreads]] = []
    strict = config.strict_shapes or config.deterministic  # then all that it can have

    def compile_first() -> CompileThreads:
        defaults = model_defaults(files.generation_config, files.config.vocab_size)
        own = [with_fallbacks(each, defaults) for each in params]
        with _prompt_errors():  # before the weights are read
            ready = encoded(prompts, files.tokenizer, rendered=_CHAT.value)
            if not _PRINT_COMPILE_PLAN.value:
                shapes = first_shapes(ready, own, config, files)
                if strict:
                    return compile_ahead(config, files, params=own)
                return compile_ahead(config, files, shapes)
            plan = plan_of(ready, own, config, files)
        shapes = [each.shape for each in plan.shapes]
        begun.append((plan, compile_ahead(config, files, shapes, own)))
        return begun[0][1]

    engine = Engine.load(files, config, compile_first)
    for plan, threads in begun:
        seconds = wait_for_all(threads, [each.shape for each in plan.shapes])
        print("\n".join(plan.timed(seconds).table()), file=sys.stderr)
    return engine


def _has_json_lines() -> bool:
    path = _PROMPTS_FILE.value
    return path is not None and path.endswith(".jsonl") and not _CHAT.value


def _prompt_errors() -> contextlib.AbstractContextManager[None]:
    """As `usage_errors`, with the prompt named by its line where that is what people see."""
    return usage_errors(f"{_PROMPTS_FILE.value}: line" if _has_json_lines() else "prompt")


class _Fullest:
    """Remembers the pool as it was after the step that left most pages in use.

    Attributes:
      stats: the reading then; before the first step, of the idle engine.
      snapshot: the pool then, with --show_pages.
    """

    def __init__(self, engine: Engine):
        self.stats = engine.stats()
        self.snapshot: PoolSnapshot | None = None
        self._engine = engine

    def look(self) -> None:
        """Called after each step. Of equally full ones the last counts: its pages are fuller."""
        stats = self._engine.stats()
        if stats.num_used_pages >= max(self.stats.num_used_pages, 1):
            self.stats = stats
            if _SHOW_PAGES.value:
                self.snapshot = self._engine.pool_snapshot()


def _generate(
    engine: Engine,
    prompts: list[str] | list[list[int]],
    params: list[SamplingParams],
    writer: ResultWriter,
    on_step: Callable[[], None],
) -> bool:
    """Prints each prompt's result when it has ended. Returns: whether Ctrl-C ended it."""
    try:
        with _prompt_errors():
            engine.generate(
                prompts,
                params,
                progress=len(prompts) > 1,
                on_step=on_step,
                on_output=writer.write,
            )
    except GenerationInterrupted as e:
        interrupts.handled()
        for index, output in enumerate(e.outputs):
            if index not in writer.written:
                writer.write(index, output)
        return True
    return False


def _stream(
    engine: Engine,
    prompt: str | list[int],
    params: SamplingParams,
    writer: ResultWriter,
    on_step: Callable[[], None],
) -> bool:
    """Prints the samples of one prompt as they come. Returns: whether Ctrl-C ended it."""
    with _prompt_errors():
        stream = engine.stream(prompt, params, on_step=on_step)
    last: RequestOutput | None = None
    interrupted = False
    shown = GrowingSample(writer) if params.n == 1 else EndingSamples(writer)
    try:
        for last in stream:
            shown.grow(last)
    except KeyboardInterrupt:
        interrupts.handled()
        interrupted = True
    shown.end(last)
    writer.count(0, last)
    return interrupted


def _summary(writer: ResultWriter, stats: EngineStats, fullest: EngineStats) -> str:
    """The run in a few lines.

    Args:
      writer: of all results.
      stats: at the end, for the totals.
      fullest: when most pages were in use, for what is zero at the end.
    """
    totals = stats.totals
    firsts = writer.first_token_s
    first = f"{sum(firsts) / len(firsts):.2f} s" if firsts else "none"
    page_mib = stats.page_bytes / 2**20
    used, contiguous = totals.peak_used_pages, stats.contiguous_pages
    disk = ""
    if totals.num_disk_tokens:
        disk = f" ({totals.num_disk_tokens} tokens from disk)"
    ended = ""
    if writer.num_aborted or writer.num_errors:
        ended = (
            f"prompts: {writer.num_finished} finished, {writer.num_aborted} aborted, "
            f"{writer.num_errors} ended with an error\n"
        )
    return (
        f"{ended}"
        f"pages at the fullest step: {fullest.num_used_pages} live ({fullest.num_shared_pages} "
        f"shared), {fullest.num_free_pages} free ({fullest.num_cached_pages} cached); sharing "
        f"saves {fullest.num_saved_cells} cells\n"
        f"pages over the whole run: sharing saved {stats.mean_saving:.1%} on average; copies on "
        f"write {totals.num_page_copies}, prefix hit rate {stats.hit_rate:.1%}{disk}, preemptions "
        f"{totals.num_preemptions}, swapped {totals.num_swapped_pages}\n"
        f"{totals.num_generated_tokens} tokens; prefill {stats.prefill_tokens_per_s:.0f} tokens/s, "
        f"decode {stats.decode_tokens_per_s:.0f} tokens/s, compiling {totals.compile_s:.1f} s; "
        f"first token after {first} on average; "
        f"{used} of {stats.num_usable_pages} pages at peak ({used * page_mib:.2f} MiB), "
        f"{stats.mean_utilisation:.1%} of their cells live; contiguous preallocation at "
        f"max_model_len={stats.max_model_len} would have held {contiguous} pages "
        f"({contiguous * page_mib:.2f} MiB)"
    )


if __name__ == "__main__":
    run(main)
