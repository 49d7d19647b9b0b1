# SPDX-License-Identifier: Apache-2.0
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl import app, flags

from jpaged.host.admission import SchedulerConfig
from jpaged.host.config import EngineConfig
from jpaged.models.config_json import config_from_hf, config_to_hf
from jpaged.models.decoder import Decoder
from jpaged.models.shapes import SHAPES
from jpaged.scripts.flags import define_engine_flags, engine_config_from_flags
from jpaged.simulation.simulator import Item, PagedSimulator
from jpaged.simulation.workload import (
    SHAREGPT,
    TRACE_POINTS,
    LogNormal,
    Trace,
    Uniform,
    make_workload,
    parse_lengths,
    run_scheduler,
    sparkline,
)

_ROOT = pathlib.Path(__file__).parents[2]
_MODEL = "tests/fixtures/hf/llama_gqa5_hd48_untied"


def _run(module, *args, expected_code=0):
    """Runs a script; the last line's JSON, or what it said on standard error."""
    done = subprocess.run(
        [sys.executable, "-m", f"scripts.{module}", *args],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == expected_code, done.stderr
    if expected_code:
        return done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class TestLengths:
    def test_specs_parse(self):
        assert parse_lengths("64", "prompt") == Uniform(64, 64)
        assert parse_lengths("uniform:32,96", "prompt") == Uniform(32, 96)
        assert parse_lengths("lognormal:mean=161,sigma=1.2", "prompt") == LogNormal(161, 1.2)
        assert parse_lengths("lognormal:sigma=0.5,mean=10", "output") == LogNormal(10, 0.5)
        assert parse_lengths("sharegpt", "prompt").mean == 161.31
        assert parse_lengths("sharegpt", "output").mean == 337.99

    @pytest.mark.parametrize(
        "spec",
        [
            "",
            "0",
            "-3",
            "1.5",
            "many",
            "uniform:5",
            "uniform:9,3",
            "uniform:0,3",
            "uniform:1,2,3",
            "lognormal:161,1.2",
            "lognormal:mean=161",
            "lognormal:mean=0,sigma=1",
            "lognormal:mean=10,sigma=-1",
            "lognormal:mean=nan,sigma=1",
            "lognormal:mean=10,sigma=1,skew=2",
            "sharegpt:3",
        ],
    )
    def test_bad_specs_say_what_is_possible(self, spec):
        with pytest.raises(ValueError, match=r"prompt lengths .*lognormal:mean=M,sigma=S") as error:
            parse_lengths(spec, "prompt")
        assert repr(spec) in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("lengths", "mean", "deviation"),
        [
            (Uniform(7, 7), 7, 0),
            (Uniform(10, 30), 20, math.sqrt((21**2 - 1) / 12)),
            # The deviation of a log-normal is mean * sqrt(exp(sigma^2) - 1).
            (SHAREGPT["prompt"], 161.31, 161.31 * math.sqrt(math.expm1(1.2**2))),
            (SHAREGPT["output"], 337.99, 337.99 * math.sqrt(math.expm1(0.9**2))),
        ],
    )
    def test_mean_is_as_asked(self, lengths, mean, deviation):
        count = 40_000
        drawn = lengths.draw(np.random.default_rng(0), count)
        assert drawn.min() >= lengths.least
        # Four standard errors; rounding, and raising what rounds to 0, moves a mean by less than
        # half a token.
        assert abs(drawn.mean() - mean) <= 4 * deviation / math.sqrt(count) + 0.5 * (deviation > 0)


class TestWorkload:
    def test_equal_seeds_give_equal_requests(self):
        def make(seed):
            return make_workload(
                20, Uniform(1, 9), Uniform(1, 9), max_model_len=64, vocab_size=50, seed=seed
            )

        assert make(3) == make(3)
        assert make(3) != make(4)
        assert all(0 <= t < 50 for item in make(3).items for t in item.prompt_token_ids)

    def test_output_lengths_do_not_depend_on_the_prompts(self):
        outputs = [
            [item.num_output_tokens for item in work.items]
            for work in (
                make_workload(20, prompt, Uniform(1, 9), max_model_len=64, vocab_size=50, seed=0)
                for prompt in (Uniform(1, 9), Uniform(5, 5))
            )
        ]
        assert outputs[0] == outputs[1]

    def test_long_requests_are_cut_to_the_model(self):
        work = make_workload(
            4, Uniform(1, 100), Uniform(90, 90), max_model_len=100, vocab_size=50, seed=0
        )
        totals = [len(item.prompt_token_ids) + item.num_output_tokens for item in work.items]
        assert all(total <= 100 for total in totals)
        assert all(item.prompt_token_ids and item.num_output_tokens for item in work.items)
        assert work.num_cut == sum(len(item.prompt_token_ids) > 10 for item in work.items) > 0
        assert work.num_prompt_tokens + work.num_output_tokens == sum(totals)

    def test_lengths_that_never_fit_are_refused(self):
        with pytest.raises(ValueError, match="101 tokens at least, more than max_model_len=100"):
            make_workload(
                4, Uniform(60, 60), Uniform(41, 50), max_model_len=100, vocab_size=50, seed=0
            )


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


class TestTrace:
    def test_is_resampled_to_few_points(self):
        assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
        config = SchedulerConfig(max_num_batched_tokens=8, max_num_seqs=1, max_model_len=512)
        host, trace = PagedSimulator(config, 33, 16), Trace()
        host.add(Item([1], 400))
        while host.has_unfinished_requests:
            host.step()
            trace.record(host.stats())
        assert len(trace.running_over_time()) == TRACE_POINTS
        assert set(trace.running_over_time()) == {1.0}
        used = trace.used_over_time()
        assert used == sorted(used)
        assert used[-1] < 400 / (32 * 16) + 0.04

    def test_of_no_steps_is_empty(self):
        assert Trace().used_over_time() == []
        assert Trace().least_utilisation() == 1.0


class TestEngineFlags:
    def test_every_field_has_a_flag_with_its_default_and_a_help_text(self):
        values = flags.FlagValues()
        define_engine_flags(values)
        define_engine_flags(values)  # once more is no error
        values(["program"])
        assert engine_config_from_flags(values) == EngineConfig()
        assert all(values[name].help for name in values)
        assert values.compilation_cache_dir

    def test_values_reach_the_config(self):
        values = flags.FlagValues()
        define_engine_flags(values)
        values(["program", "--page_size=8", "--noscan_layers", "--memory_fraction=0.5"])
        expected = EngineConfig(page_size=8, scan_layers=False, memory_fraction=0.5)
        assert engine_config_from_flags(values) == expected

    def test_bad_values_are_usage_errors(self):
        values = flags.FlagValues()
        define_engine_flags(values)
        values(["program", "--page_size=0"])
        with pytest.raises(app.UsageError, match="page_size=0 must be at least 1"):
            engine_config_from_flags(values)


class TestShapes:
    def test_parameter_counts_are_the_published_ones(self):
        counts = {name: Decoder(config).num_params for name, config in SHAPES.items()}
        assert counts == {
            "smollm2-135m": 134_515_008,
            "llama-3.2-1b": 1_235_814_400,
            "qwen3-0.6b": 596_049_920,
            "llama-3.2-3b": 3_212_749_824,
            "llama-3.1-8b": 8_030_261_248,
            "llama-3.1-70b": 70_553_706_496,
            "qwen3-1.7b": 1_720_574_976,
            "qwen3-4b": 4_022_468_096,
            "qwen3-8b": 8_190_735_360,
            "qwen3-14b": 14_768_307_200,
            "qwen3-32b": 32_762_123_264,
        }

    @pytest.mark.parametrize("name", sorted(SHAPES))
    def test_are_supported_as_hugging_face_writes_them(self, name):
        assert config_from_hf(config_to_hf(SHAPES[name])) == SHAPES[name]
        sizes = [leaf.size for leaf in _leaves(Decoder(SHAPES[name]).abstract_params())]
        assert sum(sizes) == Decoder(SHAPES[name]).num_params


def _leaves(tree):
    return (
        [leaf for node in tree.values() for leaf in _leaves(node)] if type(tree) is dict else [tree]
    )


_RUN_KEYS = {
    "steps",
    "preemptions",
    "recomputed_tokens",
    "page_copies",
    "utilisation",
    "pool_used",
    "running",
    "pool",
    "contiguous",
}
_TIME_KEYS = {
    "wall_s",
    "output_tokens_per_s",
    "total_tokens_per_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "mean_decode_step_s",
    "time_to_first_token_s",
    "latency_s",
    "time_per_output_token_s",
    "compilations",
    "compile_s",
    "warmup",
}
_REPORT_KEYS = {
    "benchmark",
    "hardware",
    "versions",
    "model",
    "config",
    "workload",
    "cold_start",
    "runs",
    "comparison",
}


class TestPrograms:
    @pytest.mark.slow
    def test_benchmark_compares_reservations_of_a_tiny_model(self, tmp_path):
        # One step shape, so that little is compiled.
        report = _run(
            "benchmark",
            f"--model={_MODEL}",
            "--compare_reservation",
            "--deterministic",
            "--num_requests=5",
            "--prompt_len=uniform:3,20",
            "--output_len=8",
            "--max_model_len=64",
            "--num_pages=9",
            "--max_num_batched_tokens=16",
            "--max_num_seqs=4",
            f"--compilation_cache_dir={tmp_path}",
        )
        assert report.keys() == _REPORT_KEYS
        assert report["benchmark"] == "engine"
        assert set(report["config"]) == set(EngineConfig.__dataclass_fields__)
        assert report["config"]["num_pages"] == 9
        assert report["workload"]["output_tokens"] == 40
        cold = report["cold_start"]
        assert cold["first_token_s"] > cold["compile_s"] > 0
        assert cold["first_token_s"] > cold["model_load_s"] > 0
        assert cold["cache_misses"] > 0 and any(tmp_path.iterdir())
        assert report["runs"].keys() == {"paged", "max"}
        for own in report["runs"].values():
            assert own.keys() == _RUN_KEYS | _TIME_KEYS
            assert own["compilations"] == 0
            assert own["output_tokens_per_s"] == pytest.approx(40 / own["wall_s"])
            assert own["time_to_first_token_s"].keys() == {"p50", "p90", "p99"}
            assert own["latency_s"]["p99"] <= own["wall_s"]
            assert len(own["utilisation"]["over_time"]) <= TRACE_POINTS
            assert own["pool"]["bytes"] == 8 * own["pool"]["page_bytes"] > 0
            assert own["contiguous"]["fits"] == 2
        paged, reserved = report["runs"]["paged"], report["runs"]["max"]
        assert reserved["running"]["peak"] == 2 < paged["running"]["peak"]
        assert report["comparison"]["peak_running"] == paged["running"]["peak"] / 2

    def test_benchmark_of_the_scheduler_alone(self):
        report = _run(
            "benchmark",
            "--scheduler_only",
            "--num_requests=20",
            "--prompt_len=sharegpt",
            "--output_len=lognormal:mean=100,sigma=0.5",
        )
        assert report.keys() == _REPORT_KEYS
        assert report["model"] is None and report["cold_start"] is None
        assert report["config"]["num_pages"] == 1 + 8 * 128
        assert all(own.keys() == _RUN_KEYS for own in report["runs"].values())
        assert report["comparison"]["mean_running"] > 1

    def test_benchmark_of_the_host(self):
        report = _run("benchmark_host", "--num_seqs=8", "--num_tokens=100", "--steps=20")
        parts = ("schedule_us", "build_batch_us", "update_us", "total_us", "fork_us")
        assert all(0 < report[part] < 1e6 for part in parts)
        others = {"num_seqs", "num_tokens", "page_size", "steps", "python", "cpu_cores"}
        assert report.keys() == {*parts, *others, "total_p99_us", "fork_pages"}

    @pytest.mark.parametrize(
        ("module", "args", "message"),
        [
            ("benchmark_host", ["--num_tokens=9"], "num_tokens=9 must exceed"),
            ("benchmark_host", ["--steps=0"], "--steps"),
            ("benchmark", [], "exactly one of --model=DIR and --random_weights=SHAPE"),
            ("benchmark", ["--random_weights=gpt-7"], "--random_weights=gpt-7"),
            ("benchmark", ["--model=/nowhere"], "'/nowhere' does not exist"),
            ("benchmark", ["--scheduler_only", "--num_pages=5"], "more need"),
            ("compare_transformers", [], "--peer_python=PATH"),
        ],
    )
    def test_bad_usage_is_one_line(self, module, args, message):
        said = _run(module, *args, expected_code=2)
        assert message in said
        assert said.count("\n") == 1, said
