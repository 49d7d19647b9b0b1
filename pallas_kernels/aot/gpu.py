# SPDX-License-Identifier: Apache-2.0
"""NVIDIA GPUs and their compiler."""

import dataclasses
import functools
import importlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jpaged.pallas_kernels.aot.lowering import compile_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """A GPU, as far as the compiler asks about it.

    Attributes:
      name: as the driver gives it.
      capability: compute capability, major and minor.
      num_sms: streaming multiprocessors.
      fpus_per_sm: float32 units of one.
      smem_per_sm: bytes of shared memory of one.
      smem_per_block: of which a thread block can have so many.
      l2_bytes: second-level cache.
      memory_bytes: device memory.
      memory_bytes_per_s: its bandwidth.
      clock_ghz: boost clock.
    """

    name: str
    capability: tuple[int, int]
    num_sms: int
    fpus_per_sm: int
    smem_per_sm: int
    smem_per_block: int
    l2_bytes: int
    memory_bytes: int
    memory_bytes_per_s: float
    clock_ghz: float


_H100 = GpuTarget(
    name="NVIDIA H100",
    capability=(9, 0),
    num_sms=132,
    fpus_per_sm=128,
    smem_per_sm=228 * 1024,
    smem_per_block=227 * 1024,
    l2_bytes=50 * 2**20,
    memory_bytes=80 * 10**9,
    memory_bytes_per_s=3352e9,
    clock_ghz=1.98,
)
# Source: NVIDIA's data sheets, and OpenXLA's specs of the same chips (xla/tools/hlo_opt/gpu_specs).
GPU_TARGETS: Mapping[str, GpuTarget] = MappingProxyType(
    {
        "a100": GpuTarget(
            name="NVIDIA A100",
            capability=(8, 0),
            num_sms=108,
            fpus_per_sm=64,
            smem_per_sm=164 * 1024,
            smem_per_block=163 * 1024,
            l2_bytes=40 * 2**20,
            memory_bytes=80 * 10**9,
            memory_bytes_per_s=2039e9,
            clock_ghz=1.41,
        ),
        "h100": _H100,
        # The same chip with other memory.
        "h200": dataclasses.replace(
            _H100, name="NVIDIA H200", memory_bytes=141 * 10**9, memory_bytes_per_s=4800e9
        ),
        "b200": GpuTarget(
            name="NVIDIA B200",
            capability=(10, 0),
            num_sms=148,
            fpus_per_sm=128,
            smem_per_sm=228 * 1024,
            smem_per_block=227 * 1024,
            l2_bytes=126 * 2**20,
            memory_bytes=180 * 10**9,
            memory_bytes_per_s=7672e9,
            clock_ghz=1.965,
        ),
    }
)

_TARGET_CONFIG = """\
gpu_device_info {{
  name: "{name}" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  core_count: {num_sms} fpus_per_core: {fpus_per_sm} clock_rate_ghz: {clock_ghz}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: {smem_per_sm} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {smem_per_block}
  l2_cache_size: {l2_bytes} device_memory_size: {memory_bytes} memory_bandwidth: {bandwidth}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA" device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
"""


def find_cuda_compiler() -> pathlib.Path | None:
    """The folder of jax's CUDA plugin and NVIDIA's compiler: where `make cuda-compiler` puts it.

    An environment that has them installed has them in no folder of their own, but on its path.
    """
    folder = pathlib.Path(sys.prefix) / "cuda-compiler"
    if (folder / "jax_plugins").exists():
        return folder
    spec = importlib.util.find_spec("jax_cuda13_plugin")
    if spec is None or not spec.submodule_search_locations:
        return None
    return pathlib.Path(spec.submodule_search_locations[0]).parent


class GpuCompiler:
    """XLA's GPU compiler, in jax's CUDA plugin, loaded into this process to compile.

    It needs no GPU and no driver. One process compiles for one target: Mosaic GPU keeps the
    architecture that it compiled for first.
    """

    def __init__(self, target: str):
        """Loads the plugin.

        Args:
          target: of `GPU_TARGETS`.

        Raises:
          RuntimeError: if there is none.
        """
        folder = find_cuda_compiler()
        if folder is None:
            raise RuntimeError(
                "no compiler for NVIDIA GPUs: install jax-cuda13-plugin and jax-cuda13-pjrt in the "
                "version of this jax, nvidia-cuda-nvcc and nvidia-nvvm (make cuda-compiler)"
            )
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        # Imported, the plugin would look for a GPU, and for libraries that only a GPU needs.
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        self._gpu = GPU_TARGETS[target]

    def mesh(self, num_devices: int = 1, axis: str = "tp") -> Mesh:
        """GPUs of one host, on one axis."""
        gpu = self._gpu
        config = _TARGET_CONFIG.format(
            **dataclasses.asdict(gpu),
            major=gpu.capability[0],
            minor=gpu.capability[1],
            features="ACCELERATED_FEATURES" if gpu.capability[0] >= 9 else "NONE",
            bandwidth=int(gpu.memory_bytes_per_s),
        )
        describe = functools.partial(
            topologies.get_topology_desc,
            platform="cuda",
            topology_name="",
            topology=f"1x1x{num_devices}",
            target_config=config,
        )
        try:
            topology = describe()
        except NotImplementedError:
            # jax has looked for plugins before this one could be found, and looks but once.
            importlib.import_module("jax_plugins.xla_cuda13").initialize()
            topology = describe()
        return Mesh(np.array(topology.devices), (axis,), axis_types=(AxisType.Auto,))

    def compile(
        self,
        mesh: Mesh,
        function: Callable[..., Any],
        *args: Any,
        donate_argnums: tuple[int, ...] = (),
        compiler_options: Mapping[str, Any] | None = None,
    ) -> jax.stages.Compiled:
        """Compiles for a mesh of `mesh`; see `compile_for`."""
        return compile_for(
            mesh,
            function,
            *args,
            donate_argnums=donate_argnums,
            compiler_options=compiler_options,
        )
