# SPDX-License-Identifier: Apache-2.0
"""Generates text from prompts.

    jpaged generate --prompt="Once upon a time"
    jpaged generate --model=DIR --prompts_file=prompts.txt --output=json > answers.jsonl
    echo "The old fisherman" | jpaged generate
    jpaged generate --prompt="Once upon a time" --n=4 --show_pages
    jpaged generate --model=DIR --chat --prompts_file=conversations.jsonl

Prompts, in UTF-8, come from --prompt, which may be repeated, from --prompts_file, one a line, or
from standard input. A model directory without a tokenizer takes prompts as token ids:
--prompt="1 15 27". With --chat each prompt is a conversation in JSON, a list of messages such as
[{"role": "user", "content": "Hello"}] or an object with messages, tools and documents, and what is
written as text is the answer alone. Text or JSON goes to standard output, everything else to
standard error.

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

import dataclasses
import os
import pathlib
import sys
from typing import Any

from absl import app, flags

from jpaged import Engine, RequestOutput, SamplingParams
from jpaged.defaults import Defaults
from jpaged.host.outputs import GenerationInterrupted
from jpaged.host.stats import EngineStats
from jpaged.host.viewer import PoolSnapshot, draw
from jpaged.models import find
from jpaged.scripts.conversations import (
    chat_options_from_flags,
    chat_template_of,
    define_chat_flags,
    render_conversations,
)
from jpaged.scripts.flags import (
    define_engine_flags,
    enable_compilation_cache,
    engine_config_from_flags,
    log_to_stderr,
    require_device,
    run,
    usage_errors,
)
from jpaged.scripts.output import ResultWriter
from jpaged.scripts.prompts import decode_flag, parse_token_ids, read_prompts
from jpaged.text import encode

_MODEL = flags.DEFINE_string(
    "model",
    "demo",
    "Model directory, Hugging Face's or our own, or a model's name on the Hugging Face hub, "
    "org/name; demo is the shipped checkpoint.",
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "File with one prompt a line; - is standard input."
)
_OUTPUT = flags.DEFINE_enum(
    "output", "text", ["text", "json"], "json prints one object a request, one a line."
)
# None of the next ones takes what the model's generation_config.json says.
_FILE = "None takes the model's generation_config.json, else "
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", None, f"Most tokens to generate for a prompt. {_FILE}128."
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", None, f"Divides the logits; 0 is greedy. {_FILE}0.7; 1 with --beam_width."
)
_TOP_K = flags.DEFINE_integer("top_k", None, f"Keep the k likeliest tokens; 0 keeps all. {_FILE}0.")
_TOP_P = flags.DEFINE_float(
    "top_p", None, f"Keep the likeliest tokens up to this probability. {_FILE}1."
)
_MIN_P = flags.DEFINE_float(
    "min_p", None, f"Keep tokens this fraction as likely as the likeliest. {_FILE}0."
)
_REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty",
    None,
    f"Above 1: makes tokens less likely that prompt or answer have already. {_FILE}1.",
)
_MIN_TOKENS = flags.DEFINE_integer(
    "min_tokens", None, f"Choose no token that ends an answer before so many. {_FILE}0."
)
_SUPPRESS_TOKENS = flags.DEFINE_multi_integer(
    "suppress_tokens", None, f"A token that is never chosen; may be repeated. {_FILE}none."
)
_N = flags.DEFINE_integer("n", 1, "Samples to draw from each prompt, or best beams to print.")
_BEST_OF = flags.DEFINE_integer(
    "best_of", None, "Draw so many samples and print the n likeliest a token."
)
_BEAM_WIDTH = flags.DEFINE_integer(
    "beam_width", None, "Search with so many beams instead of drawing samples."
)
_LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty",
    None,
    f"Rank beams by log-probability / length ** this; above 0 favours long. {_FILE}1.",
)
_EARLY_STOPPINGS = {"false": False, "true": True, "never": "never"}
_EARLY_STOPPING = flags.DEFINE_enum(
    "early_stopping",
    None,
    list(_EARLY_STOPPINGS),
    "End a beam search when beam_width beams have ended (true), when none that runs looks better "
    f"(false), or when none could be (never). {_FILE}false.",
)
_RENORMALIZE_LOGITS = flags.DEFINE_bool(
    "renormalize_logits",
    None,
    "Rank beams by probabilities that add up to 1 again after a penalty or suppression. "
    f"{_FILE}false.",
)
_SEED = flags.DEFINE_integer("seed", None, "Makes the run reproducible; None draws a new seed.")
_STOP = flags.DEFINE_multi_string("stop", [], "A string that ends a sample; may be repeated.")
_STOP_TOKEN_IDS = flags.DEFINE_multi_integer(
    "stop_token_ids", [], "A token that ends a sample; may be repeated."
)
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Go on after the model's end of text.")
_LOGPROBS = flags.DEFINE_integer(
    "logprobs", None, "Report this many likeliest tokens with each token."
)
_SKIP_SPECIAL_TOKENS = flags.DEFINE_bool(
    "skip_special_tokens", True, "Leave the tokenizer's special tokens out of the text."
)
_SHOW_PAGES = flags.DEFINE_bool(
    "show_pages",
    False,
    "Draw who owned which page after the step that left most pages in use, the last of them if "
    "there are several, to standard error. At the end all pages are free. NO_COLOR is respected.",
)
_CHAT = flags.DEFINE_bool(
    "chat", False, "Each prompt is a conversation in JSON, to be answered by the chat template."
)
define_chat_flags()
define_engine_flags()


def main(argv: list[str]) -> None:
    """Reads prompts, generates, prints."""
    log_to_stderr()
    with usage_errors():
        params, prompts, model = read_flags(argv)
        options = chat_options_from_flags()
        if _CHAT.value:
            prompts = render_conversations(prompts, chat_template_of(model), options)
        elif options:
            raise ValueError(f"--{next(iter(options))} is for conversations; give --chat too")
        enable_compilation_cache()
        require_device()
        engine = Engine.load(model, engine_config_from_flags())
        params = _with_fallbacks(params, engine.defaults)
        prompts = _encoded(prompts, engine)
    as_json = _OUTPUT.value == "json"
    shown = [""] * len(prompts) if _CHAT.value else prompts
    writer = ResultWriter(shown, engine.tokenizer, as_json=as_json)
    fullest = _Fullest(engine)
    interrupted = False
    streams = params.num_samples == params.n and params.beam_width is None
    if len(prompts) == 1 and streams and not as_json:
        stream = _stream if params.n == 1 else _stream_samples
        interrupted = stream(engine, prompts[0], params, writer, fullest)
    else:
        try:
            with usage_errors():
                engine.generate(
                    prompts,
                    params,
                    progress=len(prompts) > 1,
                    on_step=fullest.look,
                    on_output=writer.write,
                )
        except GenerationInterrupted as e:
            interrupts.handled()
            interrupted = True
            for index, output in enumerate(e.outputs):
                if index not in writer.written:
                    writer.write(index, output)
    if fullest.snapshot is not None:
        color = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        print("The fullest step; an owner is request#sample, from 0:", file=sys.stderr)
        print(draw(fullest.snapshot, color=color), end="\n\n", file=sys.stderr)
    print(_summary(writer, engine.stats(), fullest.stats), file=sys.stderr)
    if interrupted:
        raise KeyboardInterrupt
    if writer.num_errors:
        sys.exit(1)


def read_flags(argv: list[str]) -> tuple[SamplingParams, list[str], pathlib.Path]:
    """Returns what the flags ask for, before anything has been loaded.

    Args:
      argv: the program's name, and arguments that are no flags.

    Returns:
      Parameters, prompts and model directory.

    Raises:
      app.UsageError, ValueError: if something is missing or wrong.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; give a prompt as --prompt=...")
    params = SamplingParams(
        max_tokens=_MAX_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
        repetition_penalty=_REPETITION_PENALTY.value,
        min_tokens=_MIN_TOKENS.value,
        suppress_tokens=tuple(_SUPPRESS_TOKENS.value or ()) or None,
        n=_N.value,
        best_of=_BEST_OF.value,
        beam_width=_BEAM_WIDTH.value,
        length_penalty=_LENGTH_PENALTY.value,
        early_stopping=_EARLY_STOPPINGS.get(_EARLY_STOPPING.value or ""),
        renormalize_logits=_RENORMALIZE_LOGITS.value,
        seed=_SEED.value,
        stop=tuple(decode_flag("--stop", stop) for stop in _STOP.value),
        stop_token_ids=tuple(_STOP_TOKEN_IDS.value),
        ignore_eos=_IGNORE_EOS.value,
        logprobs=_LOGPROBS.value,
        skip_special_tokens=_SKIP_SPECIAL_TOKENS.value,
    )
    if not _MODEL.value:
        raise ValueError("--model is empty; name a directory, or leave the flag out")
    prompts = read_prompts(_PROMPT.value, _PROMPTS_FILE.value)
    try:
        # Last, as it may download one.
        model = pathlib.Path(find(_MODEL.value)).expanduser()
    except RuntimeError as e:
        raise ValueError(f"--model={_MODEL.value}: {e}") from e
    return params, prompts, model


def _encoded(prompts: list[str], engine: Engine) -> list[str] | list[list[int]]:
    """The prompts as the engine is given them.

    Conversations have the special tokens that their template wrote, and get no others; a model
    without a tokenizer has token ids.
    """
    if engine.tokenizer is None:
        return [parse_token_ids(prompt) for prompt in prompts]
    if not _CHAT.value:
        return prompts
    return [encode(engine.tokenizer, prompt, add_special_tokens=False) for prompt in prompts]


def _with_fallbacks(params: SamplingParams, defaults: Defaults) -> SamplingParams:
    """Where neither flags nor the model say: answers that are neither dull nor endless."""
    values: dict[str, Any] = {}
    own = defaults.params
    if params.max_tokens is None and own.max_tokens is None and defaults.max_length is None:
        values["max_tokens"] = max(128, params.min_tokens or own.min_tokens or 0)
    sampled = params.beam_width is None
    if sampled and params.temperature is None and own.temperature is None:
        values["temperature"] = 0.7
    return dataclasses.replace(params, **values)


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


def _stream(
    engine: Engine,
    prompt: str | list[int],
    params: SamplingParams,
    writer: ResultWriter,
    fullest: _Fullest,
) -> bool:
    """Prints one sample as it grows. Returns: whether Ctrl-C ended it."""
    last: RequestOutput | None = None
    shown, interrupted = 0, False
    with usage_errors():
        engine.add_request(prompt, params, stream=True)
    try:
        writer.text(writer.prompt_text(0))
        while engine.has_unfinished_requests:
            grown = engine.step()
            fullest.look()
            for last in grown:
                text = writer.completion_text(last.outputs[0])
                writer.text(text[shown:])
                shown = len(text)
    except KeyboardInterrupt:
        interrupts.handled()
        interrupted = True
    writer.text("\n")
    if last is not None:
        writer.write_logprobs(last.outputs[0])
    writer.count(0, last)
    return interrupted


def _stream_samples(
    engine: Engine,
    prompt: str | list[int],
    params: SamplingParams,
    writer: ResultWriter,
    fullest: _Fullest,
) -> bool:
    """Prints samples as they end; at Ctrl-C, the others too. Returns: as `_stream` does."""
    last: RequestOutput | None = None
    shown: set[int] = set()
    interrupted = False
    with usage_errors():
        engine.add_request(prompt, params, stream=True)
    try:
        while engine.has_unfinished_requests:
            grown = engine.step()
            fullest.look()
            for last in grown:
                for index, completion in enumerate(last.outputs):
                    if completion.finish_reason is not None and index not in shown:
                        shown.add(index)
                        writer.write_sample(0, completion, index)
    except KeyboardInterrupt:
        interrupts.handled()
        interrupted = True
    for index, completion in enumerate(last.outputs if last else ()):
        if index not in shown:
            writer.write_sample(0, completion, index)
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
        f"write {totals.num_page_copies}, prefix hit rate {stats.hit_rate:.1%}, preemptions "
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
