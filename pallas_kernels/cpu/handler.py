# SPDX-License-Identifier: Apache-2.0
"""What XLA calls: a kernel's pieces, shared out among the threads of XLA's own pool.

The structures are those of xla/ffi/api/c_api.h, which jaxlib carries and promises to keep; a test
holds the offsets below against it.
"""

from collections.abc import Callable

from llvmlite import ir

from jpaged.pallas_kernels.cpu.emitter import (
    I32,
    I64,
    PTR,
    VOID,
    Emitter,
    Value,
    function,
    i64,
    untyped,
)

# XLA_FFI_CallFrame, and what is within it.
EXTENSION, API, CONTEXT, ARGUMENTS, RESULTS = 8, 16, 24, 72, 112
# XLA_FFI_Buffer.
DATA, DIMS = 24, 40
# XLA_FFI_Api.
ERROR_DESTROY, SCHEDULE, NUM_THREADS = 64, 136, 144
# An extension's type, and which one asks for metadata; where that is, and its version.
EXTENSION_TYPE, ASKS_METADATA, METADATA, MAJOR, MINOR = 8, 1, 24, 24, 28
API_VERSION = 0, 3

# What the threads of one call share, in cache lines of their own: the next piece, pieces done, who
# still looks at it, and then what does not change.
_NEXT, _DONE, _HOLDERS, _TOTAL, _FRAME, _THREADS, _BYTES = 0, 64, 128, 192, 200, 208, 256
# Looks at what others have done before the processor is given to them.
_LOOKS = 64


def buffer(code: Emitter, frame: Value, which: int, index: int) -> Value:
    """The XLA_FFI_Buffer of one of a call's ARGUMENTS or RESULTS, as `which` says."""
    return code.read(code.read(frame, which, PTR), 8 * index, PTR)


def dims(code: Emitter, of: Value, index: int) -> Value:
    """The length of a buffer's axis."""
    return code.read(code.read(of, DIMS, PTR), 8 * index, I64)


def emit_handler(
    module: ir.Module,
    name: str,
    count: Callable[[Emitter, Value], tuple[Value, Value]],
    piece: ir.Function,
) -> None:
    """Writes an XLA_FFI_Handler.

    Args:
      module: where.
      name: of the function.
      count: gives of a call's frame how many pieces there are, and (i1) whether they are worth
        more than one thread.
      piece: (frame, index, following) computes one, whichever thread it is on, and may ask memory
        for what the thread's following one reads first; there is none if it is not below the count.
    """
    work = _emit_work(module, f"{name}_work", piece)
    release = _emit_release(module, f"{name}_release")
    task = _emit_task(module, f"{name}_task", work, release)
    handler = function(module, name, [PTR], PTR)
    code, (frame,) = Emitter(handler), handler.args
    none = ir.Constant(PTR, None)
    extension = code.read(frame, EXTENSION, PTR)
    with code.if_then(code.icmp_unsigned("!=", extension, none)):
        kind = code.read(extension, EXTENSION_TYPE, I32)
        with code.if_then(code.icmp_signed("==", kind, ir.Constant(I32, ASKS_METADATA))):
            metadata = code.read(extension, METADATA, PTR)
            for offset, number in zip((MAJOR, MINOR), API_VERSION, strict=True):
                code.write(metadata, offset, ir.Constant(I32, number))
            code.ret(none)
    total, worth = count(code, frame)
    number, shared = code.place(8), code.place(8)
    code.write(number, 0, i64(1))
    code.write(shared, 0, none)
    with code.if_then(worth):
        code.write(number, 0, code.smaller(_num_threads(code, frame), total))
    threads = code.read(number, 0, I64)
    helpers = code.sub(threads, i64(1))
    with code.if_then(code.icmp_signed(">", helpers, i64(0))):
        # There may be no memory for it.
        code.write(shared, 0, code.call(function(module, "malloc", [I64], PTR), [i64(_BYTES)]))
    job = code.read(shared, 0, PTR)
    with code.if_then(code.icmp_unsigned("==", job, none)):
        with code.loop(i64(0), total, i64(1)) as index:
            code.call(piece, [frame, index, code.add(index, i64(1))])
        code.ret(none)
    for offset, value in (
        *((_NEXT, i64(0)), (_DONE, i64(0)), (_HOLDERS, threads)),
        *((_TOTAL, total), (_FRAME, frame), (_THREADS, threads)),
    ):
        code.write(job, offset, value)
    arguments = _arguments(code, 40, code.read(frame, CONTEXT, PTR), untyped(task), job)
    with code.loop(i64(0), helpers, i64(1)):
        failed = _call_api(code, frame, SCHEDULE, arguments)
        with code.if_then(failed):
            code.call(release, [job])  # nobody else will
    code.call(work, [job])
    _emit_wait(code, module, job, total)
    code.call(release, [job])
    code.ret(none)


def _emit_work(module: ir.Module, name: str, piece: ir.Function) -> ir.Function:
    """(job) does pieces until all are begun."""
    work = function(module, name, [PTR])
    code, (job,) = Emitter(work), work.args
    total, frame = code.read(job, _TOTAL, I64), code.read(job, _FRAME, PTR)
    threads, place = code.read(job, _THREADS, I64), code.place(8)
    look, do = code.append_basic_block("look"), code.append_basic_block("do")
    done = code.append_basic_block("done")

    def take() -> Value:
        return code.atomic_rmw("add", code.field(job, _NEXT), i64(1), "acq_rel")

    first, before = take(), code.block
    code.branch(look)
    code.position_at_end(look)
    index = code.phi(I64)
    index.add_incoming(first, before)
    code.cbranch(code.icmp_signed("<", index, total), do, done)
    code.position_at_end(do)
    # What comes next is known beforehand as long as there is a piece for every other thread too.
    next_one = code.load_atomic(code.field(job, _NEXT), "monotonic", 8, typ=I64)
    early = code.icmp_signed("<", code.add(next_one, threads), total)
    code.write(place, 0, total)
    with code.if_then(early):
        code.write(place, 0, take())
    code.call(piece, [frame, index, code.read(place, 0, I64)])
    code.atomic_rmw("add", code.field(job, _DONE), i64(1), "acq_rel")
    with code.if_then(code.not_(early)):
        code.write(place, 0, take())
    index.add_incoming(code.read(place, 0, I64), code.block)
    code.branch(look)
    code.position_at_end(done)
    code.ret_void()
    return work


def _emit_release(module: ir.Module, name: str) -> ir.Function:
    """(job) frees it if nobody else looks at it: a task may begin when the call is over."""
    release = function(module, name, [PTR])
    code, (job,) = Emitter(release), release.args
    before = code.atomic_rmw("sub", code.field(job, _HOLDERS), i64(1), "acq_rel")
    with code.if_then(code.icmp_signed("==", before, i64(1))):
        code.call(function(module, "free", [PTR]), [job])
    code.ret_void()
    return release


def _emit_task(
    module: ir.Module, name: str, work: ir.Function, release: ir.Function
) -> ir.Function:
    """(job) is what another thread does."""
    task = function(module, name, [PTR])
    code = Emitter(task)
    code.call(work, task.args)
    code.call(release, task.args)
    code.ret_void()
    return task


def _emit_wait(code: Emitter, module: ir.Module, job: Value, total: Value) -> None:
    """Waits for pieces that others have taken; all are taken, so none waits for a thread."""
    give_way = function(module, "sched_yield", [], I32)
    look, looked = code.append_basic_block("look"), code.append_basic_block("looked")
    over, before = code.append_basic_block("over"), code.block
    code.branch(look)
    code.position_at_end(look)
    looks = code.phi(I64)
    looks.add_incoming(i64(0), before)
    done = code.load_atomic(code.field(job, _DONE), "acquire", 8, typ=I64)
    code.cbranch(code.icmp_signed("<", done, total), looked, over)
    code.position_at_end(looked)
    more = code.add(looks, i64(1))
    with code.if_then(code.icmp_signed("==", code.urem(more, i64(_LOOKS)), i64(0))):
        code.call(give_way, [])
    looks.add_incoming(more, code.block)
    code.branch(look)
    code.position_at_end(over)


def _num_threads(code: Emitter, frame: Value) -> Value:
    """Threads of XLA's pool; one where it has none."""
    number = code.place(8)
    code.write(number, 0, i64(1))
    arguments = _arguments(code, 32, code.read(frame, CONTEXT, PTR), number)
    _call_api(code, frame, NUM_THREADS, arguments)
    return code.read(number, 0, I64)


def _call_api(code: Emitter, frame: Value, which: int, arguments: Value) -> Value:
    """Calls a function of XLA_FFI_Api; whether (i1) it gave an error, which is dropped."""
    api = code.read(frame, API, PTR)
    error = code.call_at(code.read(api, which, PTR), PTR, [arguments])
    failed = code.icmp_unsigned("!=", error, ir.Constant(PTR, None))
    with code.if_then(failed):
        destroy = code.read(api, ERROR_DESTROY, PTR)
        code.call_at(destroy, VOID, [_arguments(code, 24, error)])
    return failed


def _arguments(code: Emitter, size: int, *values: Value) -> Value:
    """A structure of arguments: its size, no extension, values of 8 bytes each."""
    place = code.place(size)
    code.write(place, 0, i64(size))
    code.write(place, 8, i64(0))
    for index, value in enumerate(values):
        code.write(place, 16 + 8 * index, value)
    return place
