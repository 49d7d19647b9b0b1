# SPDX-License-Identifier: Apache-2.0
"""What compiled programs say of themselves, whatever they were compiled for."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.pallas_kernels.aot.gpu import GpuCompiler
from jpaged.pallas_kernels.aot.tpu import TpuCompiler

# Of the pool: what calls and steps may take beside it, and still count as working in place.
MAX_TEMP_SHARE = 0.05
# Operations that give an array without copying it.
_PASSING_ON = {"get-tuple-element", "parameter", "custom-call", "bitcast"}


def try_compile(
    compiler: TpuCompiler | GpuCompiler,
    mesh: jax.sharding.Mesh,
    function: Callable,
    *args: Any,
    **options: Any,
) -> jax.stages.Compiled | str:
    """The compiled program, or why it is refused, in at most 300 characters."""
    try:
        return compiler.compile(mesh, function, *args, **options)
    except Exception as e:  # ours refuse with ValueError, the compiler with errors of many kinds
        lines = str(e).strip().splitlines() or [""]
        return f"{type(e).__name__}: {lines[0]}"[:300]


def in_place_error(
    compiled: jax.stages.Compiled, pool: jax.ShapeDtypeStruct, held_bytes: int = 0
) -> str | None:
    """What is wrong with a program that must give a donated pool back in the same memory.

    Args:
      compiled: the program.
      pool: what stands for the pool.
      held_bytes: that it may hold beside the pool.
    """
    memory = compiled.memory_analysis()
    assert memory is not None
    pool_bytes, temp_bytes = num_bytes(pool), memory.temp_size_in_bytes
    if memory.alias_size_in_bytes < pool_bytes:
        return f"aliases {memory.alias_size_in_bytes} bytes of a pool of {pool_bytes}"
    if temp_bytes > MAX_TEMP_SHARE * pool_bytes + held_bytes:
        return f"takes {temp_bytes} bytes beside a pool of {pool_bytes}"
    return None


def num_bytes(array: jax.ShapeDtypeStruct) -> int:
    """Bytes of what an array's shape stands for."""
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize


def operations_giving(compiled: jax.stages.Compiled, shape: Sequence[int]) -> tuple[str, ...]:
    """Operations whose result is an array of this shape, but for those that pass one on.

    A copy or a transpose of an array of that shape would be among them.
    """
    dims = ",".join(map(str, shape))
    found = re.findall(rf"= \w+\[{dims}\]\S* ([\w-]+)\(", _text(compiled))
    return tuple(name for name in found if name not in _PASSING_ON)


def collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """How often each operation between devices stands in the program."""
    found = re.findall(
        r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        _text(compiled),
    )
    return {name: found.count(name) for name in sorted(set(found))}


def _text(compiled: jax.stages.Compiled) -> str:
    text = compiled.as_text()
    assert text is not None
    return text
