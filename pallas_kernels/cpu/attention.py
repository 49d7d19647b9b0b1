# SPDX-License-Identifier: Apache-2.0
"""Paged attention for CPUs: a query at a time, over blocks of as many keys as a vector has lanes.

A piece of work is the queries of one KV head of a few tokens of one row. A block of keys and values
is read from its page once for all of them, and stays in the first cache meanwhile. Each query has
an online softmax of its own over the blocks of its own keys, in order: its bits depend on nothing
else, neither on how its prompt was cut into chunks nor on what else is in the step.
"""

import functools
import hashlib
import math

import jax
import jax.numpy as jnp
from llvmlite import ir

from jpaged.pallas_kernels.cpu import handler, online_softmax, vectors
from jpaged.pallas_kernels.cpu.chip import Chip, host_chip
from jpaged.pallas_kernels.cpu.compiled import ensure
from jpaged.pallas_kernels.cpu.emitter import F32, I32, I64, PTR, Emitter, Value, function, i64
from jpaged.pallas_kernels.cpu.online_softmax import Shape
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant
from jpaged.pallas_kernels.xla import attention as xla

# Numbers of a line of the caches.
_LINE = 16
# Multiplications by keys below which another thread is not worth waking.
_WORTH_THREADS = 2**17

# Arguments of a call.
_Q, _POOL, _TABLE, _KV_LENS, _CU_Q_LENS, _NUM_SEQS, _LAYER, _SINKS = range(8)


def paged_attention(
    q, kv_pages, rows: Rows, variant: AttentionVariant, *, layer, kv_scale, sinks=None
) -> jax.Array:
    """See `pallas_kernels.paged_attention`; what there is no kernel for, XLA computes.

    That is: queries or pages that are not float32 or have scales, heads that are not whole vectors,
    and scores with a cap.
    """
    chip, head_dim, page_size = host_chip(), q.shape[2], kv_pages.shape[3]
    if (
        chip is None
        or not q.dtype == kv_pages.dtype == jnp.float32
        or head_dim % chip.lanes
        or variant.soft_cap is not None
        or kv_scale is not None
    ):
        return xla.paged_attention(
            q, kv_pages, rows, variant, layer=layer, kv_scale=kv_scale, sinks=sinks
        )
    group = q.shape[1] // kv_pages.shape[2]
    run = math.gcd(page_size, chip.lanes)
    shape = Shape(head_dim, group, run, variant, sinks is not None)
    target = f"jpaged_attention_{hashlib.sha256(repr((shape, chip)).encode()).hexdigest()[:16]}"
    ensure(target, "attention", functools.partial(attention_module, shape, chip), chip)
    layer = jnp.reshape(jnp.asarray(layer, jnp.int32), 1)
    return _call(target, variant, q, kv_pages, sinks, rows, layer)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _call(target, variant: AttentionVariant, q, kv_pages, sinks, rows: Rows, layer) -> jax.Array:
    index = (rows.page_table, rows.kv_lens, rows.cu_q_lens, rows.num_seqs)
    more = () if sinks is None else (sinks,)
    call = jax.ffi.ffi_call(
        target, jax.ShapeDtypeStruct(q.shape, q.dtype), vmap_method="sequential"
    )
    return call(q, kv_pages, *index, layer, *more)


@_call.defjvp
def _tangent(target, variant: AttentionVariant, arrays, tangents):
    """As XLA computes it."""
    *floats, rows, layer = arrays

    def attend(q, kv_pages, sinks):
        return xla.paged_attention(
            q, kv_pages, rows, variant, layer=layer[0], kv_scale=None, sinks=sinks
        )

    _, tangent = jax.jvp(attend, tuple(floats), tuple(tangents[:3]))
    return _call(target, variant, *arrays), tangent


def attention_module(shape: Shape, chip: Chip) -> ir.Module:
    """The code: a handler `attention` of the arguments of a call, `q` first."""
    module = ir.Module()
    piece = _emit_piece(module, shape, chip)
    handler.emit_handler(module, "attention", functools.partial(_count, shape), piece)
    return module


def _buffers(code: Emitter, frame: Value, shape: Shape) -> list[Value]:
    count = _SINKS + shape.has_sinks
    return [handler.buffer(code, frame, handler.ARGUMENTS, index) for index in range(count)]


def _tile(code: Emitter, shape: Shape, buffers: list[Value]) -> Value:
    """Tokens of a piece: one of a step that is taken for decode, as it has a row for each."""
    tokens, rows = (handler.dims(code, buffers[which], 0) for which in (_Q, _KV_LENS))
    return code.select(code.icmp_signed("<=", tokens, rows), i64(1), i64(shape.tokens))


def _count(shape: Shape, code: Emitter, frame: Value) -> tuple[Value, Value]:
    """Pieces of a call, and whether more than one thread is worth it."""
    buffers = _buffers(code, frame, shape)
    tokens = handler.dims(code, buffers[_Q], 0)
    tiles = code.quotient_up(tokens, _tile(code, shape, buffers))
    pieces = code.mul(tiles, handler.dims(code, buffers[_POOL], 2))
    kv_lens, cu_q_lens, num_seqs = (
        code.read(buffers[which], handler.DATA, PTR) for which in (_KV_LENS, _CU_Q_LENS, _NUM_SEQS)
    )
    # As if each query saw all keys of its row.
    seen = code.place(8)
    code.write(seen, 0, i64(0))
    with code.loop(i64(0), _number(code, num_seqs, i64(0)), i64(1)) as row:
        begin, end = (_number(code, cu_q_lens, number) for number in (row, code.add(row, i64(1))))
        own = code.mul(code.sub(end, begin), _number(code, kv_lens, row))
        code.write(seen, 0, code.add(code.read(seen, 0, I64), own))
    width = code.mul(handler.dims(code, buffers[_Q], 1), i64(shape.head_dim))
    work = code.mul(code.read(seen, 0, I64), width)
    return pieces, code.icmp_signed(">=", work, i64(_WORTH_THREADS))


def _number(code: Emitter, pointer: Value, index: Value) -> Value:
    """An i32, as i64."""
    return code.sext(code.load(code.at(pointer, index), typ=I32), I64)


def _emit_piece(module: ir.Module, shape: Shape, chip: Chip) -> ir.Function:
    """(frame, index, following) attends with the queries of one KV head of a tile of tokens."""
    begin, block, end = (
        emit(module, shape, chip)
        for emit in (
            online_softmax.emit_begin,
            online_softmax.emit_block,
            online_softmax.emit_end,
        )
    )
    ask = _emit_ask(module)
    piece = function(module, "attention_piece", [PTR, I64, I64])
    code, (frame, index, _) = Emitter(piece), piece.args
    buffers = _buffers(code, frame, shape)
    q, pool, table, kv_lens, cu_q_lens, num_seqs, layer = (
        code.read(buffer, handler.DATA, PTR) for buffer in buffers[:_SINKS]
    )
    out = code.read(handler.buffer(code, frame, handler.RESULTS, 0), handler.DATA, PTR)
    tokens, num_q_heads = (handler.dims(code, buffers[_Q], axis) for axis in (0, 1))
    num_pages, num_kv_heads, page_size, kv_dim = (
        handler.dims(code, buffers[_POOL], axis) for axis in (1, 2, 3, 4)
    )
    pages_per_seq = handler.dims(code, buffers[_TABLE], 1)
    state = code.place(4 * shape.tokens * shape.group * online_softmax.state_size(shape, chip))
    pages = code.place(8 * chip.lanes // shape.run)

    number = functools.partial(_number, code)
    tile = _tile(code, shape, buffers)
    # Later tokens see more keys: they come first, so that threads end together.
    tiles = code.quotient_up(tokens, tile)
    which = code.sub(code.sub(tiles, i64(1)), code.udiv(index, num_kv_heads))
    head = code.urem(index, num_kv_heads)
    first, last = (
        code.mul(which, tile),
        code.smaller(code.mul(code.add(which, i64(1)), tile), tokens),
    )
    seqs = number(num_seqs, i64(0))
    live = code.smaller(number(cu_q_lens, seqs), last)
    of_layer = code.mul(number(layer, i64(0)), num_pages)
    of_head = code.mul(page_size, kv_dim)

    def query(pointer: Value, token: Value, each: Value) -> Value:
        """Where a query of this head is, of all that it has from a token on."""
        token = code.add(token, code.udiv(each, i64(shape.group)))
        heads = code.add(code.mul(head, i64(shape.group)), code.urem(each, i64(shape.group)))
        number_of_query = code.add(code.mul(token, num_q_heads), heads)
        return code.at(pointer, code.mul(number_of_query, i64(shape.head_dim)))

    with code.repeat(first, live) as (token, go_on):
        # Whose token it is: of the first row that ends after it.
        row = _emit_row_of(code, cu_q_lens, seqs, token)
        row_end = number(cu_q_lens, code.add(row, i64(1)))
        stop = code.smaller(row_end, last)
        # The token's position: as many tokens follow it in the row as before the row's last one.
        position = code.sub(number(kv_lens, row), code.sub(row_end, token))
        count = code.sub(stop, token)
        queries = code.mul(count, i64(shape.group))
        size = i64(online_softmax.state_size(shape, chip))
        with code.loop(i64(0), queries, i64(1)) as each:
            code.call(begin, [code.at(state, code.mul(each, size))])
        lowest = i64(0)
        if shape.variant.sliding_window is not None:
            lowest = code.sub(position, i64(shape.variant.sliding_window - 1))
            lowest = code.larger(lowest, i64(0))
        last_position = code.sub(code.add(position, count), i64(1))
        blocks_end = code.add(code.sdiv(last_position, i64(chip.lanes)), i64(1))

        def cells_at(start: Value) -> Value:
            """Where the cells from a position on are, or the closest ones that are looked at."""
            start = code.larger(code.smaller(start, last_position), lowest)
            start = code.sub(start, code.urem(start, i64(shape.run)))
            entry = code.add(code.mul(row, pages_per_seq), code.udiv(start, page_size))
            page = code.add(of_layer, number(table, entry))
            page = code.add(code.mul(page, num_kv_heads), head)
            cell = code.mul(code.urem(start, page_size), kv_dim)
            return code.at(pool, code.add(code.mul(page, of_head), cell))

        with code.loop(code.sdiv(lowest, i64(chip.lanes)), blocks_end, i64(1)) as number_of_block:
            start = code.mul(number_of_block, i64(chip.lanes))
            for part in range(0, chip.lanes, shape.run):
                code.write(pages, 8 * part // shape.run, cells_at(code.add(start, i64(part))))
                # Pages lie anywhere: the processor does not know which cells come next.
                following = cells_at(code.add(start, i64(chip.lanes + part)))
                code.call(ask, [following, code.mul(kv_dim, i64(shape.run))])
            with code.loop(i64(0), queries, i64(1)) as each:
                own = code.add(position, code.udiv(each, i64(shape.group)))
                high = code.sub(code.add(own, i64(1)), start)
                low = i64(0)
                if shape.variant.sliding_window is not None:
                    low = code.larger(code.sub(high, i64(shape.variant.sliding_window)), i64(0))
                high = code.smaller(high, i64(chip.lanes))
                with code.if_then(code.icmp_signed("<", low, high)):
                    own_state = code.at(state, code.mul(each, size))
                    arguments = (query(q, token, each), pages, kv_dim, own_state, low, high)
                    code.call(block, arguments)
        sinks = code.read(buffers[_SINKS], handler.DATA, PTR) if shape.has_sinks else None
        with code.loop(i64(0), queries, i64(1)) as each:
            sink = ()
            if sinks is not None:
                own_head = code.urem(each, i64(shape.group))
                own_head = code.add(code.mul(head, i64(shape.group)), own_head)
                sink = (code.load(code.at(sinks, own_head), typ=F32),)
            own_state = code.at(state, code.mul(each, size))
            code.call(end, [own_state, query(out, token, each), *sink])
        go_on(stop)
    # Padding.
    with code.loop(code.larger(live, first), last, i64(1)) as token:
        result, width = query(out, token, i64(0)), shape.group * shape.head_dim
        zero = vectors.splat(ir.VectorType(F32, chip.lanes), 0.0)
        with code.loop(i64(0), i64(width), i64(chip.lanes)) as lane:
            code.store(zero, code.at(result, lane), align=4)
    code.ret_void()
    return piece


def _emit_row_of(code: Emitter, cu_q_lens: Value, seqs: Value, token: Value) -> Value:
    """The row of a token that one has: how many rows end at it or before, by halving."""
    low, high = code.place(8), code.place(8)
    code.write(low, 0, i64(0))
    code.write(high, 0, seqs)
    head, body, end = (code.append_basic_block("search") for _ in range(3))
    code.branch(head)
    code.position_at_end(head)
    a, b = code.read(low, 0, I64), code.read(high, 0, I64)
    code.cbranch(code.icmp_signed("<", a, b), body, end)
    code.position_at_end(body)
    middle = code.udiv(code.add(a, b), i64(2))
    ends = _number(code, cu_q_lens, code.add(middle, i64(1)))
    before = code.icmp_signed("<=", ends, token)
    code.write(low, 0, code.select(before, code.add(middle, i64(1)), a))
    code.write(high, 0, code.select(before, b, middle))
    code.branch(head)
    code.position_at_end(end)
    return a


def _emit_ask(module: ir.Module) -> ir.Function:
    """(pointer, count) asks memory for so many numbers."""
    ask = function(module, "attention_ask", [PTR, I64])
    prefetch = function(module, "llvm.prefetch.p0", [PTR, I32, I32, I32])
    code, (pointer, count) = Emitter(ask), ask.args
    with code.loop(i64(0), count, i64(_LINE)) as line:
        hints = [ir.Constant(I32, hint) for hint in (0, 3, 1)]  # to read, soon, data
        code.call(prefetch, [code.at(pointer, line), *hints])
    code.ret_void()
    return ask
