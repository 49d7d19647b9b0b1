# SPDX-License-Identifier: Apache-2.0
"""Generates text from prompts.

    python -m scripts.generate --prompt="Once upon a time"
    python -m scripts.generate --model=DIR --prompts_file=prompts.txt --output=json > answers.jsonl
    echo "The old fisherman" | python -m scripts.generate
    python -m scripts.generate --prompt="Once upon a time" --n=4 --show_pages

Prompts come from --prompt, which may be repeated, from --prompts_file, one a line, or from standard
input. A model directory without a tokenizer takes prompts as token ids: --prompt="1 15 27". Text or
JSON goes to standard output, everything else to standard error. Ctrl-C prints what there is and
exits with code 130; bad input exits with code 2.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags

from jpaged import Engine, RequestOutput, SamplingParams
from jpaged.outputs import GenerationInterrupted
from jpaged.stats import EngineStats
from jpaged.viewer import PoolSnapshot, draw
from scripts.flags import (
    define_engine_flags,
    enable_compilation_cache,
    engine_config_from_flags,
    run,
)

_DEMO = pathlib.Path(__file__).resolve().parent.parent / "models" / "demo"

_MODEL = flags.DEFINE_string(
    "model", None, "Model directory: Hugging Face's or our own. None takes the shipped checkpoint."
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
    "length_penalty", 1.0, "Rank beams by log-probability / length ** this; above 0 favours long."
)
_EARLY_STOPPING = flags.DEFINE_enum(
    "early_stopping",
    "false",
    ["false", "true", "never"],
    "End a beam search when beam_width beams have ended (true), when none that runs looks better "
    "(false), or when none could be (never).",
)
_SEED = flags.DEFINE_integer("seed", None, "Makes the run reproducible; None draws a new seed.")
_STOP = flags.DEFINE_multi_string("stop", [], "A string that ends a sample; may be repeated.")
_STOP_TOKEN_IDS = flags.DEFINE_multi_integer(
    "stop_token_ids", [], "A token that ends a sample; may be repeated."
)
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Go on after the model's end of text.")
_LOGPROBS = flags.DEFINE_integer(
    "logprobs", None, "Report this many likeliest tokens with each token (--output=json)."
)
_SHOW_PAGES = flags.DEFINE_bool(
    "show_pages",
    False,
    "Draw who owned which page after the step that left most pages in use, the last of them if "
    "there are several, to standard error. At the end all pages are free. NO_COLOR is respected.",
)
define_engine_flags()


def main(argv: list[str]) -> None:
    """Reads prompts, generates, prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; give a prompt as --prompt=...")
    _log_to_stderr()
    with _usage_errors():
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
            early_stopping={"false": False, "true": True}.get(_EARLY_STOPPING.value, "never"),
            seed=_SEED.value,
            stop=tuple(_STOP.value),
            stop_token_ids=tuple(_STOP_TOKEN_IDS.value),
            ignore_eos=_IGNORE_EOS.value,
            logprobs=_LOGPROBS.value,
        )
        prompts = _read_prompts()
        enable_compilation_cache()
        engine = Engine.load(_MODEL.value or _DEMO, engine_config_from_flags())
        params = _with_fallbacks(params, engine.default_params)
        if engine.tokenizer is None:
            prompts = [_token_ids(prompt) for prompt in prompts]
    interrupted = False
    fullest = _Fullest(engine)
    streams = params.num_samples == params.n and params.beam_width is None
    if len(prompts) == 1 and streams and _OUTPUT.value == "text":
        stream = _stream if params.n == 1 else _stream_samples
        outputs, interrupted = stream(engine, prompts[0], params, fullest)
    else:
        try:
            with _usage_errors():
                outputs = engine.generate(
                    prompts, params, progress=len(prompts) > 1, on_step=fullest.look
                )
        except GenerationInterrupted as e:
            outputs, interrupted = e.outputs, True
        for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), 1):
            _print_output(engine, number, prompt, output)
    if fullest.snapshot is not None:
        color = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        print("The fullest step; an owner is request#sample, from 0:", file=sys.stderr)
        print(draw(fullest.snapshot, color=color), end="\n\n", file=sys.stderr)
    print(_summary(outputs, engine.stats(), fullest.stats), file=sys.stderr)
    if interrupted:
        sys.exit(130)


def _with_fallbacks(params: SamplingParams, defaults: SamplingParams) -> SamplingParams:
    """Where neither flags nor the model say: answers that are neither dull nor endless."""
    values: dict[str, Any] = {}
    if params.max_tokens is None and defaults.max_tokens is None:
        values["max_tokens"] = max(128, params.min_tokens or defaults.min_tokens or 0)
    sampled = params.beam_width is None
    if sampled and params.temperature is None and defaults.temperature is None:
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
    engine: Engine, prompt: str | list[int], params: SamplingParams, fullest: _Fullest
) -> tuple[list[RequestOutput], bool]:
    """Prints one sample as it grows. Returns: its last output, and whether Ctrl-C ended it."""
    outputs: list[RequestOutput] = []
    shown = 0
    try:
        with _usage_errors():
            engine.add_request(prompt, params, stream=True)
        _write(_text(prompt))
        while engine.has_unfinished_requests:
            grown = engine.step()
            fullest.look()
            for output in grown:
                outputs = [output]
                text = _completion_text(engine, output, 0)
                _write(text[shown:])
                shown = len(text)
    except KeyboardInterrupt:
        return outputs, True
    finally:
        _write("\n")
    return outputs, False


def _stream_samples(
    engine: Engine, prompt: str | list[int], params: SamplingParams, fullest: _Fullest
) -> tuple[list[RequestOutput], bool]:
    """Prints samples as they end; at Ctrl-C, the others too. Returns: as `_stream` does."""
    outputs: list[RequestOutput] = []
    shown: set[int] = set()
    interrupted = False
    with _usage_errors():
        engine.add_request(prompt, params, stream=True)
    try:
        while engine.has_unfinished_requests:
            outputs = engine.step() or outputs
            fullest.look()
            for index, completion in enumerate(outputs[0].outputs if outputs else ()):
                if completion.finish_reason is not None and index not in shown:
                    shown.add(index)
                    _print_sample(engine, 1, prompt, outputs[0], index)
    except KeyboardInterrupt:
        interrupted = True
    for index in range(len(outputs[0].outputs) if outputs else 0):
        if index not in shown:
            _print_sample(engine, 1, prompt, outputs[0], index)
    return outputs, interrupted


def _print_output(
    engine: Engine, number: int, prompt: str | list[int], output: RequestOutput
) -> None:
    if _OUTPUT.value == "json":
        _write(json.dumps(dataclasses.asdict(output), ensure_ascii=False) + "\n")
        return
    for index in range(len(output.outputs)):
        _print_sample(engine, number, prompt, output, index)


def _print_sample(
    engine: Engine, number: int, prompt: str | list[int], output: RequestOutput, index: int
) -> None:
    _write(f"=== prompt {number}, sample {index + 1}\n")
    _write(_text(prompt) + _completion_text(engine, output, index) + "\n\n")


def _completion_text(engine: Engine, output: RequestOutput, index: int) -> str:
    completion = output.outputs[index]
    if engine.tokenizer is not None:
        return completion.text
    return "".join(f" {token}" for token in completion.token_ids)


def _text(prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def _summary(outputs: Sequence[RequestOutput], stats: EngineStats, fullest: EngineStats) -> str:
    """The run in a few lines.

    Args:
      outputs: of all prompts.
      stats: at the end, for the totals.
      fullest: when most pages were in use, for what is zero at the end.
    """
    totals = stats.totals
    firsts = [t for o in outputs if (t := o.time_to_first_token_s) is not None]
    first = f"{sum(firsts) / len(firsts):.2f} s" if firsts else "none"
    page_mib = stats.page_bytes / 2**20
    used, contiguous = totals.peak_used_pages, stats.contiguous_pages
    return (
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


def _read_prompts() -> list[str]:
    if _PROMPT.value and _PROMPTS_FILE.value:
        raise ValueError("--prompt and --prompts_file exclude each other; give one of them")
    if not all(_PROMPT.value):
        raise ValueError("a --prompt is empty; a prompt needs at least a character")
    if _PROMPT.value:
        return _PROMPT.value
    path = _PROMPTS_FILE.value
    if path is None and sys.stdin.isatty():
        raise ValueError("no prompt: give --prompt=..., --prompts_file=FILE, or standard input")
    if path is None or path == "-":
        name, text = "standard input", sys.stdin.read()
    else:
        name, text = path, pathlib.Path(path).read_text(encoding="utf-8")
    # Not splitlines, which also cuts at form feeds and other separators inside a prompt.
    text = text.rstrip("\n")
    lines = text.split("\n") if text else []
    for number, line in enumerate(lines, 1):
        if not line:
            raise ValueError(f"{name}: line {number} is empty; a prompt needs at least a character")
    if not lines:
        raise ValueError(f"{name} has no prompts; put one on each line")
    return lines


def _token_ids(prompt: str) -> list[int]:
    try:
        return [int(token) for token in prompt.replace(",", " ").split()]
    except ValueError:
        raise ValueError(
            f"prompt {prompt!r}: the model has no tokenizer.json, so its prompts are token ids, "
            "such as --prompt='1 15 27'"
        ) from None


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Turns the library's refusals into one line for people."""
    try:
        yield
    except BrokenPipeError:
        raise  # no fault of the usage: see `scripts.flags.run`
    except (ValueError, OSError) as e:
        raise app.UsageError(str(e)) from e


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger = logging.getLogger("jpaged")
    logger.addHandler(handler)
    logger.propagate = False
    # --verbosity=1 also logs every compilation with its shapes.
    logger.setLevel(logging.DEBUG if flags.FLAGS.verbosity > 0 else logging.INFO)


if __name__ == "__main__":
    run(main)
