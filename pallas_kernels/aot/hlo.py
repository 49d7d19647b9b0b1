# SPDX-License-Identifier: Apache-2.0
"""Reads the text of an optimised program: what its devices run, what of it copies weights."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

# What takes no work of the device by itself: names for arrays, and what other operations are in.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier"),
    *("after-all", "partition-id", "replica-id", "while", "conditional", "call"),
}
_PASSING_ON = {"bitcast", "opt-barrier", "get-tuple-element", "tuple", "while"}
_PRODUCTS = {"dot", "convolution", "ragged-dot", "custom-call"}
_ATTENTION = "paged_attention"
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# Types have spaces and parentheses in them, but no word before a parenthesis.
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\w+\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
# Of a TPU's memory spaces those beside its cores, into which weights come to be multiplied: vector
# memory, and what a v4 has beside it.
_ON_CHIP = re.compile(r"S\([13]\)")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a program.

    Attributes:
      name: of its result.
      result: its type.
      opcode: what it does.
      operands: names.
      text: of operands and attributes.
    """

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    text: str

    @property
    def num_elements(self) -> int:
        """Of the largest array of its result that is not beside a TPU's cores."""
        arrays = _ARRAY.findall(self.result)
        sizes = [_size(dims) for dims, layout in arrays if not _ON_CHIP.search(layout)]
        return max(sizes, default=0)

    @property
    def is_kernel(self) -> bool:
        """Whether a device is given work by it; what is waited for was given before."""
        return self.opcode not in _FREE and not self.opcode.endswith(("-done", "-update"))

    @property
    def is_attention(self) -> bool:
        """Whether it is one of our kernels of that name."""
        return self.opcode == "custom-call" and _ATTENTION in self.text

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs, conditions of loops left out."""
        branches = _BRANCHES.search(self.text)
        names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
        return (*_CALLED.findall(self.text), *names)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, as its text has it.

    Attributes:
      computations: operations by the name of the computation that they are in, in order.
      entry: which of those is called.
    """

    computations: Mapping[str, Sequence[Operation]]
    entry: str

    def run_by_device(self) -> list[Sequence[Operation]]:
        """The entry, and bodies of loops and branches: operations that are launched one by one."""
        found, names = [], [self.entry]
        for name in names:  # grows as it goes
            found.append(self.computations[name])
            for operation in self.computations[name]:
                if operation.opcode in ("while", "conditional", "call"):
                    names += [called for called in operation.called if called not in names]
        return found

    def multiplies(self, operation: Operation) -> bool:
        """Whether it is a matrix product, or one of a library, or has one in it."""
        if operation.opcode in _PRODUCTS:
            return True
        inside = (self.computations.get(name, ()) for name in operation.called)
        return any(self.multiplies(each) for operations in inside for each in operations)


def read_program(compiled: jax.stages.Compiled) -> Program:
    """Reads the text of a compiled program."""
    computations: dict[str, list[Operation]] = {}
    entry, current = "", None
    for line in (compiled.as_text() or "").splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _OPERATION.match(line):
            name, result, opcode, text = found.groups()
            operands = text[: _closing(text)]
            names = (operands,) if opcode == "parameter" else re.findall(r"%([\w.\-]+)", operands)
            current.append(Operation(name, result, opcode, tuple(names), text))
    return Program(computations, entry)


def attention_kernels(program: Program) -> int:
    """How many attention kernels were compiled: calls of the same are one."""
    calls = (op for operations in program.run_by_device() for op in operations if op.is_attention)
    return len({op.text.partition("backend_config=")[2] for op in calls})


def kernels_per_layer(program: Program) -> float | None:
    """Operations that a device is given for one layer, attention and all; None without attention.

    Kernels, copies and collectives that are launched from one attention call to the next, on the
    average. In a loop over layers the next call is that of the next turn.
    """
    most = max(program.run_by_device(), key=lambda ops: sum(op.is_attention for op in ops))
    kernels = [operation for operation in most if operation.is_kernel]
    calls = [place for place, operation in enumerate(kernels) if operation.is_attention]
    if not calls:
        return None
    if len(calls) == 1 or most is not program.computations[program.entry]:
        return len(kernels) / len(calls)
    return (calls[-1] - calls[0]) / (len(calls) - 1)


def blind_loops(program: Program) -> int:
    """Loops of an unknown number of turns whose condition is an argument, and no kernel's result.

    As a part of a CUDA graph, such a loop does not wait for that argument before it looks at it.
    """
    loops = (op for ops in program.run_by_device() for op in ops if op.opcode == "while")
    return sum(
        not any(op.is_kernel for op in program.computations[condition[1]])
        for loop in loops
        if "known_trip_count" not in loop.text
        and (condition := re.search(r"\bcondition=%?([\w.\-]+)", loop.text))
    )


def weight_copies(program: Program, stacked: Sequence[int]) -> int:
    """Operations that read a weight and give an array as large as it, and are no product.

    One in the body of a loop counts once. What a TPU brings next to its cores is no copy.

    Args:
      program: takes weights as its first arguments.
      stacked: for each of them, how many layers' weights it has in it; 0 where it is no matrix.
    """
    sizes: dict[int, Any] = {}
    for operation in program.computations[program.entry]:
        if operation.opcode == "parameter" and int(operation.operands[0]) < len(stacked):
            number = int(operation.operands[0])
            if stacked[number]:
                sizes[number] = operation.num_elements // stacked[number]
    return len(list(_copies(program, program.entry, sizes)))


def _copies(program: Program, name: str, arguments: Mapping[int, Any]) -> Iterator[str]:
    """Names of operations of a computation that copy a weight, or a copy of one.

    Args:
      program: whose.
      name: of the computation.
      arguments: elements of a layer's weight that an argument is, or by place in a tuple.
    """
    weights: dict[str, Any] = {}
    for operation in program.computations[name]:
        opcode = operation.opcode
        if opcode == "parameter":
            size = arguments.get(int(operation.operands[0]))
        else:
            read = [weights.get(operand) for operand in operation.operands]
            known = [each for each in read if each is not None]
            if not known:
                continue
            size = read[0]
            if opcode == "tuple":
                size = {place: each for place, each in enumerate(read) if each is not None}
            elif opcode == "get-tuple-element" and isinstance(size, dict):
                index = re.search(r"index=(\d+)", operation.text)
                size = size.get(int(index[1])) if index else None
            elif opcode in ("while", "call", "conditional"):
                operands = read[1:] if opcode == "conditional" else read
                for place, called in enumerate(operation.called):
                    given = operands if opcode == "call" else operands[place : place + 1]
                    own = {i: each for i, each in enumerate(given) if each is not None}
                    yield from _copies(program, called, own)
            if opcode not in _PASSING_ON and not opcode.endswith("-done"):
                size = min((each for each in known if isinstance(each, int)), default=None)
                if size is None or program.multiplies(operation) or not operation.is_kernel:
                    continue
                if not _ON_CHIP.search(operation.result):
                    if operation.num_elements < size:
                        continue
                    yield operation.name
        if size is not None:
            weights[operation.name] = size


def _closing(text: str) -> int:
    """Where the parenthesis closes that is open at the start of a text."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def _size(dims: str) -> int:
    return math.prod(int(dim) for dim in dims.split(",") if dim)
