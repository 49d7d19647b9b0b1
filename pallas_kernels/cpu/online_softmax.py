# SPDX-License-Identifier: Apache-2.0
"""A query's online softmax, over blocks of as many keys as a vector has lanes.

Source: Milakov & Gimelshein 2018.
"""

import dataclasses

import jax.numpy as jnp
from llvmlite import ir

from jpaged.pallas_kernels.cpu import vectors
from jpaged.pallas_kernels.cpu.chip import Chip
from jpaged.pallas_kernels.cpu.emitter import F32, I32, I64, PTR, Emitter, Value, function, i64
from jpaged.pallas_kernels.variant import AttentionVariant

# Queries whose state is kept beside a block, at most: with it they fill the first cache.
_QUERIES = 32
# Vectors of a value that are summed at once, at most: each in a register.
_CHUNK = 8
# Less than any score that is worth telling; finite, so that a query that has seen no key yet
# subtracts to 0 and not to NaN.
_NOTHING = -1e30


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the code of one kernel depends on.

    Attributes:
      head_dim: lanes of a key.
      group: query heads of a KV head.
      run: cells that lie in a row wherever a block begins: the most that divide page and block.
      variant: which attention.
      has_sinks: whether heads have sinks.
    """

    head_dim: int
    group: int
    run: int
    variant: AttentionVariant
    has_sinks: bool

    @property
    def tokens(self) -> int:
        """Tokens of a piece."""
        return max(1, _QUERIES // self.group)


def state_size(shape: Shape, chip: Chip) -> int:
    """Numbers of a query's state: the largest score, sums of weights by lane, weighted values."""
    return 2 * chip.lanes + shape.head_dim


def emit_begin(module: ir.Module, shape: Shape, chip: Chip) -> ir.Function:
    """(state) of a query that has seen no key."""
    begin = function(module, "attention_begin", [PTR])
    code, (state,) = Emitter(begin), begin.args
    kind = ir.VectorType(F32, chip.lanes)
    for at in range(0, state_size(shape, chip), chip.lanes):
        value = vectors.splat(kind, 0.0 if at else _NOTHING)
        code.store(value, code.at(state, i64(at)), align=4)
    code.ret_void()
    return begin


def emit_block(module: ir.Module, shape: Shape, chip: Chip) -> ir.Function:
    """(query, pages, kv_dim, state, low, high) has a query see keys `low .. high` of a block.

    `pages` are pointers to its cells, for as many as `Shape.run` has in a row.
    """
    block = function(module, "attention_block", [PTR, PTR, I64, PTR, I64, I64])
    block.attributes.add("noinline")
    query, pages, kv_dim, state, low, high = block.args
    code, lanes = Emitter(block), chip.lanes
    kind = ir.VectorType(F32, lanes)

    def load(pointer: Value, at: int) -> Value:
        return code.load(code.at(pointer, i64(at)), typ=kind, align=4)

    starts = [code.read(pages, 8 * page, PTR) for page in range(lanes // shape.run)]
    rows = [
        code.at(starts[key // shape.run], code.mul(kv_dim, i64(key % shape.run)))
        for key in range(lanes)
    ]
    places = range(0, shape.head_dim, lanes)
    parts = [load(query, at) for at in places]
    products = []
    for row in rows:
        product = vectors.splat(kind, 0.0)
        for part, at in zip(parts, places, strict=True):
            product = vectors.multiply_add(code, load(row, at), part, product)
        products.append(product)
    scores = vectors.summed(code, products)
    scores = code.fmul(scores, vectors.splat(kind, shape.variant.scale(shape.head_dim)))
    lane = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
    seen = code.and_(
        code.icmp_signed(">=", lane, vectors.spread(code, low, lanes)),
        code.icmp_signed("<", lane, vectors.spread(code, high, lanes)),
    )
    nothing = vectors.splat(kind, _NOTHING)
    old_peak = load(state, 0)
    best = vectors.spread(code, vectors.largest(code, code.select(seen, scores, nothing)), lanes)
    peak = vectors.larger(code, old_peak, best)
    weights = vectors.exp(code, code.fsub(scores, peak))
    weights = code.select(seen, weights, vectors.splat(kind, 0.0))
    shrink = vectors.exp(code, code.fsub(old_peak, peak))
    code.store(peak, code.at(state, i64(0)), align=4)
    total = vectors.multiply_add(code, load(state, lanes), shrink, weights)
    code.store(total, code.at(state, i64(lanes)), align=4)
    kept = code.place(4 * lanes)
    code.store(weights, kept, align=4)
    all_seen = code.and_(
        code.icmp_signed("==", low, i64(0)), code.icmp_signed("==", high, i64(lanes))
    )
    with code.if_else(all_seen) as (whole, part):
        for branch, checks in ((whole, False), (part, True)):
            with branch:
                _emit_values(
                    code, shape, kept, rows, state, shrink, (low, high) if checks else None
                )
    code.ret_void()
    return block


def _emit_values(
    code: Emitter,
    shape: Shape,
    weights: Value,
    rows: list[Value],
    state: Value,
    shrink: Value,
    seen: tuple[Value, Value] | None,
) -> None:
    """Adds weighted values; those outside of `seen` may be anything, and 0 * NaN is NaN."""
    lanes = len(rows)
    kind = ir.VectorType(F32, lanes)
    zero = vectors.splat(kind, 0.0)
    parts = range(0, shape.head_dim, lanes)
    for begin in range(0, len(parts), _CHUNK):
        chunk = parts[begin : begin + _CHUNK]
        # Sums of every `ways`-th key, so that one need not wait for the other.
        ways = max(1, _CHUNK // len(chunk))
        sums = [[zero] * len(chunk) for _ in range(ways)]
        for key, row in enumerate(rows):
            weight = vectors.spread(code, code.load(code.at(weights, i64(key)), typ=F32), lanes)
            for number, at in enumerate(chunk):
                value = code.load(code.at(row, i64(shape.head_dim + at)), typ=kind, align=4)
                if seen is not None:
                    is_seen = code.and_(
                        code.icmp_signed(">=", i64(key), seen[0]),
                        code.icmp_signed("<", i64(key), seen[1]),
                    )
                    value = code.select(is_seen, value, zero)
                own = sums[key % ways]
                own[number] = vectors.multiply_add(code, weight, value, own[number])
        for number, at in enumerate(chunk):
            added = sums[0][number]
            for way in sums[1:]:
                added = code.fadd(added, way[number])
            place = code.at(state, i64(2 * lanes + at))
            old = code.load(place, typ=kind, align=4)
            code.store(vectors.multiply_add(code, old, shrink, added), place, align=4)


def emit_end(module: ir.Module, shape: Shape, chip: Chip) -> ir.Function:
    """(state, result[, sink]) writes a query's result."""
    end = function(module, "attention_end", [PTR, PTR, *[F32] * shape.has_sinks])
    code, lanes = Emitter(end), chip.lanes
    state, result, *sinks = end.args
    kind = ir.VectorType(F32, lanes)
    total = vectors.summed(code, [code.load(code.at(state, i64(lanes)), typ=kind, align=4)])
    total = vectors.spread(code, code.extract_element(total, ir.Constant(I32, 0)), lanes)
    for sink in sinks:
        peak = code.load(state, typ=kind, align=4)
        share = vectors.exp(code, code.fsub(vectors.spread(code, sink, lanes), peak))
        total = code.fadd(total, share)
    total = vectors.larger(code, total, vectors.splat(kind, float(jnp.finfo(jnp.float32).tiny)))
    for at in range(0, shape.head_dim, lanes):
        value = code.load(code.at(state, i64(2 * lanes + at)), typ=kind, align=4)
        code.store(code.fdiv(value, total), code.at(result, i64(at)), align=4)
    code.ret_void()
    return end
