# SPDX-License-Identifier: Apache-2.0
"""Runs steps that were recorded with --record_steps again, without the host's half.

    jpaged generate --model=DIR --prompts_file=prompts.txt --record_steps=steps.jsonl.gz
    python -m jpaged.scripts.measure.replay_steps --model=DIR --steps=steps.jsonl.gz

Pool and steps are as large as those that were recorded, whatever flags say. The same model gives
the same tokens. Steps that the simulator recorded run too, on a model with at least its vocabulary.
Each step is waited for.

`--tokens=FILE` takes one JSON object a step: `samples`, a list of `[request_id, sample_index,
token]`. The last line of standard output is one JSON object: `num_steps`, `num_tokens` (computed),
`num_samples`, `seconds`, of them `compile_seconds` (steps that compiled something, as a whole), and
`num_compilations`.
"""

import contextlib
import dataclasses
import json
import time

import tqdm
from absl import app, flags

from jpaged.device.memory import plan_pool
from jpaged.device.replay import replay
from jpaged.device.runner import ModelRunner
from jpaged.host.batch import ShapeBuckets
from jpaged.host.step_log import read_header, read_steps
from jpaged.pallas_kernels.dispatch import resolve_backend
from jpaged.placement import read_model, runner_of
from jpaged.scripts.flags import (
    define_engine_flags,
    enable_compilation_cache,
    engine_config_from_flags,
    run,
)

_MODEL = flags.DEFINE_string("model", "demo", "Model directory; demo is the shipped checkpoint.")
_STEPS = flags.DEFINE_string("steps", None, "What --record_steps wrote.", required=True)
_TOKENS = flags.DEFINE_string("tokens", None, "File for the tokens of each step.")
define_engine_flags()


def main(argv: list[str]) -> None:
    """Runs the steps and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    enable_compilation_cache()
    try:
        header = read_header(_STEPS.value)
        config = dataclasses.replace(
            engine_config_from_flags(),
            page_size=header.page_size,
            num_pages=header.num_pages,
            max_num_seqs=header.max_num_seqs,
            max_num_batched_tokens=header.max_num_batched_tokens,
            max_model_len=header.max_model_len,
            deterministic=header.deterministic,
            record_steps=None,
            record=None,
        )
        model_config, params, tokenizer, *_ = read_model(_MODEL.value, config)
        backend = resolve_backend(config.backend)
        runner = runner_of(
            config,
            model_config,
            params,
            plan_pool(config, model_config, backend),
            backend=backend,
            num_host_pages=header.num_host_pages,
            tokenizer=tokenizer,
        )
        report = _run(
            runner,
            ShapeBuckets.of(config),
        )
    except (OSError, ValueError) as e:
        raise app.UsageError(str(e)) from e
    print(json.dumps(report))


def _run(runner: ModelRunner, buckets: ShapeBuckets) -> dict[str, float]:
    num_steps = num_tokens = num_samples = 0
    seconds = compile_seconds = 0.0
    out = None if _TOKENS.value is None else open(_TOKENS.value, "w", encoding="utf-8")
    with contextlib.nullcontext() if out is None else out:
        steps = replay(read_steps(_STEPS.value), runner, buckets)
        bar = tqdm.tqdm(unit="step", disable=None)
        while True:
            start, compiled = time.perf_counter(), runner.programs.num_compilations
            found = next(steps, None)
            if found is None:
                break
            took = time.perf_counter() - start
            seconds += took
            compile_seconds += took if runner.programs.num_compilations > compiled else 0.0
            plan, outcome = found
            num_steps += 1
            num_tokens += plan.num_tokens
            num_samples += plan.num_samples
            bar.update()
            if out is not None:
                samples = [
                    (plan.rows.keys[row][0], draw.sample_index, token)
                    for row, draw, token in zip(
                        plan.samples.rows, plan.samples.draws, outcome.tokens, strict=True
                    )
                ]
                out.write(json.dumps({"samples": samples}) + "\n")
        bar.close()
    return {
        "num_steps": num_steps,
        "num_tokens": num_tokens,
        "num_samples": num_samples,
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "num_compilations": runner.programs.num_compilations,
    }


if __name__ == "__main__":
    run(main)
