# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU's lowering with keys as rows in decode (`mosaic_narrow`), where it can be.

It is compiled and interpreted in tests, and no GPU has run it: `choose_lowering` does not choose it
until one has. `benchmark_kernels --backends=gpu,gpu-narrow` measures it beside the other.
"""

import functools

from jpaged.pallas_kernels.gpu import mosaic

plan_attention = functools.partial(mosaic.plan_attention, narrow=True)
attend_tiles = mosaic.attend_tiles
