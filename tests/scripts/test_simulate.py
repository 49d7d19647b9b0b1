# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest

from jpaged.simulation import POLICIES, Serving
from tests.scripts.programs import run


class TestProgram:
    def test_prints_a_table_beside_the_paper_and_a_json_line(self):
        lines = run("jpaged", "simulate", "--num_requests=60").splitlines()
        assert re.match(r" *contiguous-oracle +[\d.]+ +13\.62 +[\d.]+% +38\.2% ", lines[3])
        report = json.loads(lines[-1])
        # The table ends in percentiles: to the first token, and of each after it.
        assert re.search(r"first p50 +p99 +next p50 +p99$", lines[0])
        own = report["runs"]["paged"]
        first, later = own["time_to_first_token_s"], own["time_per_output_token_s"]
        said = [f"{first[p]:.2f} s" for p in ("p50", "p99")]
        said += [f"{later[p]:.3f} s" for p in ("p50", "p99")]
        assert re.sub(" +", " ", lines[4]).endswith(" ".join(said)), lines[4]
        assert report.keys() == {
            "workload", "num_slots", "page_size", "layers", "costs", "runs",
        }  # fmt: skip
        assert report["num_slots"] == 15_728
        assert report["workload"].keys() == {
            "prompt_len", "output_len", "rate", "n", "seed",
            "num_requests", "prompt_mean", "output_mean", "num_cut",
        }  # fmt: skip
        assert tuple(report["runs"]) == POLICIES
        for own in report["runs"].values():
            assert own.keys() == {*Serving.__dataclass_fields__, "live_share", "waste"}
            assert sum(own["memory"].values()) == pytest.approx(1)

    def test_other_loads_have_no_paper_beside_them(self):
        lines = run(
            "jpaged", "simulate", "--policies=paged", "--n=3", "--rate=inf", "--prompt_len=40",
            "--output_len=uniform:1,9", "--num_requests=200", "--num_slots=1000",
            "--max_model_len=64", "--page_size=8",
        ).splitlines()  # fmt: skip
        assert "13.62" not in "".join(lines)
        report = json.loads(lines[-1])
        assert report["workload"]["rate"] is None
        assert report["runs"]["paged"]["saving"] > 0.3

    def test_layers_that_see_windows(self):
        lines = run(
            "jpaged", "simulate", "--policies=paged,paged-one-table", "--rate=inf",
            "--layers=tests/fixtures/hf/gemma3_two_ropes", "--num_requests=20",
            "--prompt_len=100", "--output_len=9", "--page_size=4", "--num_slots=2000",
        ).splitlines()  # fmt: skip
        report = json.loads(lines[-1])
        # Two layers that see everything, and three that see five tokens.
        assert report["layers"] == {"size": 1, "kinds": [[None, 2], [5, 3]]}
        waste = {policy: own["waste"] for policy, own in report["runs"].items()}
        assert waste["paged"] < 0.1 < 0.5 < waste["paged-one-table"]

    def test_requests_that_were_served(self, tmp_path):
        trace = tmp_path / "trace.jsonl"
        row = {"input_length": 1024, "output_length": 4, "hash_ids": [7, 8]}
        trace.write_text("".join(json.dumps({"timestamp": 1e7 * i} | row) + "\n" for i in range(4)))
        lines = run("jpaged", "simulate", f"--trace={trace}", "--policies=paged").splitlines()
        report = json.loads(lines[-1])
        assert report["workload"] == {
            "trace": str(trace), "time_scale": 1.0, "n": 1, "num_requests": 4,
            "prompt_mean": 1024, "output_mean": 4, "num_cut": 0,
        }  # fmt: skip
        # Three of four prompts are known but for the token that is computed again.
        assert report["runs"]["paged"]["hit_rate"] == pytest.approx(3 * 1023 / (4 * 1024))
        assert report["runs"]["paged"]["simulated_s"] > 3e4

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--policies=paged,orca"], "--policies=orca: choose among contiguous-max, "),
            (
                ["--policies=paged,paged-last-victim", "--record=x"],
                "--record is of one policy with pages: give one of paged, paged-one-table, paged-",
            ),
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
            (["--layers=24:128,none"], "layers='24:128,none': give a number of layers and what"),
            (["--layers=0:full"], "layers='0:full': give a number of layers and what they see"),
            (["--layers=4:0,full"], "layers='4:0,full': give a number of layers and what they"),
            (["--layers=nowhere"], "layers='nowhere': give a number of layers"),
            (["--trace=none.csv"], "trace='none.csv': No such file or directory"),
            (["--trace=none.csv", "--rate=3"], "--trace says what --rate would: give one of them"),
            (["--time_scale=-1"], "time_scale=-1 must be at least 0, and finite"),
            (["extra"], "unexpected arguments"),
        ],
    )
    def test_bad_usage_is_one_line(self, args, message):
        said = run("jpaged", "simulate", *args, code=2)
        assert message in said
        assert said.count("\n") == 1, said
