# SPDX-License-Identifier: Apache-2.0
"""A job before it runs: its requests, the steps that it will have, and how those are compiled."""

import itertools
from collections.abc import Sequence
from typing import Any

import tokenizers
import tqdm

from jpaged.defaults import model_defaults
from jpaged.device.compile_threads import CompileThreads
from jpaged.device.costs import scheduler_config_of
from jpaged.device.memory import PoolPlan
from jpaged.host.batch import ShapeBuckets, StepShape
from jpaged.host.compile_plan import CompilePlan
from jpaged.host.config import EngineConfig
from jpaged.host.params import SamplingParams
from jpaged.placement import ModelFiles, unread_pool_of
from jpaged.requests import RequestMaker
from jpaged.scripts.prompts import parse_token_ids
from jpaged.simulation import Item, LayerGroups, PagedSimulator
from jpaged.simulation.job_steps import job_steps
from jpaged.text import encode

# Of the beginning of a job, which is looked at for what to compile first.
_FIRST_STEPS = 64
_FIRST_SHAPES = 3


def encoded(
    prompts: Sequence[Any], tokenizer: tokenizers.Tokenizer | None, *, rendered: bool
) -> list[str] | list[list[int]]:
    """The prompts as an engine is given them.

    Args:
      prompts: texts; token ids, as text or not, for a model without a tokenizer.
      tokenizer: the model's.
      rendered: whether they have the special tokens that a chat template wrote, and get no others.
    """
    if tokenizer is None:
        return [parse_token_ids(p) if isinstance(p, str) else p for p in prompts]
    if not rendered:
        return list(prompts)
    return [encode(tokenizer, prompt, add_special_tokens=False) for prompt in prompts]


def simulator_of(config: EngineConfig, files: ModelFiles, pool: PoolPlan) -> PagedSimulator:
    """What schedules as an engine of these settings will."""
    layers = LayerGroups(kinds=pool.kinds, num_layers=(1,) * len(pool.kinds))
    budgets = scheduler_config_of(config, files.config, pool)
    return PagedSimulator(budgets, pool.num_pages, config.page_size, layers=layers)


def items_of(
    prompts: Sequence[Any],
    params: Sequence[SamplingParams],
    config: EngineConfig,
    files: ModelFiles,
    pool: PoolPlan,
) -> list[Item]:
    """The requests of a job, as they will be; their answers as long as they may be.

    Raises:
      ValueError: naming the prompt that cannot be served.
    """
    simulator = simulator_of(config, files, pool)
    defaults = model_defaults(files.generation_config, files.config.vocab_size)
    maker = RequestMaker(
        files.config, files.tokenizer, simulator.scheduler.config, simulator.table, defaults
    )
    requests = maker.make_all(prompts, params, map(str, itertools.count()))
    return [
        Item(
            request.prompt_token_ids,
            request.max_total_tokens - len(request.prompt_token_ids),
            request.params.beam_width or request.params.num_samples,
        )
        for request in requests
    ]


def plan_of(
    prompts: Sequence[Any],
    params: Sequence[SamplingParams],
    config: EngineConfig,
    files: ModelFiles,
) -> CompilePlan:
    """Every step shape of a job.

    Raises:
      ValueError: naming the prompt that cannot be served.
    """
    pool = unread_pool_of(config, files.config)
    items = items_of(prompts, params, config, files, pool)
    steps = job_steps(simulator_of(config, files, pool), items, progress=True)
    return CompilePlan.of(ShapeBuckets.of(config), steps)


def first_shapes(
    prompts: Sequence[Any],
    params: Sequence[SamplingParams],
    config: EngineConfig,
    files: ModelFiles,
) -> list[StepShape]:
    """The shapes of the steps that a job begins with, the first one first.

    Raises:
      ValueError: naming the prompt that cannot be served, of all that there are.
    """
    pool = unread_pool_of(config, files.config)
    items = items_of(prompts, params, config, files, pool)[: 2 * config.max_num_seqs]
    steps = job_steps(simulator_of(config, files, pool), items, most_steps=_FIRST_STEPS)
    buckets = ShapeBuckets.of(config)
    shapes = dict.fromkeys(buckets.shape(*size, 0) for size in steps.sizes)
    return list(shapes)[:_FIRST_SHAPES]


def wait_for_all(threads: CompileThreads, shapes: Sequence[StepShape]) -> dict[StepShape, float]:
    """Waits until shapes are compiled, with a progress bar.

    Returns:
      Seconds that each took.

    Raises:
      ValueError: naming the shape that does not compile.
    """
    with tqdm.tqdm(shapes, desc="compiling", unit="shape", disable=None) as bar:
        for shape in bar:
            bar.set_postfix_str(str(shape))
            try:
                threads.wait(shape)
            except Exception as e:
                threads.close()
                lines = str(e).splitlines() or [type(e).__name__]
                raise ValueError(f"a step of {shape} does not compile: {lines[0]}") from e
    return threads.seconds()
