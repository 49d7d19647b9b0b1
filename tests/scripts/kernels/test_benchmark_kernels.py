# SPDX-License-Identifier: Apache-2.0
"""benchmark_kernels.py, as far as that goes without a GPU."""

import json
import math

import numpy as np
import pytest

from jpaged.scripts.kernels import benchmark_kernels
from jpaged.scripts.kernels.benchmark_kernels import parse_step
from jpaged.scripts.kernels.contenders import Case, Inputs
from tests.scripts.programs import ended

TINY = ("--rows=1", "--contexts=32", "--steps=", "--num_q_heads=4", "--num_kv_heads=2")
TINY += ("--head_dim=16", "--dtype=float32", "--runs=2", "--run_s=0.001")


def run(*args, expected_code=0):
    """Runs the benchmark on the CPU."""
    done = ended("jpaged.scripts.kernels.benchmark_kernels", *args)
    assert done.returncode == expected_code, done.stderr
    return done


class TestCase:
    def test_steps_parse(self):
        case = parse_step("2*1@64+1*3@5", page_size=8)
        assert case.q_lens == (1, 1, 3)
        assert case.kv_lens == (64, 64, 5)
        assert case.page_size == 8

    @pytest.mark.parametrize(
        "spec", ["", "1", "1*1", "0*1@4", "1*0@4", "1*5@4", "a*1@4", "1*1@4+", "-1*1@4", "1*1@4.5"]
    )
    def test_what_is_no_step_is_refused_with_an_example(self, spec):
        with pytest.raises(ValueError, match=r"is no sequences\*queries@context, like 2\*1@64"):
            parse_step(spec)

    def test_bytes_and_operations_of_decode(self):
        # A token has 8 heads * 2 * 128 lanes * 2 bytes = 4096 bytes.
        case = parse_step("64*1@1024")
        assert case.kv_bytes == 64 * 1024 * 4096
        # Of each query and key, 128 lanes are multiplied and added for the score, and for values.
        assert case.flops == 64 * 1024 * 32 * 128 * 4
        assert parse_step("64*1@1024", kv_dtype="int8").kv_bytes == 64 * 1024 * 2048

    def test_operations_of_prefill_are_of_visible_keys(self):
        # Three queries at the end of five tokens see 3, 4 and 5 keys.
        case = parse_step("1*3@5", num_q_heads=2, num_kv_heads=1, head_dim=4)
        assert case.flops == (3 + 4 + 5) * 2 * 4 * 4

    @pytest.mark.parametrize(
        # 2 to 4 layers of 4096 bytes a token are to have 2**27 bytes, or 32768 tokens.
        ("spec", "layers"),
        [("1*1@128", 4), ("1*1@8192", 4), ("1*1@10922", 4), ("1*1@10923", 3), ("8*1@32768", 2)],
    )
    def test_layers_exceed_a_cache_if_few_do(self, spec, layers):
        assert parse_step(spec).layers == layers

    def test_memory_counts_whole_pages_of_pool_and_copy(self):
        # 17 tokens take two pages; four layers and one on the way, all twice; 32 query heads.
        assert parse_step("1*1@17").bytes_needed == 2 * 5 * 32 * 4096 + 16 * 32 * 128


class TestVerdicts:
    def test_rates(self):
        case = parse_step("1*1@1000")  # 4,096,000 bytes and 16,384,000 operations
        found = benchmark_kernels.rates(case, [3e-3, 1e-3, 2e-3], copy_bytes_per_s=4.096e9)
        assert found == pytest.approx(
            {
                "call_us": 2000,
                "least_call_us": 1000,
                "bytes_per_s": 2.048e9,
                "copy_ratio": 0.5,
                "flops_per_s": 8.192e9,
            }
        )

    def test_speedups_are_of_what_is_ok(self):
        entries = {
            "gpu": {"status": "ok", "call_us": 10.0},
            "xla": {"status": "ok", "call_us": 40.0},
            "cudnn": {"status": "refused", "reason": "no"},
        }
        assert benchmark_kernels.speedups(entries, ["gpu"]) == {"gpu vs xla": 4.0}
        both = {"gpu vs xla": 4.0, "xla vs gpu": 0.25}
        assert benchmark_kernels.speedups(entries, ["gpu", "xla"]) == both
        assert benchmark_kernels.speedups(entries, ["gpu-triton"]) == {}

    def test_summary_is_the_geometric_mean_of_the_cases_that_have_the_pair(self):
        results = [{"speedups": {"a vs b": 2.0}}, {"speedups": {"a vs b": 8.0, "a vs c": 3.0}}, {}]
        results[2]["speedups"] = {}
        summary = benchmark_kernels.summarise(results)
        assert summary == pytest.approx({"a vs b": 4.0, "a vs c": 3.0})

    def test_error_is_that_of_the_worst_token(self):
        expected = np.zeros((2, 1, 2), np.float32)
        expected[:, 0] = [[3, 4], [6, 8]]
        results = expected.copy()
        results[1, 0, 0] += 1  # of a token whose norm is 10
        assert benchmark_kernels.relative_error(results, expected) == pytest.approx(0.1)
        results[0, 0, 1] = np.nan
        assert math.isnan(benchmark_kernels.relative_error(results, expected))


class TestInputs:
    def test_every_page_belongs_to_one_place_and_none_to_the_reserved(self):
        inputs = Inputs(parse_step("2*1@40+1*3@17", num_q_heads=2, num_kv_heads=1, head_dim=8))
        table = np.asarray(inputs.table)
        assert table.shape == (3, 3)
        assert sorted(table[table > 0]) == list(range(1, 9))
        assert inputs.pool.shape == (4, 9, 1, 16, 16)
        assert inputs.rest[2].tolist() == [0, 1, 2, 5]

    def test_what_is_expected_is_dense_attention(self):
        case = Case(
            q_lens=(2,), kv_lens=(19,), num_q_heads=2, num_kv_heads=1, head_dim=8, dtype="float32"
        )
        inputs = Inputs(case)
        tokens, results = inputs.expected()
        assert tokens.tolist() == [0, 1]
        pages = np.asarray(inputs.pool[0], np.float32)[np.asarray(inputs.table[0]), 0]
        cells = pages.reshape(-1, 16)
        for token, length in ((0, 18), (1, 19)):
            for head in range(2):
                scores = cells[:length, :8] @ np.asarray(inputs.q)[token, head] / np.sqrt(8)
                weights = np.exp(scores) / np.exp(scores).sum()
                expected = weights @ cells[:length, 8:]
                np.testing.assert_allclose(results[token, head], expected, atol=1e-5)


class TestProgram:
    def test_measures_and_reports(self, tmp_path):
        done = run(*TINY, "--backends=xla", "--peers=jax_triton", f"--output_dir={tmp_path}")
        report = json.loads(done.stdout.splitlines()[-1])
        assert report == json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
        assert report["benchmark"] == "kernels" and report["passed"] is True
        assert report["hardware"]["platform"] == "cpu"
        assert report["config"]["kv_dtype"] == "float32"
        assert report["copy_bytes_per_s"] == max(report["copies"].values()) > 0
        assert report["left_out"] == [] and report["summary"] == {}
        (result,) = report["results"]
        assert result["case"] == "1*1@32" and result["cached"] is True
        assert result["kv_bytes"] == 32 * 2 * 2 * 16 * 4
        own, peer = result["contenders"]["xla"], result["contenders"]["jax_triton"]
        assert own["status"] == "ok" and own["error"] < 1e-5
        assert 0 < own["least_call_us"] <= own["call_us"] < 1e6 * own["cold_s"]
        assert own["bytes_per_s"] == pytest.approx(1e6 * result["kv_bytes"] / own["call_us"])
        assert own["calls_per_run"] >= 4
        assert peer == {"status": "refused", "reason": "runs on GPUs, not on 'cpu'"}
        assert "refused: runs on GPUs" in done.stdout
        assert "1*1@32, xla" in done.stderr  # progress

    def test_what_is_left_out_is_said(self):
        args = ("--backends=xla", "--peers=", "--steps=1*1@32", "--rows=")
        done = run(*TINY[3:], *args, "--memory_gib=1e-6", expected_code=1)
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["results"] == [] and report["passed"] is False
        (left_out,) = report["left_out"]
        assert left_out["case"] == "1*1@32" and "exceed memory_gib" in left_out["reason"]
        assert f"left out: {left_out['reason']}" in done.stdout

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--backends=cuda"], "--backends=cuda: choose among cpu, gpu,"),
            (["--peers=vllm"], "--peers=vllm: choose among xla,"),
            (["--steps=1*5@4"], "'1*5@4' is no sequences*queries@context"),
            (["--rows=x"], "is no sequences*queries@context"),
            (["--num_q_heads=9"], "must be a multiple of --num_kv_heads"),
            (["--backends=gpu-mosaic"], "run on NVIDIA GPUs only"),
        ],
    )
    def test_bad_usage_is_one_line(self, args, message):
        said = run(*args, expected_code=2).stderr
        assert message in said
        assert said.count("\n") == 1, said
