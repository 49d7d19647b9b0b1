# SPDX-License-Identifier: Apache-2.0
"""Every family in a pool so small that sequences are preempted, under beams, samples and forks.

Windows, where a model has them, cross pages. Beside a roomy pool, and transformers.
"""

import functools
import json

import pytest

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.models.cache_groups import cache_groups
from jpaged.models.config_json import config_from_hf
from tests.jpaged.crowd import CASES, EXACT, FIXTURES, serve

NIGHTLY = (pytest.mark.nightly, pytest.mark.slow)
# A mixture of experts with sinks and windows, which no other test has a crowd of.
ALWAYS = ("gpt_oss_sinks", "swap")
PREEMPTION = {"recompute": "num_preemptions", "swap": "num_swapped_pages"}


def engine_of(case, pages_a_group, **options):
    """An engine whose pool has so many pages for each of its groups."""
    config = config_from_hf(json.loads((FIXTURES / case / "config.json").read_text()))
    num_pages = 1 + pages_a_group * cache_groups(config, EXACT["max_model_len"]).num_groups
    return Engine.load(FIXTURES / case, EngineConfig(**EXACT, num_pages=num_pages, **options))


@functools.cache
def roomy(case):
    """The answers of an engine that has pages enough."""
    engine = engine_of(case, 300)
    outputs = serve(engine, case)
    assert engine.stats().totals.num_preemptions == 0
    return outputs


def fork_while_it_runs(engine, case):
    """Adds recorded prompts and forks each again and again; all that came of each prompt."""
    prompts = json.loads((FIXTURES / case / "expected.json").read_text())["prompts"]
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    parents = {engine.add_request(prompt, params): i for i, prompt in enumerate(prompts)}
    prompt_of, found = dict(parents), [[] for _ in prompts]
    num_steps = 0
    while engine.has_unfinished_requests:
        for output in engine.step():
            found[prompt_of[output.request_id]].append(output.outputs[0].token_ids)
            parents.pop(output.request_id, None)
        engine.check_invariants()
        num_steps += 1
        # One of those that live a step, at any point of it, up to three of a prompt.
        for parent, number in list(parents.items()):
            if (num_steps + number) % 9 == 0 and list(prompt_of.values()).count(number) < 4:
                (fork,) = engine.fork(parent)
                prompt_of[fork] = number
    return found


@pytest.mark.parametrize(
    ("case", "preemption"),
    [
        (case, kind) if (case, kind) == ALWAYS else pytest.param(case, kind, marks=NIGHTLY)
        for case in CASES
        for kind in PREEMPTION
    ],
)
def test_a_crowd_in_a_tight_pool(case, preemption):
    tight = engine_of(case, 20, preemption=preemption)
    assert serve(tight, case) == roomy(case)
    totals = tight.stats().totals
    assert totals.num_page_copies > 0 and getattr(totals, PREEMPTION[preemption]) > 0, totals
    tight.reset_stats()
    found = fork_while_it_runs(tight, case)
    want = json.loads((FIXTURES / case / "expected.json").read_text())["continuations"]
    assert sum(map(len, found)) > 2 * len(want)
    assert found == [[tokens] * len(each) for tokens, each in zip(want, found, strict=True)]
    totals = tight.stats().totals
    assert totals.num_page_copies > 0 and getattr(totals, PREEMPTION[preemption]) > 0, totals
