# SPDX-License-Identifier: Apache-2.0
"""What is read off the text of programs, here of some that can be counted by hand."""

import types

import pytest

from jpaged.pallas_kernels.aot import hlo

# Two layers: a weight each of [32, 64], transposed in the first, multiplied within a fusion in the
# second; what is made of activations as large as a weight is no copy of one.
UNROLLED = """
HloModule jit_step, is_scheduled=true

%turned (p: bf16[32,64]) -> bf16[64,32] {
  %p = bf16[32,64]{1,0} parameter(0)
  ROOT %t = bf16[64,32]{1,0} transpose(%p), dimensions={1,0}
}

%product (p: bf16[32,64], q: bf16[32,64]) -> f32[32,32] {
  %p.1 = bf16[32,64]{1,0} parameter(0)
  %q = bf16[32,64]{1,0} parameter(1)
  ROOT %d = f32[32,32]{1,0} dot(%q, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (w0: bf16[32,64], w1: bf16[32,64], scale: bf16[64], x: bf16[32,64]) -> f32[32,32] {
  %w0 = bf16[32,64]{1,0} parameter(0)
  %w1 = bf16[32,64]{1,0} parameter(1)
  %scale = bf16[64]{0} parameter(2)
  %x = bf16[32,64]{1,0:T(8,128)(2,1)} parameter(3)
  %x.scaled = bf16[32,64]{1,0} fusion(%scale, %x), kind=kLoop, calls=%scaled
  %first = bf16[32,64]{1,0} custom-call(%x.scaled), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="paged_attention/mpmd_map"}, backend_config={module="one"}
  %turn = bf16[64,32]{1,0} fusion(%w0), kind=kLoop, calls=%turned
  %y = (bf16[32,64]{1,0}, s8[4]{0}) custom-call(%first, %turn), custom_call_target="__cublas$gemm"
  %y.0 = bf16[32,64]{1,0} get-tuple-element(%y), index=0
  %second = bf16[32,64]{1,0} custom-call(%y.0), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="paged_attention/mpmd_map"}, backend_config={module="SECOND"}
  %row = bf16[1,64]{1,0} dynamic-slice(%w1, %i), dynamic_slice_sizes={1,64}
  ROOT %out = f32[32,32]{1,0} fusion(%w1, %second), kind=kCustom, calls=%product
}
"""
# Three layers' weights in one array, of which a loop takes one at a time.
SCANNED = """
HloModule jit_step

%body (s: (s32[], bf16[3,32,64], bf16[8,64])) -> (s32[], bf16[3,32,64], bf16[8,64]) {
  %s = (s32[], bf16[3,32,64]{2,1,0}, bf16[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %all = bf16[3,32,64]{2,1,0} get-tuple-element(%s), index=1
  %x = bf16[8,64]{1,0} get-tuple-element(%s), index=2
  %own = bf16[1,32,64]{2,1,0:T(8,128)SPACE} fusion(%all, %i), kind=kLoop, calls=%slice
  %b = bf16[32,64]{1,0} bitcast(%own)
  %next = bf16[8,64]{1,0} custom-call(%x, %b), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(paged_attention_decode)"}, backend_config="kernel"
  ROOT %r = (s32[], bf16[3,32,64]{2,1,0}, bf16[8,64]{1,0}) tuple(%i, %all, %next)
}

ENTRY %main (w: bf16[3,32,64], x: bf16[8,64]) -> bf16[8,64] {
  %w = bf16[3,32,64]{2,1,0} parameter(0)
  %x.1 = bf16[8,64]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[3,32,64]{2,1,0}, bf16[8,64]{1,0}) tuple(%zero, %w, %x.1)
  %loop = (s32[], bf16[3,32,64]{2,1,0}, bf16[8,64]{1,0}) while(%start), condition=%c, body=%body
  ROOT %done = bf16[8,64]{1,0} get-tuple-element(%loop), index=2
}
"""


def read(text):
    return hlo.read_program(types.SimpleNamespace(as_text=lambda: text))


@pytest.mark.parametrize(
    ("text", "stacked", "copies"),
    [
        (UNROLLED, [1, 1, 0], 1),  # the transposed one; not the row that is taken of another
        (UNROLLED, [0, 1, 0], 0),
        (SCANNED.replace("SPACE", ""), [3], 1),
        (SCANNED.replace("SPACE", "S(1)"), [3], 0),  # next to a TPU's cores
        (SCANNED.replace("SPACE", "S(3)"), [3], 0),
        (SCANNED.replace("SPACE", "S(5)"), [3], 1),  # in host memory
        (SCANNED.replace("SPACE", ""), [0], 0),
    ],
    ids=["unrolled", "no matrix", "scanned", "to the cores", "of a v4", "elsewhere", "vectors"],
)
def test_copies_of_weights(text, stacked, copies):
    assert hlo.weight_copies(read(text), stacked) == copies


@pytest.mark.parametrize(
    ("text", "count"),
    [(UNROLLED, 2), (UNROLLED.replace("SECOND", "one"), 1), (SCANNED, 1)],
    ids=["two", "called twice", "in a loop"],
)
def test_attention_kernels(text, count):
    assert hlo.attention_kernels(read(text)) == count


def test_kernels_per_layer():
    # From one call to the next: itself, the transpose and the product; in the loop all of the body.
    assert hlo.kernels_per_layer(read(UNROLLED)) == 3
    assert hlo.kernels_per_layer(read(SCANNED)) == 2
    assert hlo.kernels_per_layer(read(UNROLLED.replace("paged_attention", "other"))) is None
