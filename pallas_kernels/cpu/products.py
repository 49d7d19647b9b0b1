# SPDX-License-Identifier: Apache-2.0
"""Products of a few tokens by weights, which are read from memory once and where they lie.

Libraries of matrix products lay one operand out anew at every call: for a step's few tokens that is
most of the work. Here both are read along their rows, as they are stored. A tile of results is so
many vector registers, each of which sums the products of one row of weights and one token, and of
which the lanes are summed at the end. While one tile's rows meet the tokens, those of the next are
asked of memory, a share in each pass over the tokens.

Sums are in one order, whatever the number of tokens and of threads and whichever tile a result is
in: the bits of a token's result depend on that token and the weights alone.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from llvmlite import ir

from jpaged.pallas_kernels.cpu import handler, vectors
from jpaged.pallas_kernels.cpu.chip import Chip, host_chip
from jpaged.pallas_kernels.cpu.compiled import ensure
from jpaged.pallas_kernels.cpu.emitter import F32, I32, I64, PTR, Emitter, Value, function, i64

# XLA knows the handler by it, also of programs that were compiled by an earlier process.
TARGET = "jpaged_product"
# Numbers of weights that a thread takes at a time: what its second cache holds beside tokens.
_PIECE = 2**15
# Pieces at least, if there are as many tiles: for many threads, and so that they end together.
_PIECES = 32
# Inputs that a tile goes through at a time, at most: what the first cache holds of its rows.
_BLOCK = 768
# Tokens, and numbers that they have together if inputs are fewer than that, at most: XLA's products
# of more take as long or less (docs/decisions.md).
_MOST_TOKENS, _FEW_INPUTS, MOST_NUMBERS = 8, 1024, 2**16
# To read, into the second cache, data: as LLVM's prefetch takes it.
_TO_READ_SOON = 0, 2, 1
# Multiplications below which another thread is not worth waking.
_WORTH_THREADS = 2**17


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x @ weight.T`.

    Args:
      x: f32[tokens, in].
      weight: f32[features, in], as Hugging Face stores it; `takes` has said that it fits.

    Returns:
      f32[tokens, features].
    """
    chip = host_chip()
    assert chip is not None, "`takes` said so"
    ensure(TARGET, "product", functools.partial(product_module, chip), chip)
    with jax.named_scope("product"):
        return _call(x, weight)


@jax.custom_jvp
def _call(x: jax.Array, weight: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(TARGET, shape, vmap_method="sequential")(x, weight)


@_call.defjvp
def _tangent(arrays: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]):
    """Of a product: of each factor's tangent by the other, which XLA multiplies."""
    (x, weight), (dx, dweight) = arrays, tangents
    return _call(x, weight), dx @ weight.T + x @ dweight.T


def takes(x: jax.Array, weight: jax.Array) -> bool:
    """Whether `product` is for such arrays: float32, of whole vectors of inputs, of few tokens.

    Those that cannot be multiplied are not: XLA's product says what is wrong with them.
    """
    chip = host_chip()
    if chip is None or x.ndim != 2 or x.shape[1:] != weight.shape[1:] or not x.size * weight.size:
        return False
    tokens, inputs = x.shape
    if inputs % chip.lanes or not x.dtype == weight.dtype == jnp.float32:
        return False
    return tokens <= _MOST_TOKENS or (inputs < _FEW_INPUTS and x.size <= MOST_NUMBERS)


def product_module(chip: Chip) -> ir.Module:
    """The code: a handler `product` of (x, weight) -> result."""
    module = ir.Module()
    tiles = {
        rows: [_emit_tile(module, chip, rows, t + 1) for t in range(chip.tokens)]
        for rows in (chip.rows, 1)
    }
    piece = _emit_piece(module, chip, tiles)
    handler.emit_handler(module, "product", functools.partial(_count, chip), piece)
    return module


def _shape(code: Emitter, frame: Value) -> tuple[Value, Value, Value]:
    """Tokens, inputs and features of a call."""
    x, weight = (handler.buffer(code, frame, handler.ARGUMENTS, index) for index in (0, 1))
    return handler.dims(code, x, 0), handler.dims(code, x, 1), handler.dims(code, weight, 0)


def _rows(code: Emitter, chip: Chip, inputs: Value, features: Value) -> Value:
    """Rows of weights in a piece: whole tiles, one at least."""
    fit = code.udiv(i64(_PIECE // chip.rows), inputs)
    shared = code.quotient_up(features, i64(chip.rows * _PIECES))
    return code.mul(code.larger(code.smaller(fit, shared), i64(1)), i64(chip.rows))


def _count(chip: Chip, code: Emitter, frame: Value) -> tuple[Value, Value]:
    """Pieces of a call, and whether more than one thread is worth it."""
    tokens, inputs, features = _shape(code, frame)
    pieces = code.quotient_up(features, _rows(code, chip, inputs, features))
    work = code.mul(code.mul(tokens, inputs), features)
    return pieces, code.icmp_signed(">=", work, i64(_WORTH_THREADS))


def _emit_piece(
    module: ir.Module, chip: Chip, tiles: Mapping[int, Sequence[ir.Function]]
) -> ir.Function:
    """(frame, index, following) computes the features of one piece, for all tokens."""
    piece = function(module, "product_piece", [PTR, I64, I64])
    code, (frame, index, following) = Emitter(piece), piece.args
    tokens, inputs, features = _shape(code, frame)
    x, weight, y = (
        code.read(handler.buffer(code, frame, which, index), handler.DATA, PTR)
        for which, index in ((handler.ARGUMENTS, 0), (handler.ARGUMENTS, 1), (handler.RESULTS, 0))
    )
    # Between blocks of inputs; one block needs none.
    sums = code.place(4 * chip.lanes * chip.rows * (MOST_NUMBERS // _BLOCK + 1))
    rows = _rows(code, chip, inputs, features)
    first = code.mul(index, rows)
    last = code.smaller(code.add(first, rows), features)
    # Where this thread's following piece begins; there may be none.
    after = code.mul(following, rows)
    after = code.select(code.icmp_signed("<", after, features), after, first)
    blocks = code.quotient_up(inputs, i64(_BLOCK))
    block = code.mul(
        code.quotient_up(code.quotient_up(inputs, blocks), i64(chip.lanes)), i64(chip.lanes)
    )
    passes = code.quotient_up(tokens, i64(chip.tokens))
    whole = code.sub(last, code.urem(code.sub(last, first), i64(chip.rows)))
    for start, stop, height in ((first, whole, chip.rows), (whole, last, 1)):
        with code.loop(start, stop, i64(height)) as row, code.loop(i64(0), inputs, block) as begin:
            end = code.add(begin, block)
            is_last = code.icmp_signed(">=", end, inputs)
            here = code.add(code.mul(row, inputs), begin)
            # What is read next: the same rows' next block, or the next tile's rows.
            then = code.add(row, i64(height))
            then = code.select(code.icmp_signed("<", then, last), then, after)
            then = code.select(is_last, code.mul(then, inputs), code.add(here, block))
            with code.loop(i64(0), passes, i64(1)) as number:
                token, next_token = _share(code, tokens, number, passes)
                # In one pass alone the processor reads ahead by itself.
                asked, next_asked = _share(code, i64(chip.rows), number, passes)
                share = code.sub(next_asked, asked)
                asks = code.and_(
                    code.icmp_signed(">", passes, i64(1)), code.icmp_signed(">", share, i64(0))
                )
                ahead = code.select(asks, code.add(then, code.mul(asked, inputs)), here)
                arguments = (
                    code.at(weight, here),
                    code.at(x, code.add(code.mul(token, inputs), begin)),
                    code.at(y, code.add(code.mul(token, features), row)),
                    code.at(sums, code.mul(token, i64(chip.rows * chip.lanes))),
                    *(inputs, features, code.sub(code.smaller(end, inputs), begin)),
                    *(code.at(weight, ahead), code.select(asks, share, i64(1))),
                    *(code.icmp_signed("==", begin, i64(0)), is_last),
                )
                _emit_choice(code, code.sub(next_token, token), tiles[height], arguments)
    code.ret_void()
    return piece


def _share(code: Emitter, total: Value, number: Value, passes: Value) -> tuple[Value, Value]:
    """Where a pass's even share of a total begins and ends."""
    begin, end = (
        code.udiv(code.mul(total, count), passes) for count in (number, code.add(number, i64(1)))
    )
    return begin, end


def _emit_choice(
    code: Emitter, count: Value, tiles: Sequence[ir.Function], arguments: Sequence[Value]
) -> None:
    """Calls the tile of so many tokens."""
    after = code.append_basic_block("chosen")
    blocks = [code.append_basic_block("tile") for _ in tiles]
    choice = code.switch(count, blocks[-1])
    for number, (block, tile) in enumerate(zip(blocks, tiles, strict=True), 1):
        choice.add_case(i64(number), block)
        code.position_at_end(block)
        code.call(tile, arguments)
        code.branch(after)
    code.position_at_end(after)


def _emit_tile(module: ir.Module, chip: Chip, rows: int, tokens: int) -> ir.Function:
    """Adds a block of inputs to `rows` features of `tokens` tokens.

    (weight, x, y, sums, inputs, features, length, ahead, share, is_first, is_last): the pointers
    are those of the tile's first numbers, `sums` of its sums between blocks; of a row of weights
    `length` numbers are in the block; memory is asked for so many numbers of `share` rows `ahead`.
    """
    lanes = chip.lanes
    vector = ir.VectorType(F32, lanes)
    tile = function(
        module,
        f"product_tile_{rows}x{tokens}",
        [*[PTR] * 4, *[I64] * 3, *(PTR, I64), *[ir.IntType(1)] * 2],
    )
    tile.attributes.add("noinline")  # all registers are the loop's
    weight, x, y, sums, inputs, features, length, ahead, share, is_first, is_last = tile.args
    prefetch = function(module, "llvm.prefetch.p0", [PTR, I32, I32, I32])
    hints = [ir.Constant(I32, number) for number in _TO_READ_SOON]
    code = Emitter(tile)

    def at_row(pointer: Value, row: Value) -> Value:
        return code.at(pointer, code.mul(inputs, row))

    weights = [at_row(weight, i64(row)) for row in range(rows)]
    inputs_of = [at_row(x, i64(token)) for token in range(tokens)]
    most = code.sub(share, i64(1))
    coming = [at_row(ahead, code.smaller(i64(row), most)) for row in range(rows)]
    results = [(token, row) for token in range(tokens) for row in range(rows)]
    places = [code.at(sums, i64(number * lanes)) for number in range(len(results))]
    again, body = code.append_basic_block("again"), code.append_basic_block("body")
    fresh = code.block
    code.cbranch(is_first, body, again)
    code.position_at_end(again)
    kept = [code.load(place, typ=vector, align=4) for place in places]
    code.branch(body)
    code.position_at_end(body)
    index = code.phi(I64)
    added = [code.phi(vector) for _ in results]
    zero = ir.Constant(vector, [0.0] * lanes)
    for block in (fresh, again):
        index.add_incoming(i64(0), block)
    for phi, before in zip(added, kept, strict=True):
        phi.add_incoming(zero, fresh)
        phi.add_incoming(before, again)
    factors = [code.load(code.at(pointer, index), typ=vector, align=4) for pointer in weights]
    values: list[Value] = []
    for number, pointer in enumerate(inputs_of):
        token = code.load(code.at(pointer, index), typ=vector, align=4)
        own = added[number * rows : (number + 1) * rows]
        pairs = zip(factors, own, strict=True)
        values += [vectors.multiply_add(code, factor, token, sum_) for factor, sum_ in pairs]
    for pointer in coming:
        code.call(prefetch, [code.at(pointer, index), *hints])
    following = code.add(index, i64(lanes))
    index.add_incoming(following, code.block)
    for phi, value in zip(added, values, strict=True):
        phi.add_incoming(value, code.block)
    over = code.append_basic_block("over")
    code.cbranch(code.icmp_signed("<", following, length), body, over)
    code.position_at_end(over)
    with code.if_else(is_last) as (ends, goes_on):
        with ends:
            _emit_results(code, features, y, rows, results, values)
        with goes_on:
            for place, value in zip(places, values, strict=True):
                code.store(value, place, align=4)
    code.ret_void()
    return tile


def _emit_results(
    code: Emitter,
    features: Value,
    y: Value,
    rows: int,
    results: Sequence[tuple[int, int]],
    values: Sequence[Value],
) -> None:
    """Sums lanes, and writes the results."""
    lanes = values[0].type.count
    while results:
        # So many vectors as lanes at most, a power of two: their sums fill a vector.
        number = 1 << min(len(results), lanes).bit_length() - 1
        chosen, results = results[:number], results[number:]
        sums, values = vectors.summed(code, values[:number]), values[number:]
        for lane, (token, row) in enumerate(chosen):
            if row == 0 or lane == 0:
                run = min(rows - row, number - lane)
                part = vectors.chosen(code, sums, sums, range(lane, lane + run))
                place = code.add(code.mul(features, i64(token)), i64(row))
                code.store(part, code.at(y, place), align=4)
