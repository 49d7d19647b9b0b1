# SPDX-License-Identifier: Apache-2.0
"""The few phrases of LLVM's language that kernels are written in."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llvmlite import ir

# llvmlite says nothing of its types, and what is inferred of them is wrong.
Value = Any
_Builder: Any = ir.IRBuilder

VOID, I32, I64, F32, PTR = (
    *(ir.VoidType(), ir.IntType(32), ir.IntType(64)),
    *(ir.FloatType(), ir.PointerType()),
)


def i64(value: int) -> ir.Constant:
    """A number as code has it."""
    return ir.Constant(I64, value)


def function(
    module: ir.Module, name: str, arguments: Sequence[ir.Type], returns: ir.Type = VOID
) -> ir.Function:
    """One of the module by that name, made if there is none yet; without a body it is declared."""
    if name in module.globals:
        return module.globals[name]
    return ir.Function(module, ir.FunctionType(returns, arguments), name)


def untyped(pointer: Value) -> Value:
    """A pointer as LLVM has them; llvmlite gives some that are typed by what they point to."""
    pointer.type = PTR
    return pointer


class Emitter(_Builder):
    """Writes the body of a function from its beginning to its end."""

    def __init__(self, function: ir.Function):
        """Begins."""
        super().__init__(function.append_basic_block("entry"))

    @contextlib.contextmanager
    def loop(self, start: Value, stop: Value, step: Value) -> Iterator[Value]:
        """Does what is written within for i64 numbers from `start` on that are below `stop`."""
        before, head = self.block, self.append_basic_block("loop")
        body, end = self.append_basic_block("body"), self.append_basic_block("end")
        self.branch(head)
        self.position_at_end(head)
        index = self.phi(I64)
        index.add_incoming(start, before)
        self.cbranch(self.icmp_signed("<", index, stop), body, end)
        self.position_at_end(body)
        yield index
        index.add_incoming(self.add(index, step), self.block)
        self.branch(head)
        self.position_at_end(end)

    @contextlib.contextmanager
    def repeat(self, start: Value, stop: Value) -> Iterator[tuple[Value, Callable[[Value], None]]]:
        """Like `loop`, but what is written within calls what it is given with the next number."""
        place = self.place(8)
        self.write(place, 0, start)
        head, body, end = (self.append_basic_block("repeat") for _ in range(3))
        self.branch(head)
        self.position_at_end(head)
        index = self.read(place, 0, I64)
        self.cbranch(self.icmp_signed("<", index, stop), body, end)
        self.position_at_end(body)
        yield index, lambda following: self.write(place, 0, following)
        self.branch(head)
        self.position_at_end(end)

    def place(self, size: int) -> Value:
        """Where so many bytes of the function's own are, in words of 8."""
        with self.goto_entry_block():
            return untyped(self.alloca(ir.ArrayType(I64, size // 8)))

    def at(self, pointer: Value, index: Value) -> Value:
        """Where the float32 number of that index is."""
        return self.gep(pointer, [index], source_etype=F32)

    def field(self, pointer: Value, offset: int) -> Value:
        """Where a structure's field is, so many bytes from its beginning."""
        return self.gep(pointer, [i64(offset)], source_etype=ir.IntType(8))

    def read(self, pointer: Value, offset: int, kind: ir.Type) -> Value:
        """A structure's field."""
        return self.load(self.field(pointer, offset), typ=kind)

    def write(self, pointer: Value, offset: int, value: Value) -> None:
        """Writes a structure's field."""
        self.store(value, self.field(pointer, offset))

    def call_at(self, pointer: Value, returns: ir.Type, arguments: Sequence[Value]) -> Value:
        """Calls the function that is there."""
        kind = ir.FunctionType(returns, [value.type for value in arguments])
        return self.call(_FunctionAt(pointer, kind), arguments)

    def smaller(self, a: Value, b: Value) -> Value:
        """The smaller one of two signed numbers."""
        return self.select(self.icmp_signed("<", a, b), a, b)

    def larger(self, a: Value, b: Value) -> Value:
        """The larger one of two signed numbers."""
        return self.select(self.icmp_signed("<", a, b), b, a)

    def quotient_up(self, number: Value, divisor: Value) -> Value:
        """A quotient of numbers from 0 on, rounded up."""
        return self.udiv(self.add(number, self.sub(divisor, i64(1))), divisor)


class _FunctionAt:
    """A pointer as `call` takes one: llvmlite asks what it points to, which LLVM's do not say."""

    def __init__(self, pointer: Value, kind: ir.FunctionType):
        self.type, self.function_type, self.get_reference = PTR, kind, pointer.get_reference
