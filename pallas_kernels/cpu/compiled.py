# SPDX-License-Identifier: Apache-2.0
"""How kernels become machine code, and how XLA gets to know them."""

import ctypes
import threading
from collections.abc import Callable

import jax
import llvmlite.binding as llvm
from llvmlite import ir

from jpaged.pallas_kernels.cpu.chip import Chip

_lock = threading.Lock()
# By what XLA calls them, for as long as the process lives: programs may call them any time.
_kept: dict[str, "Compiled"] = {}


class Compiled:
    """Machine code of a module, for as long as this lives."""

    def __init__(self, module: ir.Module, chip: Chip):
        """Compiles. Args: what, checked by LLVM first; for which processor."""
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        target = llvm.Target.from_default_triple().create_target_machine(
            cpu=chip.cpu, features=chip.features, opt=2
        )
        parsed = llvm.parse_assembly(str(module))
        parsed.verify()
        self._engine = llvm.create_mcjit_compiler(parsed, target)
        self._engine.finalize_object()

    def address(self, function: str) -> int:
        """Where a function's code is."""
        return self._engine.get_function_address(function)

    def handler(self, function: str) -> Callable[[int], int | None]:
        """A handler, to be called from Python with the address of an XLA_FFI_CallFrame."""
        return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(self.address(function))

    def register(self, function: str, target: str) -> None:
        """Tells XLA of a handler. Args: which function it is; what programs call it."""
        capsule = jax.ffi.pycapsule(self.handler(function))
        jax.ffi.register_ffi_target(target, capsule, platform="cpu")


def ensure(target: str, handler: str, module: Callable[[], ir.Module], chip: Chip) -> None:
    """Sees to it that XLA knows a handler: compiles it when it is first asked for.

    Args:
      target: what programs call it.
      handler: the function of the module that it is.
      module: makes the module.
      chip: for which processor.
    """
    with _lock:
        if target not in _kept:
            compiled = Compiled(module(), chip)
            compiled.register(handler, target)
            _kept[target] = compiled
