# SPDX-License-Identifier: Apache-2.0
"""Which GPU a trace is for, and what that chip holds."""

import dataclasses

import jax

from jpaged.pallas_kernels import interpreting

# Opt-in shared memory of a thread block, by compute capability.
# Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
_SMEM_BYTES = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 7): 163 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (10, 3): 227 * 1024,
    (12, 0): 99 * 1024,
    (12, 1): 99 * 1024,
}

# Compute capability by what a device's name contains, for chips that are only compiled for: an
# abstract device has a name and no more.
_CAPABILITY_OF_NAME = {
    "A100": (8, 0),
    "A30": (8, 0),
    "A10": (8, 6),
    "A40": (8, 6),
    "A6000": (8, 6),
    "RTX 30": (8, 6),
    "L4": (8, 9),
    "L40": (8, 9),
    "RTX 40": (8, 9),
    "H100": (9, 0),
    "H200": (9, 0),
    "H800": (9, 0),
    "GH200": (9, 0),
    "B200": (10, 0),
    "GB200": (10, 0),
    "B300": (10, 3),
    "GB300": (10, 3),
    "RTX 50": (12, 0),
}


# Multiprocessors of a GPU that does not say: those of an H100. They decide how much work is cut up.
_USUAL_NUM_SMS = 132


@dataclasses.dataclass(frozen=True)
class Chip:
    """One GPU.

    Attributes:
      name: as the driver gives it.
      capability: compute capability, major and minor.
      num_sms: streaming multiprocessors.
      smem_bytes: shared memory that one thread block can have.
    """

    name: str
    capability: tuple[int, int]
    num_sms: int
    smem_bytes: int


# What interpreted kernels are planned for: few multiprocessors, so that there is little to do.
INTERPRETED = Chip("NVIDIA H100", (9, 0), 4, _SMEM_BYTES[9, 0])


def target_chip() -> Chip:
    """The chip to lower for: the abstract mesh's where one is set, else the default device's.

    On any other platform kernels can only be interpreted, as if for an H100.

    Raises:
      ValueError: for a GPU of which the kernels know nothing.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.platform == "gpu":
        words = abstract.device_kind
        matches = [name for name in _CAPABILITY_OF_NAME if f" {name}" in words]
        if not matches:
            raise ValueError(
                f"backend 'gpu' does not know the GPU {words!r}, only those whose name contains "
                f"one of {', '.join(_CAPABILITY_OF_NAME)}"
            )
        capability = _CAPABILITY_OF_NAME[max(matches, key=len)]
        return _chip(words, capability, abstract.num_cores or _USUAL_NUM_SMS)
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return INTERPRETED
    major, minor = str(device.compute_capability).split(".")
    return _chip(device.device_kind, (int(major), int(minor)), device.core_count)


def _chip(name: str, capability: tuple[int, int], num_sms: int) -> Chip:
    if capability not in _SMEM_BYTES:
        known = ", ".join(f"{major}.{minor}" for major, minor in _SMEM_BYTES)
        raise ValueError(
            f"backend 'gpu' knows compute capabilities {known}, not {capability[0]}."
            f"{capability[1]} of {name!r}; pass backend='xla' to run the XLA kernels on it"
        )
    return Chip(name, capability, num_sms, _SMEM_BYTES[capability])


def check_platform() -> None:
    """Raises ValueError where GPU kernels can neither run, nor be compiled, nor be interpreted."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if jax.default_backend() == "gpu" or (abstract is not None and abstract.platform == "gpu"):
        return
    if not interpreting.is_forced():
        raise ValueError(
            f"backend 'gpu' on platform {jax.default_backend()!r}: its kernels run on NVIDIA GPUs "
            "only; pass backend='xla', or interpret them, slowly, within "
            "jpaged.pallas_kernels.conformance.interpret_gpu()"
        )
