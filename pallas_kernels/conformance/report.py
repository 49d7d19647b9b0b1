# SPDX-License-Identifier: Apache-2.0
"""The suite of named cases, and what implementations make of them."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.pallas_kernels.conformance.cases import Case, make_case
from jpaged.pallas_kernels.conformance.checks import check_attention, check_copy, check_write

_DECODE = [(1, 1), (1, 4), (1, 5), (1, 130), (1, 257), (1, 3)]
_PREFILL = [(1, 1), (4, 4), (7, 7), (40, 40), (33, 65), (2, 130)]
_MIXED = [(1, 9), (5, 5), (1, 140), (70, 133), (0, 6), (3, 8), (1, 1)]
_SMALL = [(1, 20), (9, 9), (1, 33), (3, 40)]


def suite(dtype: Any = jnp.float32) -> dict[str, Callable[[], Case]]:
    """The cases by name; each is built when it is called.

    Args:
      dtype: of the cases that are not there for theirs.
    """
    usual = {"head_dim": 128, "page_size": 16, "lane_padding": None, "dtype": dtype}
    cases: dict[str, dict[str, Any]] = {}
    for kind, lens in (("decode", _DECODE), ("prefill", _PREFILL), ("mixed", _MIXED)):
        for page_size in (8, 16, 64, 256):
            # A decode step has no more tokens than rows; the others below have, so as to be mixed.
            padding = {"pad_tokens": 0} if kind == "decode" else {}
            case = {"lens": lens, "page_size": page_size} | padding
            cases[f"{kind}, page_size {page_size}"] = case
    edges = [(1, 16 * n + d) for n in (1, 2, 8) for d in (-1, 0, 1)]
    cases["decode around page boundaries"] = {"lens": edges}
    chunks = [(q, 16 * n + d) for q in (2, 15, 16, 17) for n, d in ((2, -1), (2, 0), (3, 1))]
    cases["chunks around page boundaries"] = {"lens": chunks}
    cases["decode without padding"] = {"lens": _DECODE, "pad_rows": 0, "pad_tokens": 0}
    cases["much padding"] = {"lens": _MIXED, "pad_rows": 9, "pad_tokens": 50, "pad_pages": 40}
    cases["512 rows"] = {"lens": [(1, 1 + i % 37) for i in range(512)], "num_q_heads": 2}
    for window in (1, 15, 16, 17, 100, 129):
        cases[f"sliding_window {window}"] = {"lens": _MIXED, "sliding_window": window}
    # Fewer tokens than the last page has, whose cells past its end must not count.
    cases["sliding_window 4, decode"] = {"lens": [(1, 104), (1, 33), (1, 250)], "sliding_window": 4}
    cases["sliding_window 40, decode"] = {"lens": _DECODE, "sliding_window": 40}
    for window in (1, 17, 100):
        for kind, lens in (("decode", _DECODE), ("mixed", _MIXED)):
            cases[f"sliding_window {window}, pages below released, {kind}"] = {
                "lens": lens,
                "sliding_window": window,
                "released": True,
                # A decode step has no more tokens than rows.
                "pad_tokens": 0 if kind == "decode" else 3,
            }
    cases["soft_cap and sm_scale"] = {"lens": _MIXED, "soft_cap": 1.5, "sm_scale": 0.7}
    # Heads without, with one that a key outweighs, that outweighs most, and that takes all.
    sinks = (-np.inf, -3.0, 0.5, 2.0, 30.0, 200.0)
    for kind, lens in (("decode", _DECODE), ("prefill", _PREFILL), ("mixed", _MIXED)):
        cases[f"sinks, {kind}"] = {"lens": lens, "num_q_heads": 12, "sinks": sinks}
    cases["sinks, sliding_window 17"] = cases["sinks, mixed"] | {"sliding_window": 17}
    cases["sinks, capped and scaled"] = cases["sinks, mixed"] | {
        "soft_cap": 1.5,
        "sm_scale": 0.7,
    }
    for q, kv in ((1, 1), (8, 8), (8, 1), (5, 1), (9, 3), (14, 2), (16, 1), (32, 8)):
        cases[f"{q} query heads, {kv} KV heads"] = {
            "lens": _SMALL,
            "num_q_heads": q,
            "num_kv_heads": kv,
        }
    for head_dim in (64, 80, 96, 256):
        for kind, lens in (("decode", _DECODE), ("mixed", _MIXED)):
            cases[f"head_dim {head_dim}, {kind}"] = {"lens": lens, "head_dim": head_dim}
    for dtype in (jnp.bfloat16, jnp.float16):
        for kind, lens in (("decode", _DECODE), ("mixed", _MIXED)):
            cases[f"{dtype.__name__}, {kind}"] = {"lens": lens, "dtype": dtype}
    for kv_dtype in (jnp.int8, jnp.float8_e4m3fn):
        cases[f"{kv_dtype.__name__} pages"] = {
            "lens": _MIXED,
            "dtype": jnp.bfloat16,
            "kv_dtype": kv_dtype,
            "kv_scale": (2**-5, 2**-4),  # exact divisors, so that writes are exact too
        }
    cases["33,000 tokens"] = {"lens": [(1, 33000), (1, 5)], "num_layers": 1, "layer": 0} | {
        "num_kv_heads": 1,
        "num_q_heads": 2,
        "page_size": 64,
    }
    cases["33,000 tokens, sliding_window 100"] = cases["33,000 tokens"] | {"sliding_window": 100}
    cases["one row, without queries"] = {"lens": [(0, 3)]}
    return {name: functools.partial(make_case, **usual | case) for name, case in cases.items()}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one implementation made of one case.

    Attributes:
      function: "paged_attention", "write_kv" or "copy_pages".
      case: its name in `suite`.
      status: "passed", "failed", or "refused" where the implementation raised ValueError or
        NotImplementedError, which is how it says that a case is beyond it.
      detail: why, where it did not pass.
      error_share: largest error as a share of what is allowed; 0 for what must be exact.
      took_s: seconds, compilation included.
    """

    function: str
    case: str
    status: str
    detail: str
    error_share: float
    took_s: float


def run(
    *,
    paged_attention: Callable[..., jax.Array] | None = None,
    write_kv: Callable[..., jax.Array] | None = None,
    copy_pages: Callable[..., jax.Array] | None = None,
    only: str = "",
    dtype: Any = jnp.float32,
    interpret: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[Result]:
    """Runs the suite on implementations with the signatures of those in `pallas_kernels`.

    Args:
      paged_attention: called without `backend`; `layer` is traced. None leaves it out.
      write_kv: likewise; the pool is donated.
      copy_pages: likewise.
      only: runs the cases whose name contains this.
      dtype: as in `suite`.
      interpret: `interpret_tpu` or `interpret_gpu`, to run kernels of devices that are not there.

    Yields:
      A result a function and case, as soon as it is there.
    """
    for name, make in suite(dtype).items():
        if only not in name:
            continue
        case = make()
        for function, implementation, check in (
            ("paged_attention", paged_attention, check_attention),
            ("write_kv", write_kv, check_write),
            ("copy_pages", copy_pages, check_copy),
        ):
            if implementation is None:
                continue
            start, share, status, detail = time.perf_counter(), 0.0, "passed", ""
            try:
                with interpret():
                    share = check(implementation, case)
            except (ValueError, NotImplementedError) as e:
                status, detail = "refused", str(e)
            except Exception as e:  # the suite goes on, whatever a stranger's kernel raises
                status, detail = "failed", f"{type(e).__name__}: {e}"
            yield Result(function, name, status, detail, share, time.perf_counter() - start)
