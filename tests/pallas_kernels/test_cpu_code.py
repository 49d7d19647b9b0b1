# SPDX-License-Identifier: Apache-2.0
"""What LLVM makes of the kernels for processors that need not be this one, as assembly."""

import functools
import re

import llvmlite.binding as llvm
import pytest

from jpaged.pallas_kernels.cpu import products
from jpaged.pallas_kernels.cpu.chip import Chip

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
TARGETS = {
    "avx512": (X86, Chip(16, 5, 4, "sapphirerapids", "-prefer-256-bit")),
    "avx512 of 2017": (X86, Chip(16, 5, 4, "skylake-avx512", "-prefer-256-bit")),
    "avx512 of AMD": (X86, Chip(16, 5, 4, "znver4", "-prefer-256-bit")),
    "avx2": (X86, Chip(8, 3, 3, "haswell", "")),
    "avx2 of AMD": (X86, Chip(8, 3, 3, "znver2", "")),
    "neon": (ARM, Chip(4, 5, 4, "neoverse-n1", "")),
    "neon of Apple": ("arm64-apple-macosx", Chip(4, 5, 4, "apple-m1", "")),
}
# A vector register, and memory that the stack pointer leads to.
_REGISTER = {X86: r"%[xyz]mm\d+", ARM: r"\b[vq]\d+\b"}
_STACK = {X86: r"\((%rsp|%rbp)\)", ARM: r"\[sp\b"}


@functools.cache
def functions(name):
    """The lines of each function, comments and directives left out."""
    triple, chip = TARGETS[name]
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(str(products.product_module(chip)))
    module.triple = triple
    module.verify()
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=chip.cpu, features=chip.features, opt=2
    )
    found, lines = {}, []
    for line in machine.emit_assembly(module).splitlines():
        line = re.sub(r"\s*(##|//|;|\s#).*", "", line)
        if label := re.match(r"_?(product\w*):", line):
            lines = found.setdefault(label[1], [])
        elif re.match(r"\.?L\w+:|\t[a-z]", line):
            lines.append(line.strip())
    return found


def loop_of(lines):
    """The instructions of the loop with the products: from a label to the jump back to it."""
    first = next(i for i, line in enumerate(lines) if re.match(r"v?fm(add|la)", line))
    start = max(i for i, line in enumerate(lines[:first]) if line.endswith(":"))
    label = lines[start].rstrip(":")
    end = next(i for i in range(first, len(lines)) if label in lines[i].split())
    return lines[start + 1 : end + 1]


@pytest.mark.parametrize("name", TARGETS)
def test_the_largest_tile_keeps_all_in_registers(name):
    """Of its loop: a product for each row and token, each operand read once, and nothing moved.

    A sum that is kept elsewhere, or moved from register to register, takes a third of the speed.
    """
    triple, chip = TARGETS[name]
    kind = X86 if triple == X86 else ARM
    loop = loop_of(functions(name)[f"product_tile_{chip.rows}x{chip.tokens}"])
    vectors = [line for line in loop if re.search(_REGISTER[kind], line)]
    products_ = [line for line in vectors if re.match(r"vfmadd|fmla", line)]
    assert len(products_) == chip.rows * chip.tokens
    if kind == X86:
        wide = {16: "%zmm", 8: "%ymm"}[chip.lanes]
        assert all(len(re.findall(wide, line)) == 3 for line in products_ if "(" not in line)
        reads = [line for line in vectors if "(" in line]
        moves = [line for line in vectors if line not in products_ and "(" not in line]
    else:
        assert all(".4s" in line for line in products_)
        reads = [
            register
            for line in vectors
            if re.match(r"ldu?[rp]\b", line)
            for register in re.findall(r"\bq\d+\b", line)
        ]
        moves = [line for line in vectors if not re.match(r"ldu?[rp]\b|fmla", line)]
    assert len(reads) == chip.rows + chip.tokens, vectors
    assert not moves
    assert not [line for line in vectors if re.search(_STACK[kind], line)]


@pytest.mark.parametrize("name", TARGETS)
def test_each_tile_multiplies_and_adds_at_once(name):
    """Also those of few tokens; no call of a library's fma, no half vectors."""
    _, chip = TARGETS[name]
    for rows in (chip.rows, 1):
        for tokens in range(1, chip.tokens + 1):
            lines = functions(name)[f"product_tile_{rows}x{tokens}"]
            loop = loop_of(lines)
            assert sum(bool(re.match(r"vfmadd|fmla", line)) for line in loop) == rows * tokens
            assert not [line for line in lines if re.match(r"(call|bl)\b", line)]
