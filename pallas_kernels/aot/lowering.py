# SPDX-License-Identifier: Apache-2.0
"""What compiling for any device that is not there takes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def compile_for(
    mesh: Mesh,
    function: Callable[..., Any],
    *args: Any,
    donate_argnums: tuple[int, ...] = (),
    compiler_options: Mapping[str, Any] | None = None,
) -> jax.stages.Compiled:
    """Compiles for the devices of a mesh.

    Args:
      mesh: what for.
      function: what to compile.
      *args: pytrees of `jax.ShapeDtypeStruct`; those without a sharding are replicated.
      donate_argnums: as in `jax.jit`.
      compiler_options: likewise.

    Raises:
      Exception: what the compiler raises, for example for too much on-chip memory.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(leaf):
        if leaf.sharding is not None:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    jitted = jax.jit(function, donate_argnums=donate_argnums)
    # Kernels ask the abstract mesh which chip they are traced for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jitted.lower(*jax.tree.map(place, args))
    # A program out of jax's cache could not be loaded here, and would leave no schedule.
    # jax defines the attributes of its config at run time.
    cached = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        return lowered.compile(dict(compiler_options or {}))
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        compilation_cache.reset_cache()
