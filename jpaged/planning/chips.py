# SPDX-License-Identifier: Apache-2.0
"""How much memory jax can allocate on the devices of well-known chips."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import psutil

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """The memory of what jax calls a device.

    Attributes:
      platform: as jax names it.
      total_bytes: that there are.
      share: of them that jax allocates.
      source: where the number comes from.
      target: name of what `pallas_kernels.aot` compiles for; None where that knows none.
      kind: name of the device as jax has it, by which kernels know it; None asks no kernel.
    """

    platform: str
    total_bytes: int
    source: str
    share: float = 1.0
    target: str | None = None
    kind: str | None = None

    @property
    def num_bytes(self) -> int:
        """What jax can allocate."""
        return int(self.total_bytes * self.share)


# Unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
# Source: https://docs.jax.dev/en/latest/gpu_memory_allocation.html
_GPU_SHARE = 0.75


def _gpu(total_gib: float, name: str, target: str | None = None) -> DeviceMemory:
    source = f"{_GPU_SHARE:.0%} of the {total_gib} GiB of CUDA, as jax does unless told"
    kind = f"NVIDIA {name}"
    return DeviceMemory("gpu", int(total_gib * GIB), source, _GPU_SHARE, target, kind)


def _tpu(
    gib: float, kind: str, target: str, source: str = "as libtpu 0.0.42.1 says"
) -> DeviceMemory:
    return DeviceMemory("tpu", int(gib * GIB), source, target=target, kind=kind)


# Of GPUs, what CUDA gives in all, which PyTorch's errors tell and NVIDIA's data sheets round; of
# TPUs, what the compiler says of a program that takes too much ("exceeds available HBM"). That of
# b200 and a100-40gb nobody has read off a device.
CHIPS: Mapping[str, DeviceMemory] = MappingProxyType(
    {
        "a100": _gpu(79.1, "A100", "a100"),
        "a100-40gb": _gpu(39.3, "A100", "a100"),
        "b200": _gpu(178.3, "B200", "b200"),
        "h100": _gpu(79.1, "H100", "h100"),
        "h200": _gpu(139.7, "H200", "h200"),
        "l4": _gpu(22.0, "L4"),
        "l40s": _gpu(44.4, "L40S"),
        # jax has the two cores of a chip as one device, and libtpu compiles for each of them here.
        "v4": _tpu(30.5, "TPU v4", "v4", "twice what libtpu 0.0.42.1 says of each core"),
        "v5e": _tpu(15.75, "TPU v5 lite", "v5e"),
        "v5p": _tpu(95.74, "TPU v5", "v5p"),
        "v6e": _tpu(31.25, "TPU v6 lite", "v6e"),
        "7x": _tpu(94.75, "TPU7x", "7x", "as libtpu 0.0.42.1 says of a device, half a chip"),
    }
)


def memory_of(chip: str, memory_gib: float | None = None) -> DeviceMemory:
    """The memory of a device.

    Args:
      chip: of `CHIPS`; "cpu" is this machine.
      memory_gib: that jax can allocate, instead of what is known.

    Raises:
      ValueError: if the chip is not known, or the memory is not above 0.
    """
    if chip == "cpu":
        found = DeviceMemory("cpu", psutil.virtual_memory().available, "available on this host")
    elif chip in CHIPS:
        found = CHIPS[chip]
    else:
        raise ValueError(f"chip={chip!r}: choose among {', '.join((*CHIPS, 'cpu'))}")
    if memory_gib is None:
        return found
    if not 0 < memory_gib < 2**30:
        raise ValueError(f"memory_gib={memory_gib} must be above 0 and below {2**30}")
    total_bytes = int(memory_gib * GIB)
    return dataclasses.replace(found, total_bytes=total_bytes, share=1.0, source="as asked")
