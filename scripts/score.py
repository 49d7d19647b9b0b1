# SPDX-License-Identifier: Apache-2.0
"""Says how likely a model finds completions that are given.

    jpaged score --input=pairs.jsonl > scores.jsonl
    jpaged score --model=DIR --input=pairs.jsonl
    echo '{"prompt": "Once upon", "completion": " a time"}' | jpaged score

Each line of the input is a JSON object with a "prompt" and a "completion", or several
"completions": all of them text, or all of them token ids. Completions of one prompt share its
pages. Of text, the tokens are those of prompt and completion together, and spaces at the prompt's
end belong to the completion, as lm-evaluation-harness has it.

For each completion one JSON object goes to standard output as soon as it is scored, so the order is
that in which they end: "line" counts the input's lines from 1 and "completion" those of a line from
0; "logprob" is the sum of "logprobs", one for each of "token_ids", in nats, under the model as it
is; "is_greedy" says whether greedy sampling would have chosen all of them. Everything else goes to
standard error.

Ctrl-C exits with code 130. Bad input exits with code 2, before anything is computed; a model that
gives what is no number with 1; standard output that cannot be written with 74, one that nobody
reads with 141.
"""

from jpaged.scripts import interrupts

if __name__ == "__main__":
    interrupts.exit_at_once()  # also while the imports take their time

import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from jpaged import Engine, SamplingParams
from jpaged.host.checks import shown
from jpaged.jobs.fields import checked_prompt, parse_json
from jpaged.scoring import Score
from jpaged.scripts.flags import (
    define_engine_flags,
    engine_config_from_flags,
    log_to_stderr,
    model_path,
    require_device,
    run,
    usage_errors,
)
from jpaged.scripts.monitor_flags import define_monitor_flags, monitored
from jpaged.scripts.output import ResultWriter
from jpaged.scripts.prompts import read_prompts

_MODEL = flags.DEFINE_string("model", "demo", "As in jpaged generate.")
_INPUT = flags.DEFINE_string(
    "input", None, "File with a JSON object a line; - or nothing is standard input."
)
define_engine_flags()
define_monitor_flags()


def main(argv: list[str]) -> None:
    """Reads pairs, scores, prints."""
    log_to_stderr()
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; name a file as --input=FILE")
    with usage_errors():
        path = _INPUT.value
        if path is None and sys.stdin is not None and sys.stdin.isatty():
            raise ValueError("nothing to score: give --input=FILE, or standard input")
        lines = read_prompts([], "-" if path is None else path, "--input")
        places, pairs = read_pairs(lines, "standard input" if path in (None, "-") else path)
        model = model_path(_MODEL.value)
        require_device()
        engine = Engine.load(model, engine_config_from_flags())
        if engine.config.strict_shapes:
            engine.warm_up(params=[SamplingParams(prompt_logprobs=1)])
    writer = ResultWriter([], engine.tokenizer, as_json=True)
    num_scored = 0

    def write(index: int, score: Score) -> None:
        nonlocal num_scored
        line, completion = places[index]
        fields = {
            "line": line,
            "completion": completion,
            "logprob": score.logprob,
            "is_greedy": score.is_greedy,
            "token_ids": score.token_ids,
            "logprobs": score.logprobs,
        }
        num_scored += 1
        writer.text(json.dumps(fields) + "\n")

    with contextlib.ExitStack() as stack:
        with usage_errors():
            tell = stack.enter_context(monitored(engine, lambda: num_scored, len(pairs)))
        try:
            with usage_errors("pair"):
                engine.score_all(pairs, progress=len(pairs) > 1, on_step=tell, on_score=write)
        except RuntimeError as e:
            print(f"jpaged score: {e}", file=sys.stderr)
            sys.exit(1)
    engine.save_prompts()
    totals = engine.stats().totals
    print(
        f"{len(pairs)} completions scored; {totals.num_prefill_tokens} tokens computed, prefix hit "
        f"rate {engine.stats().hit_rate:.1%}, compiling {totals.compile_s:.1f} s",
        file=sys.stderr,
    )


def read_pairs(
    lines: Sequence[str], name: str
) -> tuple[list[tuple[int, int]], list[tuple[Any, Any]]]:
    """Reads prompts and completions.

    Args:
      lines: JSON objects.
      name: of the file, for messages.

    Returns:
      Of each pair its line, from 1, and its place among the completions there, from 0; the pairs.

    Raises:
      ValueError: if a line is none; the message names the line and the field.
    """
    places, pairs = [], []
    for number, line in enumerate(lines, 1):
        try:
            prompt, completions = _fields_of(parse_json(line, "it"))
        except ValueError as e:
            raise ValueError(f"{name}: line {number}: {e}") from e
        for index, completion in enumerate(completions):
            places.append((number, index))
            pairs.append((prompt, completion))
    return places, pairs


def _fields_of(value: Any) -> tuple[Any, list[Any]]:
    known = ("prompt", "completion", "completions")
    if not isinstance(value, dict) or "prompt" not in value:
        raise ValueError(
            f'{shown(value)} must be an object such as {{"prompt": "Once upon", "completion": " a '
            'time"}'
        )
    if unknown := [field for field in value if field not in known]:
        raise ValueError(f"unknown field {shown(unknown[0])}; there are {', '.join(known)}")
    if ("completion" in value) == ("completions" in value):
        raise ValueError("it must have either a completion or completions")
    completions = value.get("completions", [value.get("completion")])
    if not isinstance(completions, list) or not completions:
        raise ValueError(f"completions={shown(completions)} must be a list of at least one")
    prompt = checked_prompt(value["prompt"])
    for completion in completions:
        try:
            checked_prompt(completion)
        except ValueError:
            raise ValueError(
                f"completion={shown(completion)} must be text or token ids, not empty"
            ) from None
        if isinstance(completion, str) != isinstance(prompt, str):
            raise ValueError(
                f"prompt={shown(prompt)} and completion={shown(completion)} must both be text, or "
                "both token ids"
            )
    return prompt, completions


if __name__ == "__main__":
    run(main)
