# SPDX-License-Identifier: Apache-2.0
"""Crowds of greedy, drawn and searched answers of a recorded model, equal to the last bit."""

import json
import pathlib

from jpaged import SamplingParams
from tests.jpaged.exact import everything

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "hf"
CASES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
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
