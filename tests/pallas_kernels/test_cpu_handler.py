# SPDX-License-Identifier: Apache-2.0
"""Handlers of CPU kernels, called as XLA does, with the structures of the header in jaxlib."""

import ctypes
import itertools
import threading
import time

import numpy as np
import pytest
from llvmlite import ir

from jpaged.pallas_kernels.cpu import handler, products
from jpaged.pallas_kernels.cpu.chip import host_chip
from jpaged.pallas_kernels.cpu.compiled import Compiled
from jpaged.pallas_kernels.cpu.emitter import F32, I32, I64, PTR, Emitter, function, i64
from tests.pallas_kernels.ffi_header import constant, define, struct

CHIP = host_chip()
TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
FUNCTION = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
METADATA = "XLA_FFI_Metadata_Extension"
AN_ERROR = 0xE0


def offset(name, *path):
    """Bytes from a structure's beginning to a field, or to one within it."""
    total, kind = 0, struct(name)
    for field in path:
        total += getattr(kind, field).offset
        kind = dict(kind._fields_)[field]
    return total


class TestOffsets:
    """Those that are written into code are where the header has the fields."""

    def test_the_header_is_understood(self):
        # One that is easily counted by hand, and one with a structure within.
        assert ctypes.sizeof(struct("XLA_FFI_Buffer")) == 48
        assert ctypes.sizeof(struct("XLA_FFI_Api_Version")) == 24
        assert offset("XLA_FFI_Api", "internal_api") == 40

    @pytest.mark.parametrize(
        ("written", "path"),
        [
            (handler.EXTENSION, ("XLA_FFI_CallFrame", "extension_start")),
            (handler.API, ("XLA_FFI_CallFrame", "api")),
            (handler.CONTEXT, ("XLA_FFI_CallFrame", "ctx")),
            (handler.ARGUMENTS, ("XLA_FFI_CallFrame", "args", "args")),
            (handler.RESULTS, ("XLA_FFI_CallFrame", "rets", "rets")),
            (handler.DATA, ("XLA_FFI_Buffer", "data")),
            (handler.DIMS, ("XLA_FFI_Buffer", "dims")),
            (handler.ERROR_DESTROY, ("XLA_FFI_Api", "XLA_FFI_Error_Destroy")),
            (handler.SCHEDULE, ("XLA_FFI_Api", "XLA_FFI_ThreadPool_Schedule")),
            (handler.NUM_THREADS, ("XLA_FFI_Api", "XLA_FFI_ThreadPool_NumThreads")),
            (handler.EXTENSION_TYPE, (METADATA, "extension_base", "type")),
            (handler.METADATA, (METADATA, "metadata")),
            (handler.MAJOR, ("XLA_FFI_Metadata", "api_version", "major_version")),
            (handler.MINOR, ("XLA_FFI_Metadata", "api_version", "minor_version")),
        ],
        ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
    )
    def test_is_that_of_the_header(self, written, path):
        assert written == offset(*path)

    def test_arguments_of_functions(self):
        # As `_arguments` writes them: values of 8 bytes from 16 on.
        schedule, threads, destroy = (
            f"XLA_FFI_{name}_Args"
            for name in ("ThreadPool_Schedule", "ThreadPool_NumThreads", "Error_Destroy")
        )
        fields = [(schedule, "ctx"), (schedule, "task"), (schedule, "data")]
        assert [offset(*field) for field in fields] == [16, 24, 32]
        assert [offset(threads, field) for field in ("ctx", "num_threads")] == [16, 24]
        assert offset(destroy, "error") == 16
        sizes = [ctypes.sizeof(struct(name)) for name in (schedule, threads, destroy)]
        assert sizes == [40, 32, 24]
        assert constant("XLA_FFI_Extension_Metadata") == handler.ASKS_METADATA

    def test_xla_is_of_that_version_or_a_later_one(self):
        major, minor = (define(f"XLA_FFI_API_{part}") for part in ("MAJOR", "MINOR"))
        assert major == handler.API_VERSION[0]
        assert minor >= handler.API_VERSION[1]


class Xla:
    """What a handler sees of XLA: a call's frame, and a pool of threads that does as told.

    Attributes:
      scheduled: the tasks, as functions; `run` is called with each.
      destroyed: errors that were handed back.
    """

    def __init__(self, threads=4, run=lambda task: task(), fails=()):
        self.scheduled, self.destroyed, self._run = [], [], run
        self._threads, self._fails, self._number = threads, fails, itertools.count()
        self._functions = {
            "XLA_FFI_Error_Destroy": FUNCTION(self._destroy),
            "XLA_FFI_ThreadPool_Schedule": FUNCTION(self._schedule),
            "XLA_FFI_ThreadPool_NumThreads": FUNCTION(self._num_threads),
        }
        addresses = {
            name: ctypes.cast(function, ctypes.c_void_p).value
            for name, function in self._functions.items()
        }
        self.api = struct("XLA_FFI_Api")(**addresses)
        self.context = 0xC0

    def _arguments(self, name, address):
        arguments = struct(f"XLA_FFI_{name}_Args").from_address(address)
        assert arguments.struct_size == ctypes.sizeof(arguments)
        assert arguments.extension_start is None
        return arguments

    def _destroy(self, address):
        self.destroyed.append(self._arguments("Error_Destroy", address).error)

    def _schedule(self, address):
        arguments = self._arguments("ThreadPool_Schedule", address)
        assert arguments.ctx == self.context
        if next(self._number) in self._fails:
            return AN_ERROR
        task, data = TASK(arguments.task), arguments.data
        self.scheduled.append(lambda: task(data))
        self._run(self.scheduled[-1])

    def _num_threads(self, address):
        arguments = self._arguments("ThreadPool_NumThreads", address)
        assert arguments.ctx == self.context
        if self._threads is None:
            return AN_ERROR
        ctypes.c_int64.from_address(arguments.num_threads).value = self._threads

    def call(self, product, x, weight, extension=None):
        """The product; what it writes beside its result is an error."""
        y = np.full((x.shape[0] + 2, weight.shape[0]), 7, np.float32)
        buffers = [_Buffer(x), _Buffer(weight), _Buffer(y[1:-1])]
        pointers = (ctypes.c_void_p * 3)(*(ctypes.addressof(buffer.own) for buffer in buffers))
        frame = struct("XLA_FFI_CallFrame")(
            api=ctypes.addressof(self.api), ctx=self.context, extension_start=extension
        )
        frame.args.size, frame.args.args = 2, ctypes.addressof(pointers)
        frame.rets.size, frame.rets.rets = 1, ctypes.addressof(pointers) + 16
        assert product(ctypes.addressof(frame)) is None
        assert (y[[0, -1]] == 7).all()
        return y[1:-1]


class _Buffer:
    def __init__(self, array):
        self._keeps = array, (ctypes.c_int64 * 2)(*array.shape)
        self.own = struct("XLA_FFI_Buffer")(
            data=array.ctypes.data, rank=2, dims=ctypes.addressof(self._keeps[1])
        )


def kept(module):
    """Code that outlives its tests: a task may begin when its call is over, and its test."""
    _kept.append(Compiled(module, CHIP))
    return _kept[-1]


_kept = []


@pytest.fixture(scope="module")
def compiled():
    if CHIP is None:
        pytest.skip("no kernels for this processor")
    return kept(products.product_module(CHIP))


@pytest.fixture(scope="module")
def product(compiled):
    return compiled.handler("product")


def case(tokens=3, inputs=256, features=1200):
    rng = np.random.default_rng(tokens * inputs)
    x, weight = (
        rng.integers(-9, 10, (rows, inputs)).astype(np.float32) for rows in (tokens, features)
    )
    return x, weight


def check(product, xla, x, weight):
    np.testing.assert_array_equal(xla.call(product, x, weight), x @ weight.T)


def own_thread(task):
    threading.Thread(target=task).start()


def later(task):
    time.sleep(0.002)
    own_thread(task)


class TestThreads:
    @pytest.mark.parametrize("threads", [2, 3, 8])
    @pytest.mark.parametrize("run", [own_thread, later, lambda task: task()])
    def test_each_thread_but_the_callers_gets_a_task(self, product, threads, run):
        xla = Xla(threads, run)
        check(product, xla, *case())
        assert len(xla.scheduled) == threads - 1
        assert not xla.destroyed

    def test_the_caller_waits_for_pieces_of_others(self, product):
        """One that a task has begun, and all others too, when the caller looks for one."""

        def ahead(task):
            begun = threading.Event()
            own_thread(lambda: (begun.set(), task()))
            begun.wait()
            time.sleep(0.001)

        # Two pieces of some milliseconds each.
        check(product, Xla(2, ahead), *case(60_000, 256, 2 * CHIP.rows))

    @pytest.mark.parametrize("pieces", [2, 5, 8])
    def test_each_thread_has_a_piece_if_there_are_as_many(self, pieces):
        """Each piece waits until all are begun, or a long time."""
        module = ir.Module()
        begun = ir.GlobalVariable(module, I64, "begun")
        begun.initializer = i64(0)
        piece = function(module, "piece", [PTR, I64, I64])
        code, (frame, index, _) = Emitter(piece), piece.args
        code.atomic_rmw("add", begun, i64(1), "acq_rel")
        y = code.read(handler.buffer(code, frame, handler.RESULTS, 0), handler.DATA, PTR)
        give_way = function(module, "sched_yield", [], I32)
        with code.loop(i64(0), i64(2**21), i64(1)):
            number = code.load_atomic(begun, "acquire", 8, typ=I64)
            all_are = code.icmp_signed("==", number, i64(pieces))
            code.store(code.uitofp(all_are, F32), code.at(y, index))
            with code.if_then(all_are):
                code.ret_void()
            code.call(give_way, [])
        code.ret_void()
        handler.emit_handler(
            module, "each", lambda code, frame: (i64(pieces), ir.Constant(ir.IntType(1), 1)), piece
        )
        compiled = kept(module)
        xla = Xla(pieces, own_thread)
        x, weight = np.zeros((1, 4), np.float32), np.zeros((pieces, 4), np.float32)
        np.testing.assert_array_equal(xla.call(compiled.handler("each"), x, weight), 1)

    def test_tasks_that_begin_when_the_call_is_over(self, product):
        xla = Xla(5, run=lambda task: None)
        x, weight = case()
        got = xla.call(product, x, weight)
        # Nothing is left to do: what the call read may be gone by now.
        x[:], weight[:] = np.nan, np.nan
        want = got.copy()
        for task in xla.scheduled:
            task()
        assert len(xla.scheduled) == 4
        np.testing.assert_array_equal(got, want)

    @pytest.mark.parametrize("fails", [{0}, {2}, {0, 1, 2}, {1, 2}], ids=str)
    @pytest.mark.parametrize("run", [own_thread, lambda task: task()])
    def test_a_pool_that_takes_no_task(self, product, fails, run):
        xla = Xla(4, run, fails)
        check(product, xla, *case())
        assert xla.destroyed == [AN_ERROR] * len(fails)
        assert len(xla.scheduled) == 3 - len(fails)

    @pytest.mark.parametrize("threads", [None, 0, 1], ids=["error", "0", "1"])
    def test_no_pool_or_one_of_one_thread(self, product, threads):
        xla = Xla(threads)
        check(product, xla, *case())
        assert not xla.scheduled
        assert xla.destroyed == ([AN_ERROR] if threads is None else [])

    def test_no_more_tasks_than_pieces(self, product):
        # 11 tiles of rows, one of which is not whole, and so many pieces.
        x, weight = case(300, 256, 10 * CHIP.rows + 1)
        xla = Xla(64)
        check(product, xla, x, weight)
        assert len(xla.scheduled) == 10

    def test_a_small_product_wakes_nobody(self, product):
        for tokens, least in ((1, 512), (2, 256)):
            xla = Xla(8)
            check(product, xla, *case(tokens, 256, least - 1))
            assert not xla.scheduled
            check(product, xla, *case(tokens, 256, least))
            assert len(xla.scheduled) == 7

    @pytest.mark.parametrize("fails", [set(), {0, 2}], ids=str)
    def test_what_threads_share_is_freed(self, product, fails):
        in_use = _heap()
        x, weight = case()
        xla = Xla(4, fails={4 * call + index for call in range(3000) for index in fails})

        def calls(number):
            for _ in range(number):
                xla.call(product, x, weight)
                xla.scheduled.clear()
                xla.destroyed.clear()

        calls(50)  # Python's own
        before = in_use()
        calls(1000)
        assert in_use() - before < 100 * handler._BYTES


def _heap():
    """What says how many bytes are allocated by malloc."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("no mallinfo2, which glibc has from 2.33 on")
    fields = (
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    ).split()
    kind = type(
        "mallinfo2", (ctypes.Structure,), {"_fields_": [(f, ctypes.c_size_t) for f in fields]}
    )
    libc.mallinfo2.restype = kind
    return lambda: libc.mallinfo2().uordblks


class TestMetadata:
    def extension(self, kind):
        metadata = struct("XLA_FFI_Metadata")()
        metadata.api_version.major_version = metadata.api_version.minor_version = 99
        extension = struct(METADATA)(metadata=ctypes.addressof(metadata))
        extension.extension_base.type = kind
        return metadata, extension

    def test_the_version_is_said_and_nothing_else_done(self, product):
        metadata, extension = self.extension(constant("XLA_FFI_Extension_Metadata"))
        before = bytes(metadata)
        frame = struct("XLA_FFI_CallFrame")(extension_start=ctypes.addressof(extension))
        assert product(ctypes.addressof(frame)) is None
        version = metadata.api_version
        assert (version.major_version, version.minor_version) == handler.API_VERSION
        version.major_version = version.minor_version = 99
        assert bytes(metadata) == before

    def test_another_extension_is_none_of_it(self, product):
        metadata, extension = self.extension(constant("XLA_FFI_Extension_Metadata") + 1)
        before = bytes(metadata)
        x, weight = case()
        got = Xla().call(product, x, weight, extension=ctypes.addressof(extension))
        np.testing.assert_array_equal(got, x @ weight.T)
        assert bytes(metadata) == before
