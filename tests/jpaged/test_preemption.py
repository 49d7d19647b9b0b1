# SPDX-License-Identifier: Apache-2.0
"""Requests that are preempted or interrupted come to the same end."""

import dataclasses
import logging
import pkgutil

import pytest

from jpaged import SamplingParams
from jpaged.host.outputs import GenerationInterrupted
from jpaged.models.decoder import Decoder
from tests.jpaged.exact import EXACT, drawn, everything, run_steps, with_prefix
from tests.jpaged.tiny import TINY, prompts_of, tiny_engine

MODES = [
    dict(preemption="recompute"),
    dict(preemption="swap"),
    dict(preemption="swap", swap_bytes=20_000),
    dict(preemption="auto", swap_bytes_per_s=1e12, flops_per_s=1e9),
    dict(preemption="auto", swap_bytes_per_s=1e3, flops_per_s=1e12),
    dict(preemption="swap", prefix_cache=False),
    dict(preemption="recompute", prefix_cache=False),
]


CROWD_PROMPTS = with_prefix([1, 9, 30, 14, 20, 5, 11], prefix=12)
CROWD = (
    [drawn(seed, max_tokens=20) for seed in range(4)]
    + [drawn(5, n=3, max_tokens=20)]
    + [SamplingParams(max_tokens=16, beam_width=3, n=3, logprobs=2)] * 2
)


@pytest.fixture(scope="module")
def roomy():
    """What the crowd gets where there are pages for all."""
    return everything(tiny_engine(**EXACT).generate(CROWD_PROMPTS, CROWD))


class TestPreemption:
    @pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
    def test_outputs_are_the_same_in_every_mode(self, mode, roomy):
        engine = tiny_engine(**EXACT, num_pages=16, **mode)
        ids = [
            engine.add_request(prompt, params)
            for prompt, params in zip(CROWD_PROMPTS, CROWD, strict=True)
        ]
        done = run_steps(engine)
        assert everything([done[i] for i in ids]) == roomy
        totals = engine.stats().totals
        assert totals.num_preemptions > 0
        swaps = mode["preemption"] == "swap" or mode.get("swap_bytes_per_s") == 1e12
        assert (totals.num_swapped_pages > 0) == swaps

    def test_any_order_of_arrival(self, roomy):
        for order in ([6, 5, 4, 3, 2, 1, 0], [4, 0, 6, 2, 5, 1, 3]):
            engine = tiny_engine(**EXACT, num_pages=16, preemption="swap")
            outputs = engine.generate([CROWD_PROMPTS[i] for i in order], [CROWD[i] for i in order])
            assert everything(outputs) == [roomy[i] for i in order]

    @pytest.mark.parametrize("mode", MODES[:2], ids=["recompute", "swap"])
    @pytest.mark.parametrize(
        "priorities", [[6, 5, 4, 3, 2, 1, 0], [0, 1, 0, -1, 1, 0, -1]], ids=str
    )
    def test_any_priorities(self, mode, priorities, roomy):
        engine = tiny_engine(**EXACT, num_pages=16, **mode)
        crowd = [
            dataclasses.replace(params, priority=priority)
            for params, priority in zip(CROWD, priorities, strict=True)
        ]
        ended = []
        outputs = engine.generate(
            CROWD_PROMPTS, crowd, on_output=lambda index, _: ended.append(priorities[index])
        )
        assert everything(outputs) == roomy
        assert engine.stats().totals.num_preemptions > 0
        # Nobody is last who would be first.
        assert ended[-1] == max(priorities) and ended[0] == min(priorities)

    def test_each_preemption_says_who_why_which_way_and_what_it_costs(self, caplog):
        engine = tiny_engine(
            **EXACT, num_pages=10, preemption="auto", swap_bytes_per_s=1e9, flops_per_s=1e9
        )
        with caplog.at_level(logging.INFO, logger="jpaged.host.scheduler"):
            engine.generate(prompts_of([30, 30]), drawn(max_tokens=30))
        lines = [r.getMessage() for r in caplog.records if "preempted" in r.getMessage()]
        # A page: 2 layers, 2 heads, 8 slots, 32 lanes of 4 bytes, there and back.
        swap_ms = 4 * 2 * 2 * 2 * 8 * 32 * 4 / 1e9 * 1e3
        token_ms = 2 * Decoder(TINY).num_params / 1e9 * 1e3
        assert lines == [
            "preempted request '1' (sequence 0), as request '1' needs pages: 4 pages swapped to "
            f"host memory (32 tokens; swapping costs {swap_ms:.1f} ms, computing "
            f"{32 * token_ms:.1f} ms)"
        ]

    def test_samples_of_a_request_share_again_after_they_come_back(self):
        for preemption in ("swap", "recompute"):
            engine = tiny_engine(**EXACT, num_pages=17, preemption=preemption)
            first = engine.add_request(prompts_of([30])[0], drawn(max_tokens=60))
            engine.add_request(prompts_of([40])[0], drawn(n=4, max_tokens=20))
            while not engine.stats().totals.num_preemptions:
                engine.step()
            assert engine.stats().totals.num_preemptions == 4
            engine.abort(first)
            shared = 0

            def look(engine=engine):
                nonlocal shared
                shared = max(shared, engine.stats().num_shared_pages)

            run_steps(engine, look)
            assert shared >= 40 // 8


class TestInterrupts:
    """Whatever a step was doing, the engine is as new after it."""

    @pytest.mark.parametrize(
        "where",
        [
            "jpaged.host.page_table.PageTable.append",
            "jpaged.host.page_table.PageTable.free",
            "jpaged.host.prefix_cache.PrefixCache.address_pages",
            "jpaged.host.scheduler.Scheduler.finish",
            "jpaged.host.scheduler.Scheduler.continue_from",
            "jpaged.host.swap.SwapSpace.swap_out",
        ],
    )
    def test_in_the_middle_of_the_books(self, where, monkeypatch, roomy):
        engine = tiny_engine(**EXACT, num_pages=16, preemption="swap")
        module, _, name = where.rpartition(".")
        owner = pkgutil.resolve_name(module)
        function = getattr(owner, name)
        calls = 0

        def interrupted(*args, **options):
            nonlocal calls
            calls += 1
            result = function(*args, **options)
            if calls == 3:
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(GenerationInterrupted) as interrupt:
                engine.generate(CROWD_PROMPTS, CROWD)
        assert len(interrupt.value.outputs) == len(CROWD)
        assert not engine.has_unfinished_requests
        engine.check_invariants()
        assert everything(engine.generate(CROWD_PROMPTS, CROWD)) == roomy

    def test_a_callback_may_abort_or_fail(self):
        engine = tiny_engine()
        (output,) = engine.generate(
            [[1, 2]],
            drawn(max_tokens=50),
            on_step=lambda: [*map(engine.abort, [*engine._live.by_id])],
        )
        assert output.outputs[0].finish_reason == "abort"
        with pytest.raises(ZeroDivisionError):
            engine.generate([[1, 2]], drawn(), on_step=lambda: 1 / 0)
        assert not engine.has_unfinished_requests
        engine.generate([[1, 2]], drawn())
