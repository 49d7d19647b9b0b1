# SPDX-License-Identifier: Apache-2.0
"""Compiles what a job will run, before it runs, and says what that takes.

    jpaged warmup --model=DIR --prompts_file=prompts.txt --max_tokens=64
    jpaged warmup --model=DIR --num_requests=500 --prompt_len=sharegpt --output_len=sharegpt
    jpaged warmup --model=DIR --prompts_file=prompts.jsonl --max_padding=0.1
    jpaged warmup --model=DIR --chat --prompts_file=conversations.jsonl
    jpaged warmup --model=DIR

The programs go to the compilation cache, where the next engine of the same settings, sampling
flags, jax and kind of device finds them; the weights are not read. Of a job, the prompts themselves
or how long they are, it compiles the step shapes that it can have, and prints how many steps will
have each if every answer is as long as it may be, and the padding; without one it compiles every
shape of the engine. --max_padding chooses few shapes for the job, and prints the flag with which
`jpaged generate` has them. --dry_run compiles nothing.

The table goes to standard output, everything else to standard error. Exits with 2 for bad usage,
or if something does not compile.
"""

import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from jpaged.defaults import model_defaults
from jpaged.device.ahead import AheadCompiler
from jpaged.device.compilation_cache import keep_programs
from jpaged.device.compile_threads import CompileThreads
from jpaged.device.memory import PoolPlan
from jpaged.host.batch import ShapeBuckets
from jpaged.host.compile_plan import CompilePlan, JobSteps, StepSize, fewest_shapes
from jpaged.host.config import EngineConfig
from jpaged.host.params import SamplingParams
from jpaged.jobs.settings import with_fallbacks
from jpaged.models.sources import opened
from jpaged.placement import ModelFiles, compiler_of, wanted_programs
from jpaged.scripts.conversations import (
    chat_options_from_flags,
    chat_template_of,
    define_chat_flags,
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
from jpaged.scripts.job import encoded, items_of, simulator_of, wait_for_all
from jpaged.scripts.json_prompts import read_json_prompts
from jpaged.scripts.prompts import read_prompts
from jpaged.scripts.sampling_flags import (
    define_sampling_flags,
    sampling_params_from_flags,
)
from jpaged.simulation import Item, make_workload, parse_lengths
from jpaged.simulation.job_steps import job_steps
from jpaged.simulation.lengths import SPEC_HELP

_MODEL = flags.DEFINE_string("model", None, "The model, as of `jpaged generate`.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt of the job; may be repeated.")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "The prompts of the job, as of `jpaged generate`."
)
_NUM_REQUESTS = flags.DEFINE_integer(
    "num_requests", None, "Requests of the job, of which lengths alone are known.", lower_bound=1
)
_PROMPT_LEN = flags.DEFINE_string("prompt_len", "128", f"Tokens of their prompts: {SPEC_HELP}.")
_OUTPUT_LEN = flags.DEFINE_string("output_len", "128", f"Tokens of their answers: {SPEC_HELP}.")
_MAX_PADDING = flags.DEFINE_float(
    "max_padding",
    None,
    "Choose few shapes for the job, that together add padding of at most this share of what the "
    "device computes; such as 0.1.",
    lower_bound=0.0,
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Plan, and compile nothing.")
_CHAT = flags.DEFINE_bool("chat", False, "Each prompt is a conversation, as of `jpaged generate`.")
define_sampling_flags()
define_chat_flags()
define_engine_flags()


def main(argv: list[str]) -> None:
    """Plans, compiles and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not _MODEL.value:
        raise app.UsageError("--model is missing; name a directory, or a model of a hub")
    log_to_stderr()
    with usage_errors():
        config, own = engine_config_from_flags(), sampling_params_from_flags()
        options = chat_options_from_flags()
        if options and not _CHAT.value:
            raise ValueError(f"--{next(iter(options))} is for conversations; give --chat too")
        prompts, params = _read_job(own)
        cache = keep_programs(config.compilation_cache_dir)
        require_device()
        model = opened(model_path(_MODEL.value))
        if _CHAT.value:
            chat_template_of(model)  # which says what the model lacks to be talked to
        files = ModelFiles.of(model, config)
        defaults = model_defaults(files.generation_config, files.config.vocab_size)
        params = [with_fallbacks(each, defaults) for each in params]
        compiler, pool = compiler_of(config, files.config)
        if _CHAT.value:
            prompts = render_conversations(prompts, files.chat_template, options)
        prompts = encoded(prompts, files.tokenizer, rendered=_CHAT.value)
        items = _items(prompts, params, config, files, pool)
        buckets = ShapeBuckets.of(config)
        job = JobSteps(StepSize(config.max_num_batched_tokens, config.max_num_seqs))
        if items:
            job = job_steps(simulator_of(config, files, pool), items, progress=True)
        if _MAX_PADDING.value is not None:
            buckets = fewest_shapes(buckets, job, _MAX_PADDING.value)
        plan = CompilePlan.of(buckets, job)
        if not _DRY_RUN.value:
            plan = _compile(plan, buckets, compiler, config, files, pool, params)
    print("\n".join(plan.table()), flush=True)
    _say(plan, config, pool, cache)


def _read_job(params: SamplingParams) -> tuple[list[Any], list[SamplingParams]]:
    """The prompts that the flags name, none where they name none, and the parameters of each."""
    path = _PROMPTS_FILE.value
    if not _PROMPT.value and path is None:
        if _CHAT.value:
            raise ValueError("--chat is for prompts: give --prompts_file or --prompt")
        if _MAX_PADDING.value is not None and _NUM_REQUESTS.value is None:
            raise ValueError(
                "--max_padding chooses shapes for a job: give --prompts_file, --prompt or "
                "--num_requests"
            )
        return [], [params]
    if _NUM_REQUESTS.value is not None:
        raise ValueError("--num_requests and prompts exclude each other; give one of them")
    lines = read_prompts(_PROMPT.value, path)
    if _CHAT.value:
        conversations = read_conversations(lines, params)
        return [given for given, _ in conversations], [own for _, own in conversations]
    if path is None or not path.endswith(".jsonl"):
        return list(lines), [params] * len(lines)
    given = read_json_prompts(lines, path, params)
    return [prompt for prompt, _ in given], [own for _, own in given]


def _items(
    prompts: Sequence[Any],
    params: Sequence[SamplingParams],
    config: EngineConfig,
    files: ModelFiles,
    pool: PoolPlan,
) -> list[Item]:
    """The requests of the job, as they will be; their answers as long as they may be."""
    if not prompts:
        if _NUM_REQUESTS.value is None:
            return []
        return make_workload(
            _NUM_REQUESTS.value,
            parse_lengths(_PROMPT_LEN.value, "prompt"),
            parse_lengths(_OUTPUT_LEN.value, "output"),
            max_model_len=pool.max_model_len,
            vocab_size=files.config.vocab_size,
            seed=0,
            num_samples=params[0].num_samples,
        ).items
    return items_of(prompts, params, config, files, pool)


def _compile(
    plan: CompilePlan,
    buckets: ShapeBuckets,
    compiler: AheadCompiler,
    config: EngineConfig,
    files: ModelFiles,
    pool: PoolPlan,
    params: Sequence[SamplingParams],
) -> CompilePlan:
    """Compiles the plan's shapes, and what else steps call; returns it with the seconds."""
    shapes = [each.shape for each in plan.shapes]
    wanted = wanted_programs(buckets, files, pool, shapes, params)
    threads = CompileThreads(compiler.programs, pool, files.config, wanted, lambda: compiler)
    plan = plan.timed(wait_for_all(threads, shapes))
    try:
        compiler.compile_rest(swaps=pool.num_host_pages(config) > 0)
    except Exception as e:
        lines = str(e).splitlines() or [type(e).__name__]
        raise ValueError(f"what copies pages does not compile: {lines[0]}") from e
    return plan


def _say(plan: CompilePlan, config: EngineConfig, pool: PoolPlan, cache: str | None) -> None:
    lines = [f"page pool: {pool}"]
    if _DRY_RUN.value:
        lines.append("compiled nothing (--dry_run)")
    elif cache is None:
        lines.append("the programs are not kept: no compilation cache (--compilation_cache_dir)")
    else:
        lines.append(f"the programs are in {cache}")
    own = []
    if config.num_pages is None and "need no more" not in pool.reason:
        # Sized by what is free now: with another number of pages other programs are needed.
        own.append(f"--num_pages={pool.num_pages}")
    if _MAX_PADDING.value is not None:
        own.append("--step_shapes=" + ",".join(str(each.shape) for each in plan.shapes))
    if own:
        lines.append(f"run the job with the same settings and {' '.join(own)}")
    print("\n".join(lines), file=sys.stderr)


if __name__ == "__main__":
    run(main)
