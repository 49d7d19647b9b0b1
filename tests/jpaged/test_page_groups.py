# SPDX-License-Identifier: Apache-2.0
"""Groups of layers with pages of their own change what memory is needed, and no output.

Engines beside others that have one table for all layers.
"""

import json
import pathlib

import pytest

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.device import memory
from jpaged.models.cache_groups import one_group
from tests.jpaged.exact import everything

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "hf"
# Layers that see everything and layers that see 5 tokens; all see 11; one sees everything, four 6.
# Groups, and pages that hold the widest search and little more.
CASES = {
    "gemma3_two_ropes": (5, 100),
    "mistral_window": (1, 20),
    "ministral_some_windows": (5, 100),
}
EXACT = dict(
    max_model_len=96, page_size=4, max_num_batched_tokens=20, max_num_seqs=12, deterministic=True,
    scan_layers=True,
)  # fmt: skip
GREEDY = SamplingParams(max_tokens=20, temperature=0, logprobs=2, ignore_eos=True)
BEAMS = SamplingParams(max_tokens=14, beam_width=3, n=3, ignore_eos=True)


def drawn(seed, **options):
    options = dict(max_tokens=16, temperature=1.3, seed=seed, logprobs=2, ignore_eos=True) | options
    return SamplingParams(**options)


def prompts_of(case):
    prompts = json.loads((FIXTURES / case / "expected.json").read_text())["prompts"]
    start = max(prompts, key=len)
    # Some that begin alike, longer than any window.
    return [*prompts, *([*start[:end], 7, 8, 9 + end] for end in (13, 22, 30))]


def serve(engine, case):
    """What comes of a crowd of greedy, drawn and searched answers, and of the same again."""
    prompts = prompts_of(case)
    params = [
        BEAMS if i % 4 == 3 else drawn(i, n=3) if i % 4 == 1 else drawn(i) if i % 4 else GREEDY
        for i in range(len(prompts))
    ]
    outputs = everything(engine.generate(prompts, params))
    engine.check_invariants()
    return outputs


@pytest.fixture(scope="module")
def one_table():
    """The answers of engines with one table for all layers, and pages enough."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "cache_groups", lambda config: one_group(config.num_layers))
        for case in CASES:
            engine = Engine.load(FIXTURES / case, EngineConfig(**EXACT, num_pages=400))
            assert engine.stats().num_groups == 1
            found[case] = serve(engine, case)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("options", "happens"),
    [
        ({}, ("num_hit_tokens", "num_page_copies")),
        ({"prefix_cache": False, "preemption": "recompute"}, ("num_preemptions",)),
        ({"preemption": "recompute"}, ("num_preemptions", "num_hit_tokens")),
        ({"preemption": "swap"}, ("num_swapped_pages",)),
    ],
    ids=["roomy", "tight, no cache", "tight", "tight, swapping"],
)
def test_no_output_changes(case, options, happens, one_table):
    num_groups, tight = CASES[case]
    num_pages = 1 + (tight if options else 300 * num_groups)
    engine = Engine.load(FIXTURES / case, EngineConfig(**EXACT, num_pages=num_pages, **options))
    assert engine.stats().num_groups == num_groups
    assert serve(engine, case) == one_table[case]
    if case == "mistral_window" and not options:
        # Once more, with pages that are known: of the window alone.
        hits = engine.stats().totals.num_hit_tokens
        assert serve(engine, case) == one_table[case]
        assert engine.stats().totals.num_hit_tokens > 2 * hits
    totals = engine.stats().totals
    assert all(getattr(totals, name) > 0 for name in happens), totals
