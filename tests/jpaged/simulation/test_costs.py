# SPDX-License-Identifier: Apache-2.0
import pytest

from jpaged.simulation.costs import CostModel, Memory, StepWork

WORK = StepWork(2, 3, 10, 4, Memory(10))


class TestCostModel:
    COSTS = CostModel(
        weight_bytes=80,
        kv_bytes_per_token=2,
        flops_per_token=6,
        memory_bytes_per_s=50,
        flops_per_s=3,
        host_s=0.5,
        host_s_per_seq=0.25,
        copy_bytes_per_s=16,
        copy_start_s=0.125,
        copies_per_page=2,
    )

    def test_by_hand(self):
        # 100 bytes are read in 2 seconds; 3 tokens take 18 operations, in 6 seconds.
        assert self.COSTS.device_s(1, 10) == 2
        assert self.COSTS.device_s(3, 10) == 6
        # 4 pages of 8 tokens have 64 bytes, and 8 copies.
        assert self.COSTS.copy_s(4, 8) == 4 + 1
        assert self.COSTS.step_s(WORK, page_size=8) == 6 + 5 + 0.5 + 2 * 0.25
        assert self.COSTS.step_s(StepWork(0, 0, 0, 0, Memory(0))) == 0

    def test_defaults_are_those_of_the_paper(self):
        # 800 KiB a token, and 15.7 thousand of them in 12 GiB.
        assert CostModel().kv_bytes_per_token == 800 * 1024
        assert 12 * 2**30 / CostModel().kv_bytes_per_token == pytest.approx(15_728.6, abs=0.1)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("flops_per_s", 0, "flops_per_s=0 must be above 0"),
            ("kv_bytes_per_token", float("nan"), "kv_bytes_per_token=nan must be above 0"),
            ("host_s", -1, "host_s=-1 must be at least 0"),
        ],
    )
    def test_impossible_ones_are_refused(self, field, value, message):
        with pytest.raises(ValueError, match=message):
            CostModel(**{field: value})
        assert CostModel(host_s=0).host_s == 0
