# SPDX-License-Identifier: Apache-2.0
"""What differs between the versions of jax, 0.10.2 to 0.12; nothing else asks which one this is.

Where jax has no public name, its private ones are here too, as they move between versions. What a
newer jax has is looked for, not its version, so that a function can go with the last one without.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax


def mosaic_load(ref: Any, layout: Any) -> jax.Array:
    """Loads from global memory within a kernel of Mosaic GPU, to registers laid out by `layout`.

    jax 0.10 wants an index also beside a reference that has one, 0.11 warns of it, and 0.12 takes
    none.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = inspect.signature(plgpu.load).parameters.get("idx")
    needed = index is not None and index.default is inspect.Parameter.empty
    return plgpu.load(ref, *([()] if needed else []), layout=layout, optimized=False)


def mosaic_store(ref: Any, numbers: jax.Array) -> None:
    """Stores to shared memory without a swizzle, within a kernel of Mosaic GPU.

    Registers as the tensor cores lay them out conflict over banks there. Assignment allows that up
    to jax 0.11; 0.12 refuses it, and has a function that allows it.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    store: Any = getattr(plgpu, "store", None)
    if store is None:
        ref[...] = numbers
    else:
        store(ref, numbers, optimized=False)


def launched_processes() -> tuple[int | None, int | None, Sequence[int] | None]:
    """What `jax.distributed.initialize` finds of how this process was started, and starts nothing.

    Returns:
      How many processes a launcher has started, which this is, and the devices that are its own;
      None where it finds nothing.
    """
    from jax._src import clusters

    find = clusters.ClusterEnv.auto_detect_unset_distributed_params
    # Given an address, it does not ask the network for one.
    return find("none:1", None, None, None, None, None)[1:]


def cpu_converts_bfloat16() -> bool:
    """Whether the CPU compiler converts a whole array around gathers and updates of bfloat16.

    jax 0.10 does, and so copies a donated pool of pages.
    """
    return jax.__version_info__ < (0, 11)


def compiled_programs() -> list[str]:
    """Optimised HLO, as text, of the programs that live on the default device, if it shows any."""
    client = jax.local_devices()[0].client
    try:
        executables = client.live_executables()
        return [module.to_string() for each in executables for module in each.hlo_modules()]
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return []


def quick_to_compile() -> str:
    """Flags of XLA with which programs for the CPU compile in the least time, and run slower.

    LLVM's optimisations are a third of the time. Of jax 0.10, the emitters that build fusions in
    MLIR are half of the rest; later versions have no others.
    """
    emitters = jax.__version_info__ < (0, 11)
    return "--xla_backend_optimization_level=0" + (
        " --xla_cpu_use_fusion_emitters=false" if emitters else ""
    )


def interprets_mosaic() -> bool:
    """Whether jax interprets what Mosaic GPU's kernels multiply with: from 0.11 on."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return hasattr(plgpu, "InterpretGPUParams")


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """One of jax's interpreters of kernels.

    Attributes:
      mode: what jax is told to interpret with.
      module: where its functions are.
      reset: forgets what an interpretation that failed has left.
      race_state: name in `module` of the class that holds what races were found; empty where it
        looks for none.
      copy_to_shared: name in `module` of the copy from global to shared memory, or empty.
    """

    mode: Any
    module: ModuleType
    reset: Callable[[], None]
    race_state: str = ""
    copy_to_shared: str = ""

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """Has jax interpret the kernels that are traced within.

        Public functions do so for TPUs, from jax 0.11 on for Mosaic GPU, and for Triton never.
        """
        from jax._src import config

        self.reset()
        before = config.pallas_tpu_interpret_mode_context_manager.swap_local(self.mode)
        try:
            yield
        finally:
            config.pallas_tpu_interpret_mode_context_manager.set_local(before)
            self.reset()


def tpu_interpreter() -> Interpreter:
    """That of TPU kernels."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as module
    from jax.experimental.pallas import tpu as pltpu

    mode = _noting_races(pltpu.InterpretParams)
    return Interpreter(mode, module, module.reset_tpu_interpret_mode_state, "RaceDetectionState")


def mosaic_interpreter() -> Interpreter:
    """That of Mosaic GPU's kernels.

    Raises:
      RuntimeError: with jax 0.10, see `interprets_mosaic`.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as module
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not interprets_mosaic():
        raise RuntimeError(
            f"jax {jax.__version__} cannot interpret Mosaic GPU's products; jax 0.11 can"
        )
    params: Any = plgpu.InterpretGPUParams  # pyright: ignore[reportAttributeAccessIssue]
    return Interpreter(
        _noting_races(params),
        module,
        module.reset_gpu_interpret_mode_state,
        race_state="GPURaceDetectionState",
        copy_to_shared="copy_gmem_to_smem",
    )


def triton_interpreter() -> Interpreter:
    """That of Triton's kernels: the plain one of Pallas, which has no copies to order."""
    from jax._src.pallas import pallas_call as module

    return Interpreter(True, module, lambda: None)


def _noting_races(params: Any) -> Any:
    """Parameters with which races are noted.

    From jax 0.12 on they would be raised in the midst of a kernel, and no more than the first.
    """
    on_race = {"on_race": "warn"} if "on_race" in inspect.signature(params).parameters else {}
    return params(detect_races=True, **on_race)
