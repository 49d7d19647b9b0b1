# SPDX-License-Identifier: Apache-2.0
"""What kernels compute with vectors of float32."""

import math
from collections.abc import Sequence

from llvmlite import ir

from jpaged.pallas_kernels.cpu.emitter import F32, I32, Emitter, Value, function

# Below the first, exponentials have exponents that float32 has no more; that of the second is
# infinite, as its power of two is the first that float32 has no more.
_LEAST, _MOST = -87.3, 88.9
# ln 2, of which the first part has so few bits that multiples of it are exact.
_LN2 = 0.693359375, -2.12194440e-4
# From the sixth power down to the second. Source: Moshier, Cephes, expf.
_POWERS = (
    *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3),
    *(4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
)


def splat(kind: ir.VectorType, number: float) -> ir.Constant:
    """The number in every lane."""
    return ir.Constant(kind, [number] * kind.count)


def spread(code: Emitter, value: Value, lanes: int) -> Value:
    """A value in every lane."""
    kind = ir.VectorType(value.type, lanes)
    one = code.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return chosen(code, one, one, [0] * lanes)


def chosen(code: Emitter, a: Value, b: Value, lanes: Sequence[int]) -> Value:
    """A vector of lanes of two, those of the second counted on."""
    kind = ir.VectorType(I32, len(lanes))
    return code.shuffle_vector(a, b, ir.Constant(kind, list(lanes)))


def summed(code: Emitter, vectors: Sequence[Value]) -> Value:
    """The sum of the lanes of each vector, as one vector.

    The halves of each are added, of the halves again the halves, and so on, with as many vectors at
    once as fit in one: each sum is in this order, whatever it shares a vector with.

    Args:
      code: where.
      vectors: a power of two of them, as many as they have lanes at most.
    """
    width = vectors[0].type.count
    while width > 1:
        half = width // 2
        if len(vectors) > 1:
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
            starts = range(0, 2 * vectors[0].type.count, width)
        else:
            pairs = [(vectors[0], vectors[0])]
            starts = range(0, vectors[0].type.count, width)
        lower = [start + lane for start in starts for lane in range(half)]
        upper = [lane + half for lane in lower]
        vectors = [
            code.fadd(chosen(code, a, b, lower), chosen(code, a, b, upper)) for a, b in pairs
        ]
        width = half
    return vectors[0]


def multiply_add(code: Emitter, a: Value, b: Value, c: Value) -> Value:
    """`a * b + c`, rounded once."""
    return _call(code, "fma", a, b, c)


def larger(code: Emitter, a: Value, b: Value) -> Value:
    """The larger one, lane by lane; that which is a number, if only one is."""
    return _call(code, "maxnum", a, b)


def largest(code: Emitter, vector: Value) -> Value:
    """f32: of the lanes, those left out that are no numbers."""
    lanes = vector.type.count
    name = f"llvm.vector.reduce.fmax.v{lanes}f32"
    return code.call(function(code.module, name, [vector.type], F32), [vector])


def exp(code: Emitter, x: Value) -> Value:
    """Exponentials, to some two units in the last place; of what is below -87.3, that of -87.3.

    That of what is no number is none.
    """
    kind = x.type
    for limit, beyond in ((_LEAST, "<"), (_MOST, ">")):
        is_beyond = code.fcmp_ordered(beyond, x, splat(kind, limit))
        x = code.select(is_beyond, splat(kind, limit), x)
    whole = _call(code, "rint", code.fmul(x, splat(kind, math.log2(math.e))))
    rest = x
    for part in _LN2:
        rest = multiply_add(code, whole, splat(kind, -part), rest)
    value = splat(kind, _POWERS[0])
    for factor in _POWERS[1:]:
        value = multiply_add(code, value, rest, splat(kind, factor))
    square = code.fmul(rest, rest)
    value = multiply_add(code, value, square, code.fadd(rest, splat(kind, 1.0)))
    bits = ir.VectorType(I32, kind.count)
    exponent = code.add(code.fptosi(whole, bits), ir.Constant(bits, [127] * kind.count))
    power = code.bitcast(code.shl(exponent, ir.Constant(bits, [23] * kind.count)), kind)
    return code.fmul(value, power)


def _call(code: Emitter, name: str, *values: Value) -> Value:
    kind = values[0].type
    name = f"llvm.{name}.v{kind.count}f32"
    return code.call(function(code.module, name, [kind] * len(values), kind), values)
