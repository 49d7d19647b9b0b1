# SPDX-License-Identifier: Apache-2.0
"""scripts/simulate.py, what it measures, and the report that it wrote."""

import json
import math
import os
import pathlib
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest

from jpaged.host.admission import SchedulerConfig
from jpaged.scripts.simulate import PAPER, fill, serve
from jpaged.simulation.simulator import ContiguousSimulator, CostModel, Item, PagedSimulator
from jpaged.simulation.workload import (
    ALPACA,
    SHAREGPT,
    Serving,
    Uniform,
    make_workload,
    parse_lengths,
    simulate,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
REPORT = ROOT / "docs" / "paper_figures.md"
SOURCE = ROOT / "docs" / "paper_figures"
FIGURES = json.loads((SOURCE / "figures.json").read_text(encoding="utf-8"))
POLICIES = ("contiguous-max", "contiguous-pow2", "contiguous-oracle", "paged")
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


class TestArrivals:
    def test_come_at_the_rate_and_do_not_change_the_requests(self):
        poisson, at_once = (load(ALPACA, 4000, rate) for rate in (8.0, math.inf))
        times = np.array([item.arrival_s for item in poisson.items])
        gaps = np.diff(times)
        # Mean and deviation of an exponential are equal; four standard errors.
        assert abs(gaps.mean() - 1 / 8) < 4 / 8 / math.sqrt(4000)
        assert abs(gaps.std() - 1 / 8) < 0.02
        assert all(item.arrival_s == 0 for item in at_once.items)
        assert [item.prompt_token_ids for item in poisson.items] == [
            item.prompt_token_ids for item in at_once.items
        ]

    def test_alpaca_has_the_papers_means(self):
        assert parse_lengths("alpaca", "prompt").mean == 19.31
        assert parse_lengths("alpaca", "output").mean == 58.45
        with pytest.raises(ValueError, match="alpaca:1"):
            parse_lengths("alpaca:1", "prompt")

    def test_samples_reach_the_requests(self):
        work = load({"prompt": Uniform(1, 9), "output": Uniform(1, 9)}, 3, num_samples=4)
        assert [item.num_samples for item in work.items] == [4, 4, 4]


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
        assert ran.simulated_s == pytest.approx(sum(steps))
        assert (ran.preemptions, ran.swapped_pages, ran.requests_per_s) == (0, 0, 0)

    def test_measures_to_the_end_where_nobody_ever_waits(self):
        items = [Item([1, 2, 3], 2), Item([1, 2, 3, 4], 2)]
        ran = simulate(PagedSimulator(BUDGETS, 9, 4), items, SIMPLE, warm_up=0)
        # Two steps for both: 7 tokens, then 9, in 3 pages of 4.
        steps = 15 / 8 + 1, 17 / 8 + 1
        assert ran.simulated_s == pytest.approx(sum(steps))
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
            for name, lengths, count in (("alpaca", ALPACA, 1000), ("sharegpt", SHAREGPT, 200))
            for n in (1, 2, 6)
        }
        for name, printed in PAPER["sampling"].items():
            assert saved[name, 1] == 0
            assert 0 < saved[name, 2] < saved[name, 6]
            assert abs(saved[name, 2] - printed["2"]) < 0.03
        assert saved["sharegpt", 2] > saved["alpaca", 2]


class TestReport:
    def test_is_what_its_figures_and_template_make(self):
        template = (SOURCE / "template.md").read_text(encoding="utf-8")
        assert fill(template, FIGURES) == REPORT.read_text(encoding="utf-8")

    def test_an_unknown_table_is_an_error(self):
        with pytest.raises(KeyError, match="nothing"):
            fill("{{nothing}}", FIGURES)

    def test_its_links_lead_somewhere(self):
        links = re.findall(r"\]\((paper_figures/[^)]*)\)", REPORT.read_text(encoding="utf-8"))
        assert len(links) >= 7
        for link in links:
            assert (REPORT.parent / link).is_file(), link

    @pytest.mark.parametrize("policy", ["contiguous-max", "contiguous-oracle", "paged"])
    def test_is_up_to_date(self, policy):
        """A run of the report, again; a scheduler that has changed a little needs no new report."""
        work = make_workload(
            2000,
            *SHAREGPT.values(),
            max_model_len=2048,
            vocab_size=50_272,
            seed=0,
        )
        again, recorded = serve(policy, work), FIGURES["full"]["sharegpt"][policy]
        margin = 0.02 if policy == "paged" else 1e-3
        assert again.mean_running == pytest.approx(recorded["mean_running"], rel=margin)
        assert again.live_share == pytest.approx(recorded["live_share"], rel=margin)
        assert set(recorded) == {*Serving.__dataclass_fields__, "live_share"}

    def test_plots_are_the_same_each_time(self, tmp_path):
        pytest.importorskip("matplotlib", reason="plots need matplotlib: make figures")
        folders = tmp_path / "a", tmp_path / "b"
        for folder in folders:
            folder.mkdir()
            runpy.run_path(str(SOURCE / "plots.py"))["draw"](FIGURES, PAPER, folder)
        names = sorted(path.name for path in folders[0].iterdir())
        assert names == sorted(path.name for path in SOURCE.glob("*.svg"))
        for name in names:
            first, second = ((folder / name).read_bytes() for folder in folders)
            assert first == second
            assert b"<dc:date>" not in first


def run(*args, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "jpaged", "simulate", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


class TestProgram:
    def test_prints_a_table_beside_the_paper_and_a_json_line(self):
        lines = run("--num_requests=60").splitlines()
        assert re.match(r" *contiguous-oracle +[\d.]+ +13\.62 +[\d.]+% +38\.2% ", lines[3])
        report = json.loads(lines[-1])
        assert report.keys() == {"workload", "num_slots", "page_size", "costs", "runs"}
        assert report["num_slots"] == 15_728
        assert report["workload"].keys() == {
            "prompt_len", "output_len", "rate", "n", "seed",
            "num_requests", "prompt_mean", "output_mean", "num_cut",
        }  # fmt: skip
        assert tuple(report["runs"]) == POLICIES
        for own in report["runs"].values():
            assert own.keys() == {*Serving.__dataclass_fields__, "live_share"}
            assert sum(own["memory"].values()) == pytest.approx(1)

    def test_other_loads_have_no_paper_beside_them(self):
        lines = run(
            "--policies=paged", "--n=3", "--rate=inf", "--prompt_len=40",
            "--output_len=uniform:1,9", "--num_requests=200", "--num_slots=1000",
            "--max_model_len=64", "--page_size=8",
        ).splitlines()  # fmt: skip
        assert "13.62" not in "".join(lines)
        report = json.loads(lines[-1])
        assert report["workload"]["rate"] is None
        assert report["runs"]["paged"]["saving"] > 0.3

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--policies=paged,orca"], "--policies=orca: choose among contiguous-max, "),
            (["--rate=0"], "rate=0 must be above 0"),
            (["--rate=nan"], "rate=nan must be above 0"),
            (["--rate=fast"], "--rate"),
            (["--prompt_len=many"], "prompt lengths 'many'"),
            (["--page_size=0"], "--page_size"),
            (["--policies=contiguous-max", "--num_slots=900"], "largest block is 512"),
            (["--policies=paged", "--num_slots=100"], "the pool has 6"),
            (["--policies=contiguous-max", "--n=2"], "contiguous-max cannot share"),
            (["--policies=paged", "--page_size=16000"], "at least 2"),
            (["--preemption=none"], "--preemption"),
            (["--report=README.md"], "--report=README.md: "),
            (["extra"], "unexpected arguments"),
        ],
    )
    def test_bad_usage_is_one_line(self, args, message):
        if args[0].startswith("--report"):
            pytest.importorskip("matplotlib", reason="the report needs matplotlib: make figures")
        said = run(*args, code=2)
        assert message in said
        assert said.count("\n") == 1, said
