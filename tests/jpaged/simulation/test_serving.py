# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from jpaged.host.admission import SchedulerConfig
from jpaged.host.config import EngineConfig
from jpaged.host.groups import GroupKind
from jpaged.simulation.contiguous import ContiguousSimulator
from jpaged.simulation.costs import CostModel
from jpaged.simulation.layers import LayerGroups
from jpaged.simulation.lengths import ALPACA, SHAREGPT
from jpaged.simulation.paged import PagedSimulator
from jpaged.simulation.paper import PAPER
from jpaged.simulation.serving import (
    LAST_VICTIM,
    POLICIES,
    SPARE_PAGES,
    run_scheduler,
    serve,
    simulate,
)
from jpaged.simulation.workload import Item, Workload, make_workload

# (8 + tokens read) / 8 seconds, 0.5 a step and 0.25 a sequence.
SIMPLE = CostModel(
    weight_bytes=8,
    kv_bytes_per_token=1,
    flops_per_token=1,
    memory_bytes_per_s=8,
    flops_per_s=1e9,
    host_s=0.5,
    host_s_per_seq=0.25,
)
BUDGETS = SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=8, max_model_len=16)


def load(lengths, count, rate=math.inf, **options):
    return make_workload(
        count,
        lengths["prompt"],
        lengths["output"],
        max_model_len=2048,
        vocab_size=1000,
        seed=1,
        rate=rate,
        **options,
    )


class TestSimulate:
    def test_by_hand(self):
        # Both requests need the only block of 8 slots, so that one waits for the other.
        items = [Item([1, 2, 3], 2), Item([1, 2, 3, 4], 1)]
        ran = simulate(
            ContiguousSimulator("contiguous-oracle", BUDGETS, 8), items, SIMPLE,
            warm_up=0, drain=True,
        )  # fmt: skip
        steps = 11 / 8 + 0.75, 12 / 8 + 0.75, 12 / 8 + 0.75
        window = steps[0] + steps[1]  # while somebody waits
        live = (3 * steps[0] + 4 * steps[1]) / (8 * window)
        assert ran.memory["live"] == pytest.approx(live)
        assert ran.memory["reserved"] == pytest.approx((2 * steps[0] + steps[1]) / (8 * window))
        assert ran.memory["external"] == pytest.approx(3 / 8)
        assert ran.memory["internal"] == ran.memory["idle"] == 0
        assert ran.live_share == pytest.approx(live)
        assert (ran.mean_running, ran.saturated) == pytest.approx((1, 1))
        assert ran.mean_step_s == pytest.approx(window / 2)
        assert ran.latency_s_per_token == pytest.approx((window / 2 + sum(steps)) / 2)
        # The first has its tokens after a step and two, the second its only one after three.
        first, second = steps[0], sum(steps)
        found = {"p50": (first + second) / 2, "p90": first + 0.9 * (second - first)}
        found["p99"] = first + 0.99 * (second - first)
        assert ran.time_to_first_token_s == pytest.approx(found)
        assert ran.time_per_output_token_s == pytest.approx(dict.fromkeys(found, steps[1]))
        assert ran.simulated_s == pytest.approx(sum(steps))
        assert (ran.preemptions, ran.swapped_pages, ran.requests_per_s) == (0, 0, 0)

    def test_measures_to_the_end_where_nobody_ever_waits(self):
        items = [Item([1, 2, 3], 2), Item([1, 2, 3, 4], 2)]
        ran = simulate(PagedSimulator(BUDGETS, 9, 4), items, SIMPLE, warm_up=0)
        # Two steps for both: 7 tokens, then 9, in 3 pages of 4.
        steps = 15 / 8 + 1, 17 / 8 + 1
        assert ran.simulated_s == pytest.approx(sum(steps))
        assert set(ran.time_per_output_token_s) == {"p50", "p90", "p99"}
        assert ran.mean_running == pytest.approx(2)
        live = (7 * steps[0] + 9 * steps[1]) / (32 * sum(steps))
        assert ran.memory["live"] == pytest.approx(live)

    def test_waits_for_arrivals(self):
        items = [Item([1, 2, 3], 1, arrival_s=10.0), Item([1], 1, arrival_s=100.0)]
        ran = simulate(PagedSimulator(BUDGETS, 9, 4), items, SIMPLE, warm_up=0, drain=True)
        latencies = 11 / 8 + 0.75, 9 / 8 + 0.75
        assert ran.latency_s_per_token == pytest.approx(sum(latencies) / 2)
        assert ran.simulated_s == pytest.approx(100 + latencies[1])
        # From the first arrival to the second, alone: three of 32 cells.
        assert ran.memory["live"] == pytest.approx(3 / 32)
        assert ran.memory["idle"] == pytest.approx(28 / 32)
        assert ran.live_share == pytest.approx(3 / 4)
        assert ran.saturated == 0

    def test_copies_take_time(self):
        slow, fast = (
            simulate(
                PagedSimulator(
                    SchedulerConfig(
                        max_num_batched_tokens=64, max_num_seqs=8, max_model_len=16,
                        prefix_cache=False, preemption="swap", num_host_pages=9,
                    ), 5, 2,
                ),
                [Item([1, 2], 6), Item([3, 4], 6)],
                CostModel(copy_bytes_per_s=speed, copies_per_page=1, copy_start_s=0),
                drain=True,
            )
            for speed in (819_200.0 * 2, 1e30)
        )  # fmt: skip
        # A page of two tokens takes a second.
        assert slow.swapped_pages == fast.swapped_pages > 0
        assert slow.simulated_s - fast.simulated_s == pytest.approx(slow.swapped_pages)


class TestWhatIsComparedWith:
    def test_pages_to_spare_are_left_free_whoever_could_need_them(self):
        # In 32 pages of 4, beside one that will have two pages, of which it has one, 30 more.
        budgets = SchedulerConfig(max_num_batched_tokens=256, max_num_seqs=8, max_model_len=128)
        work = Workload([Item([1] * 4, 2), Item([2] * 120, 1)], 0)
        first = {
            policy: serve(
                policy, work, config=budgets, num_slots=128, page_size=4, costs=SIMPLE, drain=True
            ).time_to_first_token_s["p50"]
            for policy in ("paged", SPARE_PAGES)
        }
        # Both in the first step; or the second when the first has had both its tokens.
        assert first["paged"] == pytest.approx(132 / 8 + 1)
        steps = 12 / 8 + 0.75, 13 / 8 + 0.75, 128 / 8 + 0.75
        assert first[SPARE_PAGES] == pytest.approx((steps[0] + sum(steps)) / 2)

    def test_the_last_request_loses_its_pages_however_long_it_is(self):
        # As in test_victims: with windows a short one loses its pages before the last, a long one.
        layers = LayerGroups(kinds=(GroupKind(None, 1), GroupKind(4, 2)), num_layers=(1, 2))
        budgets = SchedulerConfig(
            max_num_batched_tokens=40, max_num_seqs=8, max_model_len=40, prefix_cache=False
        )
        work = Workload([Item([1] * 12, 25), Item([2] * 2, 25), Item([3] * 19, 18)], 0)
        # All prompts and answers, and with what is lost a token more, of which the next is drawn.
        needed, lost = 33 + 68 + 1, {}
        for policy in ("paged", LAST_VICTIM):
            ran = serve(
                policy, work, config=budgets, num_slots=38, page_size=4, drain=True, layers=layers
            )
            assert ran.preemptions == 1
            share = ran.recomputed_share
            lost[policy] = round(share * needed / (1 - share))
        assert lost == {"paged": 2 + 10, LAST_VICTIM: 19 + 10}  # at the same step


class TestAgainstThePaper:
    """Loads smaller than the report's, hence with wider margins."""

    @pytest.mark.parametrize(("name", "margin"), [("sharegpt", 0.1), ("alpaca", 0.12)])
    def test_requests_at_once(self, name, margin):
        lengths, rate = {"sharegpt": (SHAREGPT, 2.0), "alpaca": (ALPACA, 30.0)}[name]
        work = load(lengths, {"sharegpt": 600, "alpaca": 2500}[name], rate)
        for policy in POLICIES:
            ran = serve(policy, work)
            printed = PAPER["running"][name][policy]
            assert abs(ran.mean_running / printed - 1) < margin, policy
            if name == "sharegpt":
                assert abs(ran.live_share - PAPER["live"][policy]) < 0.05, policy

    def test_sharing_grows_with_samples_and_prompts(self):
        saved = {
            (name, n): serve("paged", load(lengths, count, num_samples=n)).saving
            for name, lengths, count in (("alpaca", ALPACA, 600), ("sharegpt", SHAREGPT, 120))
            for n in (1, 2, 6)
        }
        for name, printed in PAPER["sampling"].items():
            assert saved[name, 1] == 0
            assert 0 < saved[name, 2] < saved[name, 6]
            assert abs(saved[name, 2] - printed["2"]) < 0.03
        assert saved["sharegpt", 2] > saved["alpaca", 2]


class TestRunScheduler:
    def _run_sharegpt(self, reservation):
        config = EngineConfig(max_model_len=2048, num_pages=1 + 8 * 128, reservation=reservation)
        prompt, output = SHAREGPT["prompt"], SHAREGPT["output"]
        work = make_workload(200, prompt, output, max_model_len=2048, vocab_size=100, seed=0)
        stats, trace = run_scheduler(config, work)
        assert stats.num_used_pages == 0
        assert stats.totals.num_generated_tokens == work.num_output_tokens
        return stats, trace

    def test_pages_are_nearly_full_and_more_requests_run_than_with_reservation(self):
        paged, paged_trace = self._run_sharegpt("paged")
        reserved, _ = self._run_sharegpt("max")
        assert paged.mean_utilisation > 0.96
        assert paged_trace.least_utilisation() > 0.9
        assert reserved.totals.peak_running == 8  # all that the pool holds
        assert paged.totals.peak_running >= 2 * reserved.totals.peak_running
        assert paged.mean_running >= 2 * reserved.mean_running
        assert reserved.mean_utilisation < 0.5
        assert reserved.totals.num_preemptions == 0

    def test_a_page_for_every_token_is_always_full(self):
        config = SchedulerConfig(max_num_batched_tokens=8, max_num_seqs=2, max_model_len=16)
        host = PagedSimulator(config, 33, 1)
        host.add(Item([1, 2, 3], 4))
        steps = 0
        while host.has_unfinished_requests:
            host.step()
            steps += 1
        stats = host.stats()
        assert stats.mean_utilisation == 1.0
        # One step of prefill, three of decode, and the reading of the last.
        assert (stats.totals.num_steps, steps) == (4, 5)
        assert (stats.totals.num_prefill_tokens, stats.totals.num_generated_tokens) == (3, 4)

    def test_what_never_fits_is_refused(self):
        config = SchedulerConfig(max_num_batched_tokens=8, max_num_seqs=2, max_model_len=64)
        with pytest.raises(ValueError, match="pages"):
            PagedSimulator(config, 3, 16).add(Item([1] * 30, 20))
