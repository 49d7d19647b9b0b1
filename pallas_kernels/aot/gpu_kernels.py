# SPDX-License-Identifier: Apache-2.0
"""Our kernels compiled for NVIDIA GPUs, and the facts read off them."""

import contextlib
import dataclasses
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from jpaged.pallas_kernels import dispatch, layout
from jpaged.pallas_kernels.aot.cases import AttentionShape, Struct, pool_struct, rows_struct
from jpaged.pallas_kernels.aot.gpu import GpuCompiler
from jpaged.pallas_kernels.aot.program import in_place_error, num_bytes, try_compile

KERNELS = ("decode", "mixed", "write", "copy")
_NUM_COPIES = 8


@dataclasses.dataclass(frozen=True)
class KernelFacts:
    """What the compiler says of a program; None where it does not say.

    Attributes:
      registers: of a thread, as ptxas has it; for kernels of Mosaic GPU alone.
      spill_bytes: stored to local memory because the registers did not suffice; likewise.
      temp_bytes: device memory that the call takes beside arguments and results.
      refused: the rule of ours that the case breaks; then the rest is None.
      error: what else is wrong.
    """

    registers: int | None = None
    spill_bytes: int | None = None
    temp_bytes: int | None = None
    refused: str | None = None
    error: str | None = None


@contextlib.contextmanager
def ptxas_output() -> Iterator[pathlib.Path]:
    """A folder that what ptxas says of Mosaic GPU's kernels is written to."""
    with tempfile.TemporaryDirectory(prefix="ptxas-") as folder:
        names = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": folder}
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(names)
        try:
            yield pathlib.Path(folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def compile_kernel(
    compiler: GpuCompiler,
    kernel: str,
    dump: pathlib.Path,
    *,
    shape: AttentionShape,
    num_rows: int = 64,
    kv_len: int = 2048,
    page_size: int = 16,
    dtype: Any = jnp.bfloat16,
    kv_dtype: Any = None,
    num_pages: int | None = None,
) -> KernelFacts:
    """Compiles one program, with pages for every row's `kv_len` tokens.

    Args:
      compiler: what with.
      kernel: "decode" or "mixed" attention, "write" or "copy".
      dump: where what ptxas says appears.
      shape: heads of the layer.
      num_rows: rows.
      kv_len: tokens a row can have.
      page_size: tokens a page holds.
      dtype: of queries, and of new keys and values.
      kv_dtype: of the pool; by default that of the queries.
      num_pages: of the pool, instead.
    """
    for path in dump.iterdir():
        path.unlink()
    kv_dtype = jnp.dtype(kv_dtype or dtype)
    pages = num_pages or num_rows * -(-kv_len // page_size) + 1
    pool = pool_struct(shape, pages, page_size, kv_dtype, backend="gpu")
    rows = rows_struct(num_rows, -(-kv_len // page_size))
    layer, scale = Struct((), jnp.int32), Struct((2,), jnp.float32)
    scaled = kv_dtype.itemsize == 1
    num_tokens = num_rows + 203 if kernel == "mixed" else num_rows

    def attend(pool, q, layer, scale, sinks, rows):
        kv_scale = scale if scaled else None
        return dispatch.attend(
            q, pool, rows, shape.variant, layer=layer, kv_scale=kv_scale, sinks=sinks, backend="gpu"
        )

    def write(pool, new, layer, scale, rows):
        kv_scale = scale if scaled else None
        return dispatch.write(pool, new, new, rows, layer=layer, kv_scale=kv_scale, backend="gpu")

    def copy(pool, source_ids, target_ids):
        return dispatch.copy_pages(pool, source_ids, target_ids, backend="gpu")

    held_bytes = None  # beside a pool that is donated
    if kernel == "copy":
        ids = Struct((_NUM_COPIES,), jnp.int32)
        function, args = copy, (ids, ids)
        held_bytes = _NUM_COPIES * layout.page_bytes(pool.shape, pool.dtype)
    elif kernel == "write":
        tokens = Struct((num_tokens, shape.num_kv_heads, shape.head_dim), dtype)
        function, args = write, (tokens, layer, scale, rows)
        held_bytes = 0
    else:
        tokens = Struct((num_tokens, shape.num_q_heads, shape.head_dim), dtype)
        function, args = attend, (tokens, layer, scale, shape.sinks_struct, rows)
    donated = () if held_bytes is None else (0,)
    compiled = try_compile(compiler, compiler.mesh(), function, pool, *args, donate_argnums=donated)
    if isinstance(compiled, str):
        ours = compiled.startswith("ValueError: ") and "backend 'gpu'" in compiled
        rule = compiled.removeprefix("ValueError: ")
        return KernelFacts(refused=rule) if ours else KernelFacts(error=compiled)
    memory = compiled.memory_analysis()
    assert memory is not None
    temp_bytes, error = memory.temp_size_in_bytes, None
    if held_bytes is not None:
        error = in_place_error(compiled, pool, held_bytes)
    else:
        # Attention holds what its splits give, in float32, but not the pages of one layer.
        results = 4 * num_tokens * shape.num_q_heads * shape.head_dim
        if temp_bytes > max(num_bytes(pool) // pool.shape[0] - 1, 8 * results):
            error = f"takes {temp_bytes} bytes beside a pool of {num_bytes(pool)}"
    said = "".join(path.read_text() for path in sorted(dump.glob("*.ptxas")))
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill stores", said)]
    return KernelFacts(
        registers=max(registers, default=None),
        spill_bytes=max(spills, default=None),
        temp_bytes=temp_bytes,
        error=error,
    )
