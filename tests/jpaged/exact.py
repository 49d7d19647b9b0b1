# SPDX-License-Identifier: Apache-2.0
"""Engines whose outputs are equal to the last bit, and what is asked of them."""

from jpaged import SamplingParams
from tests.jpaged.tiny import prompts_of

# One shape of step, so that log-probabilities are equal to the last bit.
EXACT = dict(deterministic=True, page_size=8, max_num_batched_tokens=32, max_num_seqs=8)


def drawn(seed=1, **params):
    return SamplingParams(**(dict(max_tokens=12, temperature=1.2, seed=seed, logprobs=2) | params))


def everything(outputs):
    """All that a caller sees but times."""
    return [[(c.token_ids, c.logprobs, c.finish_reason) for c in o.outputs] for o in outputs]


def run_steps(engine, check=lambda: None):
    """Steps to the end; returns the finished outputs by request id."""
    done = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        engine.check_invariants()
        check()
    return done


def with_prefix(lengths, prefix=40):
    (head,) = prompts_of([prefix], seed=9)
    return [head + tail for tail in prompts_of(lengths)]
