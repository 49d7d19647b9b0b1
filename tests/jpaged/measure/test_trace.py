# SPDX-License-Identifier: Apache-2.0
"""Traces of devices that are not here, written by hand as GPUs and TPUs give them."""

import pytest

from jpaged.measure.breakdown import Work, draw, make_breakdown
from jpaged.measure.floor import Floor
from jpaged.measure.kinds import ALL_KINDS, Scopes, kind_of, place_of
from jpaged.measure.trace import read_trace
from tests.jpaged.measure.xspace import profile_data

HLO = """HloModule jit_step, is_scheduled=true

%fused_up (p: f32[2]) -> f32[2] {
  %dot.9 = f32[2] dot(%p, %p), metadata={op_name="jit(step)/layers_1/mlp/up_proj/jit(linear)/add"}
  ROOT %add.1 = f32[2] add(%dot.9, %p)
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %fusion.7 = f32[2] fusion(%a), kind=kLoop, calls=%fused_up, metadata={op_name="jit(step)/M/add"}
  %wrapped-write.2 = f32[2] fusion(%a), calls=%w, metadata={op_name="jit(step)/layers_1/write_kv"}
  %copy.3 = f32[2] copy(%a)
  ROOT %while.4 = f32[2] while(%a), metadata={op_name="jit(step)/paged_attention/while"}
}
"""
OTHER_SHAPE = """HloModule jit_step, is_scheduled=true
ENTRY %main (a: f32[4]) -> f32[4] {
  ROOT %fusion.7 = f32[4] fusion(%a), metadata={op_name="jit(step)/layers_0/write_kv"}
}
"""


def of_step(operation, program="21"):
    return {"hlo_module": "jit_step", "hlo_op": operation, "program_id": program}


# Two steps, start to start 100 us; in the second the first one's results are read.
HOST = [
    ("PjitFunction(warm)", -20, -10, {}),
    ("step", 0, 60, {"step_num": "5"}),
    ("schedule", 0, 10, {}),
    ("pack", 10, 15, {}),
    ("dispatch", 20, 50, {}),
    ("PjitFunction(step)", 20, 40, {}),
    ("PjitFunction(step)", 21, 39, {}),
    ("PjRtStreamExecutorLoadedExecutable::Execute", 22, 38, {}),
    ("PjitFunction(sample)", 40, 50, {}),
    ("read", 50, 52, {}),
    ("schedule", 70, 80, {}),  # between steps: somebody else's
    ("step", 100, 200, {"step_num": "6"}),
    ("schedule", 100, 120, {}),
    ("dispatch", 120, 150, {}),
    ("PjRtCApiLoadedExecutable::Execute", 120, 130, {}),
    ("read", 150, 190, {}),
    ("detokenize", 190, 200, {}),
]
GPU = {
    "/host:CPU": {"tf_other": [("write", 0, 5, {})], "python": HOST},
    "/device:GPU:0": {
        "Stream #7(Compute)": [
            ("nvjet_hsh_64x8", -10, 20, of_step("custom-call.1")),  # cut where the steps begin
            ("fusion_7", 20, 30, of_step("fusion.7")),
            ("wrapped_write_2", 30, 40, {"hlo_module": "jit_step", "program_id": "21"}),
            ("mosaic_paged_attention", 40, 80, of_step("custom-call.2")),
            ("sort_1", 80, 85, {"hlo_module": "jit_sample", "hlo_op": "sort.1"}),
            ("loop_add_fusion", 190, 230, of_step("add_fusion")),  # and where they end
        ],
        "Stream #9(MemcpyD2D)": [("memcpy128", 70, 90, of_step("copy.3"))],
        "Steps": [("5", 0, 200, {})],
    },
}
# Busy: 0 to 90 and 190 to 200. From 70 to 85 two run at once, so that each has a half.
GPU_US = {
    "products": 20 + 10,
    "token write": 10,
    "attention": 30 + 5,
    "sampler": 2.5,
    "copies": 5 + 2.5 + 5,
    "other": 10,
}


class TestGpu:
    def _trace(self):
        return read_trace(profile_data(GPU), Scopes([OTHER_SHAPE, HLO]))

    def test_phases_are_those_of_the_steps(self):
        trace = self._trace()
        assert trace.steps == [(0, 60e3), (100e3, 200e3)]
        found = {name: [ns / 1e3 for ns in values] for name, values in trace.phases.items()}
        assert found == {
            "schedule": [10, 20],
            "pack": [5, 0],
            "swap": [0, 0],
            "dispatch": [30, 30],
            "read": [2, 40],
            "detokenize": [0, 10],
        }

    def test_a_program_in_a_program_is_one(self):
        assert self._trace().num_programs == 3

    def test_each_kernel_has_a_kind_and_kinds_add_up(self):
        trace = self._trace()
        assert trace.device == "/device:GPU:0"
        assert [kernel.kind for kernel in trace.kernels] == [
            "products",
            "products",  # a fusion with a product inside
            "token write",  # known by its own name, as in a CUDA graph
            "attention",
            "copies",
            "sampler",
            "other",
        ]
        work = Work(steps=2, rows=6, prefill_tokens=8, page_bytes=0, compilations=0)
        floor = Floor(
            weight_bytes=3e6, page_bytes=1e6, flops=1e6, copy_bytes_per_s=4e11,
            product_flops_per_s=1e12,
        )  # fmt: skip
        found = make_breakdown(trace, work, floor)
        device = found["device"]
        assert {kind: own["us"] * 2 for kind, own in device["by_kind"].items()} == GPU_US
        assert device["busy_us"] * 2 == sum(GPU_US.values()) == 100
        assert (device["idle_us"], device["programs"], device["kernels"]) == (50, 1.5, 3.5)
        assert found["step_us"] == 100
        assert found["host_us"]["rest of the step"]["median"] == (13 + 0) / 2
        assert found["host_us"]["between steps"] == {"median": 40, "p90": 40, "mean": 40}
        # 4 MB at 400 GB/s take 10 us, 1 MFLOP at 1 TFLOP/s 1 us.
        assert found["floor"]["step_us"] == pytest.approx(10)
        assert found["step_over_floor"] == pytest.approx(10)
        assert found["busy_over_floor"] == pytest.approx(5)
        assert found["rows_per_step"] == 3 and work.tokens == 7

        hardware = {"device": "H", "cpu": "C", "cpu_cores": 2}
        page = draw({**found, "hardware": hardware, "versions": {"jax": "0"}})
        assert all(f"  {kind}" in page for kind in ALL_KINDS)
        assert "10.00 x the floor" in page and page.count("\n") < 60


def test_without_programs_names_still_say_something():
    trace = read_trace(profile_data(GPU), Scopes([]))
    kinds = [kernel.kind for kernel in trace.kernels]
    assert kinds == ["products", "other", "other", "attention", "copies", "sampler", "other"]


def test_a_tpus_operations_are_named_by_their_text():
    ops = [
        ("%while.4 = (f32[2]) while(%t), body=%b", 0, 90, of_step("while.4")),
        ("%fusion.7 = f32[2]{0} fusion(%a)", 0, 30, of_step("fusion.7")),
        ("%copy.3 = f32[2]{0} copy(%a)", 30, 40, of_step("copy.3")),
    ]
    planes = {
        "/host:CPU": {"main": HOST},
        "/device:TPU:0": {"XLA Ops": ops, "XLA Modules": [("jit_step(21)", 0, 40, {})]},
    }
    trace = read_trace(profile_data(planes), Scopes([HLO]))
    found = [(kernel.name, kernel.kind) for kernel in trace.kernels]
    assert found == [("M/add/dot_general", "products"), ("copy.3", "copies")]


def test_a_trace_without_steps_has_none():
    trace = read_trace(profile_data({"/host:CPU": {"python": [("read", 0, 5, {})]}}), Scopes([]))
    assert trace.steps == [] and trace.kernels == []


@pytest.mark.parametrize(
    ("known", "kind"),
    [
        (("jit_step", "jit(step)/a/paged_attention/dot_general", "dot.1", ""), "attention"),
        (("jit_step", "jit(step)/write_kv/copy", "copy.1", "memcpy128"), "token write"),
        (("jit_beam_candidates", "", "sort.1", ""), "sampler"),
        (("jit_processed_beam_candidates", "", "sort.1", ""), "sampler"),
        (("jit_model_logprobs", "", "reduce.1", ""), "sampler"),
        (("jit_get_pages", "", "gather.1", ""), "copies"),
        (("", "", "", "MemcpyD2H"), "copies"),
        (("jit_step", "", "dynamic-slice_bitcast_fusion.12", ""), "copies"),
        (("jit_step", "", "wrapped_concatenate", "wrapped_concatenate"), "copies"),
        (("jit_step", "", "", "loop_dynamic_slice_fusion_3"), "copies"),
        (("jit_step", "", "copy_multiply_fusion.3", ""), "other"),
        (("jit_step", "", "cublas-gemm.2", "nvjet_hsh_128x64"), "products"),
        (("jit_step", "", "", "cutlass_80_tensorop_s16816gemm"), "products"),
        (("jit_step", "jit(step)/experts/ragged_dot", "fusion.1", ""), "products"),
        (("jit_step", "jit(step)/mlp/up_proj/product/ffi_call", "ffi_call.3", ""), "products"),
        (("jit_step", "jit(step)/norm/mul", "fusion.1", "fusion_1"), "other"),
        (("jit_step", "jit(step)/reduce_product/mul", "fusion.1", "fusion_1"), "other"),
        (("", "", "", ""), "other"),
    ],
)
def test_kinds(known, kind):
    assert kind_of(*known) == kind


def test_a_place_is_the_same_for_all_layers():
    scope = "jit(step)/_DecoderModule/layers_12/mlp/up_proj/jit(linear)/cond/branch_0_fun/dot"
    assert place_of(scope) == "layers_*/mlp/up_proj/dot"
