# SPDX-License-Identifier: Apache-2.0
"""The TPU generations and their compiler."""

import dataclasses
import importlib.util
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jpaged.pallas_kernels.aot.lowering import compile_for
from jpaged.pallas_kernels.aot.schedule import Schedule, read_schedule


@dataclasses.dataclass(frozen=True)
class Target:
    """A TPU generation.

    Attributes:
      topology: a slice of it that libtpu knows, of four devices or more.
      hbm_bytes_per_s: bandwidth of a device's memory.
      source: the page that publishes it, per chip. jax counts a v4 or v5p, which has two cores, as
        one device, and a 7x as two.
      dma_granule_bytes: the unit of the sizes of copies in schedules (from copies of known size).
    """

    topology: str
    hbm_bytes_per_s: float
    source: str
    dma_granule_bytes: int


_DOCS = "https://cloud.google.com/tpu/docs"
TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "v4": Target("v4:2x2x1", 1228e9, f"{_DOCS}/v4", 512),
        "v5e": Target("v5e:2x2", 819e9, f"{_DOCS}/v5e", 32),
        "v5p": Target("v5p:2x2x1", 2765e9, f"{_DOCS}/v5p", 32),
        "v6e": Target("v6e:2x2", 1638e9, f"{_DOCS}/v6e", 32),
        "7x": Target("tpu7x:2x2x1", 7380e9 / 2, f"{_DOCS}/tpu7x", 32),
    }
)

# The environment of a machine without a TPU, in which libtpu would look for one.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Compiling needs no chip, so others may do it at the same time.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def find_libtpu() -> pathlib.Path | None:
    """The compiler: where TPU_LIBRARY_PATH says, or `make libtpu` puts it, or a package has it."""
    places = [pathlib.Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"]
    if named := os.environ.get("TPU_LIBRARY_PATH"):
        places = [pathlib.Path(named)]
    elif (spec := importlib.util.find_spec("libtpu")) and spec.submodule_search_locations:
        places.append(pathlib.Path(spec.submodule_search_locations[0]) / "libtpu.so")
    return next((path for path in places if path.exists()), None)


class TpuCompiler:
    """libtpu, loaded into this process to compile.

    Loading it sets environment variables of libtpu's, and its options hold for the whole process:
    whether schedules are written is decided by the first instance.
    """

    def __init__(self, schedules: bool = False):
        """Loads libtpu.

        Args:
          schedules: whether `schedule` is wanted. Makes compilation slower.

        Raises:
          RuntimeError: if there is no libtpu.
        """
        path = find_libtpu()
        if path is None:
            raise RuntimeError(
                "no libtpu to compile with: install the package libtpu in the version that this "
                "jax names (make libtpu), or let TPU_LIBRARY_PATH name its libtpu.so"
            )
        os.environ.update(_ENVIRONMENT | {"TPU_LIBRARY_PATH": str(path)})
        self._dump: pathlib.Path | None = None
        if schedules:
            self._directory = tempfile.TemporaryDirectory(prefix="tpu-schedules-")
            self._dump = pathlib.Path(self._directory.name)
            os.environ["LIBTPU_INIT_ARGS"] = (
                f"--xla_jf_dump_to={self._dump} --xla_jf_dump_llo_pass_label_regex=final.*"
            )

    def close(self) -> None:
        """Removes the schedules."""
        if self._dump is not None:
            self._directory.cleanup()
            self._dump = None

    def mesh(self, target: str, num_devices: int = 1, axis: str = "tp") -> Mesh:
        """Some of a generation's devices, on one axis.

        Raises:
          ValueError: if the slice that libtpu is asked for has fewer.
        """
        topology = topologies.get_topology_desc(
            topology_name=TARGETS[target].topology, platform="tpu"
        )
        if num_devices > len(topology.devices):
            raise ValueError(
                f"num_devices={num_devices}: steps are compiled for at most "
                f"{len(topology.devices)} devices of {target}, a slice {TARGETS[target].topology}"
            )
        devices = np.array(topology.devices[:num_devices])
        return Mesh(devices, (axis,), axis_types=(AxisType.Auto,))

    def compile(
        self,
        mesh: Mesh,
        function: Callable[..., Any],
        *args: Any,
        donate_argnums: tuple[int, ...] = (),
        compiler_options: Mapping[str, Any] | None = None,
    ) -> jax.stages.Compiled:
        """Compiles for a mesh of `mesh`; see `compile_for`."""
        if self._dump is not None:
            for path in self._dump.iterdir():
                path.unlink()
        return compile_for(
            mesh,
            function,
            *args,
            donate_argnums=donate_argnums,
            compiler_options=compiler_options,
        )

    def schedule(self, target: str, kernel: str) -> Schedule:
        """The schedule of a kernel of the last compilation, by its name.

        Raises:
          RuntimeError: if schedules are not written.
          FileNotFoundError: if there is none of that name.
        """
        if self._dump is None:
            raise RuntimeError("TpuCompiler(schedules=True) writes schedules")
        return read_schedule(self._dump, kernel, TARGETS[target].dma_granule_bytes)
