# SPDX-License-Identifier: Apache-2.0
"""What attention layers of public models look like to a kernel."""

from collections.abc import Mapping
from types import MappingProxyType

from jpaged.models.shapes import SHAPES
from jpaged.pallas_kernels.aot.cases import AttentionShape

# Gemma 2 and 3 alternate layers with and without a window; those with it are listed here. The two
# Phi have the head_dim that no other has.
_WITHOUT_DECODER = {
    "gemma-2-2b": AttentionShape(8, 4, 256, 4096, 50.0),
    "gemma-2-9b": AttentionShape(16, 8, 256, 4096, 50.0),
    "gemma-2-27b": AttentionShape(32, 16, 128, 4096, 50.0),
    "gemma-3-1b": AttentionShape(4, 1, 256, 512),
    "gemma-3-4b": AttentionShape(8, 4, 256, 1024),
    "gemma-3-12b": AttentionShape(16, 8, 256, 1024),
    "gemma-3-27b": AttentionShape(32, 16, 128, 1024),
    "phi-2": AttentionShape(32, 32, 80),
    "phi-3-mini": AttentionShape(32, 32, 96, 2047),
}
ATTENTION_SHAPES: Mapping[str, AttentionShape] = MappingProxyType(
    {
        name: AttentionShape(config.num_q_heads, config.num_kv_heads, config.head_dim)
        for name, config in SHAPES.items()
    }
    | _WITHOUT_DECODER
)
