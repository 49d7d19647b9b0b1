# SPDX-License-Identifier: Apache-2.0
"""How steps are compiled, by platform."""

import pytest

from jpaged.device.compiler_options import (
    GPU_OPTIONS,
    compiler_options,
    merges_projections,
    scans_layers,
)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_elsewhere_than_on_gpus_nothing_is_set(platform):
    assert compiler_options(platform) == {}


def test_flags_of_the_user_win(monkeypatch, tmp_path):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert compiler_options("gpu") == GPU_OPTIONS
    given = "--xla_gpu_enable_command_buffer= --xla_dump_to='a b' --xla_gpu_enable_triton_gemm"
    path = tmp_path / "flags"
    path.write_text(given)
    for flags in (given, str(path)):
        monkeypatch.setenv("XLA_FLAGS", flags)
        left = {"xla_gpu_graph_min_graph_size", "xla_gpu_dot_merger_threshold_mb"}
        assert compiler_options("gpu").keys() == left
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "nosuch"))
    assert compiler_options("gpu") == GPU_OPTIONS


def test_only_tpus_scan_unless_told():
    assert [scans_layers(None, name) for name in ("cpu", "gpu", "tpu")] == [False, False, True]
    assert [scans_layers(flag, "gpu") for flag in (True, False)] == [True, False]
    assert scans_layers(False, "tpu") is False


def test_what_merges_projections():
    assert all(merges_projections(False, name) for name in ("cpu", "gpu", "cuda"))
    assert not merges_projections(False, "tpu")
    assert not merges_projections(True, "gpu")
