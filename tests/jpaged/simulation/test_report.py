# SPDX-License-Identifier: Apache-2.0
from jpaged.host.admission import SchedulerConfig
from jpaged.simulation.paged import PagedSimulator
from jpaged.simulation.report import TRACE_POINTS, Trace, sparkline
from jpaged.simulation.workload import Item


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
