# SPDX-License-Identifier: Apache-2.0
"""Ten thousand short requests: the last ones cost what the first did, in work and in memory.

Work is counted in calls of Python's functions, which no other program on the machine changes;
seconds are those of `python -m scripts.measure.benchmark_jobs --num_rows=10000`.
"""

import gc
import sys

import numpy as np
import pytest

from jpaged import SamplingParams
from tests.jpaged.tiny import TINY, tiny_engine

NUM_REQUESTS, NUM_SEQS, NUM_WAITING = 10_000, 64, 64
TENTH, COUNTED = NUM_REQUESTS // 10, 400
PARAMS = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)


class Load:
    """Requests of an engine, of which so many wait always; the last have others behind them."""

    def __init__(self, engine):
        self.engine, self.ended = engine, 0
        self._rng = np.random.default_rng(0)
        self._added = 0

    def run(self, until):
        while self.ended < until:
            while self._added < self.ended + NUM_SEQS + NUM_WAITING:
                prompt = self._rng.integers(0, TINY.vocab_size, 9).tolist()
                self.engine.add_request(prompt, PARAMS)
                self._added += 1
            self.ended += len(self.engine.step())


def calls_of(function, *args):
    """How many functions of Python it calls."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.slow
def test_neither_work_nor_memory_grows():
    # Pages for all that run, and as many more for what is kept of those that have ended.
    engine = tiny_engine(
        deterministic=True,
        page_size=4,
        num_pages=1 + 2 * NUM_SEQS * 3,
        max_model_len=12,
        max_num_seqs=NUM_SEQS,
        max_num_batched_tokens=4 * NUM_SEQS,
        prefix_cache=True,
    )
    engine.warm_up()
    load, calls, blocks = Load(engine), [], []
    for tenth in range(1, 11):
        # The first fills the prefix cache.
        if tenth in (2, 10):  # as to count takes long
            calls.append(calls_of(load.run, load.ended + COUNTED))
        load.run(tenth * TENTH)
        gc.collect()
        blocks.append(sys.getallocatedblocks())
    assert calls[1] < 1.02 * calls[0], calls
    # A request that stayed would take several blocks of Python's memory.
    assert blocks[9] - blocks[1] < TENTH, blocks
    for request_id in list(engine._live.by_id):
        engine.abort(request_id)
