# SPDX-License-Identifier: Apache-2.0
"""Lines and metrics by a clock that moves by hand, of an engine that says what it is told to."""

import dataclasses
import json
import logging
import os

import pytest

from jpaged.host.stats import Counters, EngineStats
from jpaged.telemetry import monitor as monitor_module
from jpaged.telemetry.monitor import Monitor

BASE = EngineStats(
    page_size=16, page_bytes=0, num_groups=1, num_usable_pages=40, num_free_pages=30,
    num_used_pages=10, num_cached_pages=4, num_shared_pages=2, num_saved_pages=3,
    num_saved_cells=40, num_host_pages=0, num_free_host_pages=0, utilisation=0.875,
    num_running=5, num_waiting=7, num_compilations=2, num_unplanned_compilations=0,
    max_model_len=64, totals=Counters(),
)  # fmt: skip


class Run:
    """A clock, and totals."""

    def __init__(self):
        self.now, self.totals, self.num_asked = 1000.0, {}, 0

    def stats(self):
        self.num_asked += 1
        return dataclasses.replace(BASE, totals=Counters(**self.totals))

    def monitor(self, **options):
        return Monitor(self.stats, clock=lambda: self.now, **{"total": 100} | options)


@pytest.fixture
def run(caplog):
    caplog.set_level(logging.INFO, logger="jpaged.telemetry.monitor")
    return Run()


def lines(caplog):
    return [json.loads(record.getMessage()) for record in caplog.records]


class TestLines:
    def test_one_a_minute(self, run, caplog):
        monitor = run.monitor()
        for second in range(1, 150):
            run.now = 1000.0 + second
            run.totals["num_generated_tokens"] = 20 * second if second <= 60 else 1200
            run.totals["num_prefill_tokens"] = 100
            monitor.look(second // 10)
        first, second = lines(caplog)
        assert (first["elapsed_s"], second["elapsed_s"]) == (60, 120)
        assert (first["num_done"], second["num_done"], first["num_total"]) == (6, 12, 100)
        # Since the line before.
        assert first["generated_tokens_per_s"] == 20 and second["generated_tokens_per_s"] == 0
        assert first["prefill_tokens_per_s"] == 1.7 and second["prefill_tokens_per_s"] == 0
        assert first["eta_s"] == 940 and second["eta_s"] == 880
        assert first["num_waiting"] == 7 and first["num_used_pages"] == 10
        assert first["utilisation"] == 0.875 and first["recomputed_share"] == 0
        assert run.num_asked == 3  # an engine is not asked at each step

    def test_the_rest_is_estimated_by_what_this_run_did(self, run, caplog):
        monitor = run.monitor(num_before=40, interval_s=10)
        run.now, run.totals["compile_s"] = 1030.0, 20.0
        monitor.look(50)
        # Ten rows in ten seconds, without those of compiling.
        assert lines(caplog)[0]["eta_s"] == 50
        caplog.clear()
        run.now = 1040.0
        run.totals.update(num_prefill_tokens=75, num_generated_tokens=25, num_recomputed_tokens=10)
        run.monitor(interval_s=1e-9)
        monitor.look(40)
        (line,) = lines(caplog)
        assert line["eta_s"] is None and line["recomputed_share"] == 0.1

    def test_none_where_none_are_wanted(self, run, caplog):
        monitor = run.monitor(interval_s=0)
        run.now += 1e6
        monitor.look(1)
        assert not caplog.records


class TestMetrics:
    def test_the_file(self, run, tmp_path):
        path = tmp_path / "jpaged.prom"
        monitor = run.monitor(metrics_file=path, num_before=3)
        assert "\njpaged:requests_done 3\n" in path.read_text()
        run.totals.update(num_generated_tokens=12345678901, num_lookup_tokens=8, compile_s=0.5)
        run.now += 14
        monitor.look(4)
        assert "\njpaged:requests_done 3\n" in path.read_text()
        run.now += 1
        monitor.look(5)
        text = path.read_text()
        samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        assert samples["jpaged:requests_done"] == "5" and samples["jpaged:requests"] == "100"
        assert samples["jpaged:num_requests_running"] == "5"
        assert samples["jpaged:num_requests_waiting"] == "7"
        assert samples["jpaged:kv_cache_usage_perc"] == "0.25"
        assert samples["jpaged:generation_tokens_total"] == "12345678901"
        assert samples["jpaged:prefix_cache_queries_total"] == "8"
        assert samples["jpaged:compile_seconds_total"] == "0.5"
        assert text.startswith(
            "# HELP jpaged:num_requests_running Sequences that have pages.\n"
            "# TYPE jpaged:num_requests_running gauge\njpaged:num_requests_running 5\n"
        )
        assert "# TYPE jpaged:generation_tokens_total counter\n" in text
        monitor.close(100)
        assert "\njpaged:requests_done 100\n" in path.read_text()
        assert [p.name for p in tmp_path.iterdir()] == ["jpaged.prom"]

    def test_it_is_whole_or_as_before(self, run, tmp_path, monkeypatch, caplog):
        path = tmp_path / "jpaged.prom"
        monitor = run.monitor(metrics_file=path)
        before = path.read_text()

        def fail(source, target):
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(monitor_module.write_metrics.__globals__["os"], "replace", fail)
        run.now += 20
        monitor.look(9)
        assert path.read_text() == before
        assert "metrics are not written: No space left on device" in caplog.text
        assert [p.name for p in tmp_path.iterdir()] == ["jpaged.prom"]

    def test_where_there_is_no_such_directory(self, run, tmp_path):
        with pytest.raises(ValueError, match=r"metrics_file='.*' cannot be written: No such file"):
            run.monitor(metrics_file=tmp_path / "no" / "jpaged.prom")
