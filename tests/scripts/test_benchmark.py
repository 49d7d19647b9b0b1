# SPDX-License-Identifier: Apache-2.0
import pytest

from jpaged.host.config import EngineConfig
from jpaged.simulation.report import TRACE_POINTS
from tests.scripts.programs import run, run_report

MODEL = "tests/fixtures/hf/llama_gqa5_hd48_untied"
RUN_KEYS = {
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
TIME_KEYS = {
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
REPORT_KEYS = {
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


@pytest.mark.slow
def test_benchmark_compares_reservations_of_a_tiny_model(tmp_path):
    # One step shape, so that little is compiled.
    report = run_report(
        "jpaged",
        "benchmark",
        f"--model={MODEL}",
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
    assert report.keys() == REPORT_KEYS
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
        assert own.keys() == RUN_KEYS | TIME_KEYS
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


def test_benchmark_of_the_scheduler_alone():
    report = run_report(
        "jpaged",
        "benchmark",
        "--scheduler_only",
        "--num_requests=20",
        "--prompt_len=sharegpt",
        "--output_len=lognormal:mean=100,sigma=0.5",
    )
    assert report.keys() == REPORT_KEYS
    assert report["model"] is None and report["cold_start"] is None
    assert report["config"]["num_pages"] == 1 + 8 * 128
    assert all(own.keys() == RUN_KEYS for own in report["runs"].values())
    assert report["comparison"]["mean_running"] > 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "exactly one of --model=DIR and --random_weights=SHAPE"),
        (["--random_weights=gpt-7"], "--random_weights=gpt-7"),
        (["--model=/nowhere"], "'/nowhere' does not exist"),
        (["--scheduler_only", "--num_pages=5"], "more need"),
    ],
)
def test_bad_usage_is_one_line(args, message):
    said = run("jpaged", "benchmark", *args, code=2)
    assert message in said
    assert said.count("\n") == 1, said
