# SPDX-License-Identifier: Apache-2.0
"""Which TPU a trace is for, and what that chip holds."""

import dataclasses

import jax
from jax.experimental.pallas import tpu as pltpu

from jpaged.pallas_kernels import interpreting


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TensorCore.

    Attributes:
      name: generation as Google names it, such as "v5e".
      vmem_bytes: vector memory.
      smem_bytes: scalar memory.
    """

    name: str
    vmem_bytes: int
    smem_bytes: int


# What interpret mode holds kernels to: the least of any generation that they are made for.
_INTERPRETED = Chip("v4", 16 * 2**20, 2**20)


def target_chip() -> Chip:
    """The chip to lower for: the abstract mesh's where one is set, else the default device's.

    On any other platform kernels can only be interpreted, as if for the smallest chip.
    """
    if not pltpu.is_tpu_device():
        return _INTERPRETED
    info = pltpu.get_tpu_info()
    return Chip(str(info.chip_version), info.vmem_capacity_bytes, info.smem_capacity_bytes)


def check_platform() -> None:
    """Raises ValueError where TPU kernels can neither run, nor be compiled, nor be interpreted."""
    if jax.default_backend() == "tpu" or pltpu.is_tpu_device():
        return
    if not interpreting.is_forced():
        raise ValueError(
            f"backend 'tpu' on platform {jax.default_backend()!r}: its kernels run on TPUs only; "
            "pass backend='xla', or interpret them, slowly, within "
            "jax.experimental.pallas.tpu.force_tpu_interpret_mode()"
        )


def in_hbm(kv_pages: jax.Array) -> jax.Array:
    """Keeps a pool that a kernel only reads in HBM.

    The compiler of a chip with much vector memory would copy one of some MiB there at every call.
    It leaves alone what is written in place, and refuses this constraint on it ("Different aliasing
    shapes").
    """
    return pltpu.with_memory_space_constraint(kv_pages, pltpu.HBM)
