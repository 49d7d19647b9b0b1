# SPDX-License-Identifier: Apache-2.0
"""Real SIGINTs at random moments, in bursts too, on an engine that everybody uses at once.

    python -m tests.jpaged.interrupts COUNT SEED

A program of its own: it needs the main thread, and a handler that only interrupts what is meant to
be interrupted. After each interrupt every consumer must have been told the truth about its own
requests, once, and the engine must serve: right tokens, books that balance. Ends with code 0 and a
line of figures, or with a traceback.
"""

import collections
import os
import random
import signal
import sys
import threading
import time

import jax

from jpaged import SamplingParams
from jpaged.host.outputs import GenerationInterrupted
from tests.jpaged.exact import EXACT
from tests.jpaged.tiny import prompts_of, tiny_engine

PROMPTS = prompts_of([5, 17, 30])
PARAMS = [SamplingParams(max_tokens=24, temperature=1.1, seed=seed, n=2) for seed in range(3)]


class Interrupts:
    """SIGINT for this process from another thread, after a while; `armed` lets it through."""

    def __init__(self):
        self.armed = False
        self.num_sent = self.num_raised = 0
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, *_):
        if self.armed:
            self.num_raised += 1
            raise KeyboardInterrupt

    def after(self, seconds):
        """One or several, close together, the first after some seconds."""

        def send():
            time.sleep(seconds)
            for _ in range(random.choice([1, 1, 1, 2, 3])):
                self.num_sent += 1
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(random.choice([0, 1e-5, 1e-4, 1e-3]))

        thread = threading.Thread(target=send)
        thread.start()
        return thread


def texts(output):
    return [completion.token_ids for completion in output.outputs]


def use(engine, want, seen, mine):
    """All doors at once. `seen`: last outputs by request id; `mine`: those given to the engine."""
    for index, prompt in enumerate(PROMPTS):
        request_id = f"mine-{index}"
        mine[request_id] = index
        engine.add_request(prompt, PARAMS[index], request_id, stream=index == 1)
    with engine.stream(PROMPTS[0], PARAMS[0]) as stream, engine.stream(PROMPTS[1], PARAMS[1]):
        next(stream)
        for output in engine.step():
            seen[output.request_id].append(output)
        single = SamplingParams(max_tokens=30, temperature=1.1, seed=5)
        parent = engine.add_request(PROMPTS[2], single, "parent")
        while engine._live.by_id["parent"].sequences[0].num_known_tokens < 33:
            for output in engine.step():
                seen[output.request_id].append(output)
        engine.abort(engine.fork(parent, 2)[0])
        outputs = engine.generate(PROMPTS, PARAMS)
        assert [texts(output) for output in outputs] == want
        engine.abort("parent")
        *_, last = stream
        assert texts(last) == want[0]


def check(engine, want, seen, mine):
    """After an interrupt: everybody is told, and then the engine does what it should."""
    while engine.has_unfinished_requests:
        for output in engine.step():
            seen[output.request_id].append(output)
    for request_id, index in mine.items():
        reports = seen[request_id]
        if not reports:  # its own add_request was interrupted, before or after it was queued
            continue
        assert [report.finished for report in reports].count(True) == 1, request_id
        assert reports[-1].finished
        for tokens, whole in zip(texts(reports[-1]), want[index], strict=False):
            assert tokens == whole[: len(tokens)]
    engine.check_invariants()
    outputs = engine.generate(PROMPTS, PARAMS)
    assert [texts(output) for output in outputs] == want
    assert not engine.has_unfinished_requests
    engine.check_invariants()


def main(count, seed):
    random.seed(seed)
    interrupts = Interrupts()
    engine = tiny_engine(**EXACT, num_pages=24, preemption="swap")
    engine.warm_up()
    want = [texts(output) for output in engine.generate(PROMPTS, PARAMS)]
    start = time.perf_counter()
    use(engine, want, collections.defaultdict(list), {})
    whole_s = time.perf_counter() - start
    engine.step()
    num_hit = num_runs = num_kept = 0
    while interrupts.num_raised < count:
        num_runs += 1
        seen, mine = collections.defaultdict(list), {}
        thread = interrupts.after(random.uniform(0, 1.05 * whole_s))
        raised = interrupts.num_raised
        try:
            interrupts.armed = True
            use(engine, want, seen, mine)
        except GenerationInterrupted as e:
            interrupts.armed = False
            num_kept += len(e.outputs)
            for output, whole in zip(e.outputs, want, strict=True):
                for tokens, right in zip(texts(output), whole, strict=False):
                    assert tokens == right[: len(tokens)]
        except KeyboardInterrupt:
            pass
        # A late one of a burst may still come while the engine repairs itself.
        try:
            for _ in range(3):
                engine.stats()
        except KeyboardInterrupt:
            pass
        interrupts.armed = False
        thread.join()
        num_hit += interrupts.num_raised > raised
        if interrupts.num_raised > raised:
            check(engine, want, seen, mine)
        else:
            while engine.has_unfinished_requests:
                engine.step()
    print(
        f"{interrupts.num_raised} interrupts in {num_hit} of {num_runs} runs of {whole_s:.3f} s, "
        f"{num_kept} outputs of interrupted generations; {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(int(sys.argv[1]), int(sys.argv[2]))
