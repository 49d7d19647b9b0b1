# SPDX-License-Identifier: Apache-2.0
"""What kernels are compiled with when their device is not there: stand-ins, and all they take."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jpaged import pallas_kernels
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant

Struct = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What an attention layer looks like to its kernel; see `pallas_kernels.paged_attention`."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False

    @property
    def variant(self) -> AttentionVariant:
        """Which attention it computes."""
        return AttentionVariant(sliding_window=self.sliding_window, soft_cap=self.soft_cap)

    @property
    def sinks_struct(self) -> Struct | None:
        """What stands for its sinks; None if it has none."""
        return Struct((self.num_q_heads,), jnp.float32) if self.sinks else None


def coverage_cases() -> dict[str, dict[str, Any]]:
    """Everything that the kernels are made for: one at a time beside the usual, and the corners."""
    cases: dict[str, dict[str, Any]] = {"usual": {}}
    for head_dim in (64, 80, 96, 128, 256):
        cases[f"head_dim {head_dim}"] = {"shape": AttentionShape(32, 8, head_dim)}
        for page_size in (8, 32, 64, 128, 256):
            name = f"head_dim {head_dim}, page_size {page_size}"
            cases[name] = {"shape": AttentionShape(8, 2, head_dim), "page_size": page_size}
        for kv_dtype in (jnp.int8, jnp.float8_e4m3fn, jnp.float32):
            name = f"head_dim {head_dim}, {kv_dtype.__name__} pages"
            dtype = jnp.float32 if kv_dtype == jnp.float32 else jnp.bfloat16
            shape = AttentionShape(8, 2, head_dim)
            cases[name] = {"shape": shape, "dtype": dtype, "kv_dtype": kv_dtype}
    cases["float32 queries, bfloat16 pages"] = {"dtype": jnp.float32, "kv_dtype": jnp.bfloat16}
    for q_heads, kv_heads in ((8, 8), (32, 32), (8, 1), (16, 1), (5, 1), (9, 3), (14, 2), (40, 8)):
        name = f"{q_heads} query heads, {kv_heads} KV heads"
        cases[name] = {"shape": AttentionShape(q_heads, kv_heads, 128)}
    cases["sliding_window"] = {"shape": AttentionShape(32, 8, 128, sliding_window=1000)}
    cases["soft_cap"] = {"shape": AttentionShape(32, 8, 128, soft_cap=30.0)}
    gpt_oss = AttentionShape(64, 8, 64, sliding_window=128, sinks=True)
    cases["sinks"] = {"shape": gpt_oss}
    cases["sinks, 1 row"] = {"shape": gpt_oss, "num_rows": 1, "kv_len": 8192}
    cases["both"] = {"shape": AttentionShape(16, 8, 256, 4096, 50.0)}
    for rows in (1, 8, 256, 512):
        cases[f"{rows} rows"] = {"num_rows": rows, "kv_len": 1024}
    cases["131,072 tokens"] = {"num_rows": 8, "kv_len": 131072}
    cases["512 rows of 131,072 tokens"] = {
        "shape": AttentionShape(8, 1, 64),
        "num_rows": 512,
        "kv_len": 131072,
        "num_pages": 4096,
    }
    cases["131,072 tokens in pages of 8"] = {"num_rows": 8, "kv_len": 131072, "page_size": 8}
    usual = {"shape": AttentionShape(32, 8, 128)}
    return {name: usual | case for name, case in cases.items()}


def pool_struct(
    shape: AttentionShape,
    num_pages: int,
    page_size: int,
    dtype: Any,
    num_layers: int = 2,
    *,
    backend: str = "tpu",
) -> Struct:
    """What stands for a page pool."""
    pool = pallas_kernels.kv_pages_shape(
        num_layers, num_pages, shape.num_kv_heads, page_size, shape.head_dim, backend=backend
    )
    return Struct(pool, dtype)


def rows_struct(num_rows: int, pages_per_seq: int) -> Rows:
    """What stands for the index arrays of a step."""
    shapes = ((num_rows, pages_per_seq), (num_rows,), (num_rows + 1,), (1,))
    structs: Any = (Struct(shape, jnp.int32) for shape in shapes)
    return Rows(*structs)
