# SPDX-License-Identifier: Apache-2.0
"""Every message of the argument checks, and that the public functions run them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import pallas_kernels
from jpaged.pallas_kernels import validation
from jpaged.pallas_kernels.conformance import make_case


def array(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def index(**changes):
    arrays = {
        "page_table": array((3, 6), jnp.int32),
        "kv_lens": array((3,), jnp.int32),
        "cu_q_lens": array((4,), jnp.int32),
        "num_seqs": array((1,), jnp.int32),
    }
    return arrays | changes


# Arguments that go together; each case below spoils one.
POOL = array((2, 9, 2, 4, 32))
ATTENTION = index(q=array((5, 4, 16)), kv_pages=POOL)
WRITE = index(k=array((5, 2, 16)), v=array((5, 2, 16)), kv_pages=POOL)
COPY = {
    "kv_pages": POOL,
    "src_page_ids": array((3,), jnp.int32),
    "dst_page_ids": array((3,), jnp.int32),
}
# Not arrays to trace.
STATIC = ("sliding_window", "soft_cap", "sm_scale", "backend", "kv_scale", "sinks")


def call(function, arguments):
    """Traces a public function without running it."""
    static = {name: arguments[name] for name in STATIC if name in arguments}
    for name in ("kv_scale", "sinks"):
        if isinstance(static.get(name), jax.ShapeDtypeStruct):
            del static[name]
    traced = {name: value for name, value in arguments.items() if name not in static}
    return jax.eval_shape(functools.partial(function, **({"backend": "xla"} | static)), **traced)


def rejects(function, arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call(function, arguments)


def test_arguments_that_go_together():
    assert call(pallas_kernels.paged_attention, ATTENTION).shape == (5, 4, 16)
    assert call(pallas_kernels.write_kv, WRITE).shape == POOL.shape
    assert call(pallas_kernels.copy_pages, COPY).shape == POOL.shape


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_that_are_supported(dtype):
    q, kv = array((5, 4, 16), dtype), array((5, 2, 16), dtype)
    pool = array(POOL.shape, dtype)
    out = call(pallas_kernels.paged_attention, ATTENTION | {"q": q, "kv_pages": pool})
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert (
        call(pallas_kernels.write_kv, WRITE | {"k": kv, "v": kv, "kv_pages": pool}).dtype == dtype
    )


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_quantised_pools_are_supported(dtype):
    more = {"kv_pages": array(POOL.shape, dtype), "kv_scale": array((2,))}
    assert call(pallas_kernels.paged_attention, ATTENTION | more).dtype == jnp.float32
    assert call(pallas_kernels.write_kv, WRITE | more).dtype == dtype


ATTENTION_FAULTS = [
    (
        {"sinks": array((2,))},
        "sinks are for 2 heads, but q has 4",
    ),
    (
        {"sinks": array((4, 1))},
        "sinks has shape [4, 1], expected [num_q_heads]",
    ),
    (
        {"sinks": array((4,), jnp.int32)},
        "sinks has dtype int32, expected bfloat16, float16 or float32",
    ),
    (
        {"q": array((5, 64))},
        "q has shape [5, 64], expected [num_tokens, num_q_heads, head_dim]",
    ),
    (
        {"q": array((1, 5, 4, 16))},
        "q has shape [1, 5, 4, 16], expected [num_tokens, num_q_heads, head_dim]",
    ),
    (
        {"q": array((5, 4, 16), jnp.int32)},
        "q has dtype int32, expected bfloat16, float16 or float32",
    ),
    (
        {"q": array((5, 4, 16), jnp.float8_e4m3fn)},
        "q has dtype float8_e4m3fn, expected bfloat16, float16 or float32",
    ),
    (
        {"q": array((5, 5, 16))},
        "q has 5 heads, not a multiple of the 2 KV heads of kv_pages",
    ),
    (
        {"q": array((5, 1, 16))},
        "q has 1 heads, not a multiple of the 2 KV heads of kv_pages",
    ),
    (
        {"q": array((5, 4, 17))},
        "q has head_dim 17, but a cell of kv_pages has 32 lanes, fewer than the 34 that a key "
        "and a value need",
    ),
    ({"sliding_window": 0}, "sliding_window=0 must be at least 1, or None"),
    ({"sliding_window": 2.5}, "sliding_window=2.5 must be an integer, or None"),
    ({"sliding_window": True}, "sliding_window=True must be an integer, or None"),
    ({"soft_cap": np.nan}, "soft_cap=nan must be a finite number, or None"),
    ({"soft_cap": "30"}, "soft_cap='30' must be a finite number, or None"),
    ({"sm_scale": np.inf}, "sm_scale=inf must be a finite number, or None"),
    ({"sm_scale": np.ma.masked}, "sm_scale=masked must be a finite number, or None"),
    ({"sliding_window": -4}, "sliding_window=-4 must be at least 1, or None"),
    ({"soft_cap": 0.0}, "soft_cap=0.0 must be positive, or None"),
    ({"soft_cap": -1.5}, "soft_cap=-1.5 must be positive, or None"),
]
WRITE_FAULTS = [
    (
        {"k": array((5, 32)), "v": array((5, 32))},
        "k has shape [5, 32], expected [num_tokens, num_kv_heads, head_dim]",
    ),
    (
        {"k": array((5, 2, 16), jnp.int8), "v": array((5, 2, 16), jnp.int8)},
        "k has dtype int8, expected bfloat16, float16 or float32",
    ),
    ({"v": array((5, 2, 8))}, "v is float32[5, 2, 8], but k is float32[5, 2, 16]"),
    ({"v": array((4, 2, 16))}, "v is float32[4, 2, 16], but k is float32[5, 2, 16]"),
    (
        {"v": array((5, 2, 16), jnp.bfloat16)},
        "v is bfloat16[5, 2, 16], but k is float32[5, 2, 16]",
    ),
    (
        {"k": array((5, 4, 16)), "v": array((5, 4, 16))},
        "k has 4 heads, but kv_pages has 2",
    ),
    (
        {"k": array((5, 2, 24)), "v": array((5, 2, 24))},
        "k has head_dim 24, but a cell of kv_pages has 32 lanes, fewer than the 48 that a key "
        "and a value need",
    ),
]
COPY_FAULTS = [
    (
        {"kv_pages": array((9, 2, 4, 32))},
        "kv_pages has shape [9, 2, 4, 32], expected [num_layers, num_pages, num_kv_heads, "
        "page_size, kv_dim]",
    ),
    (
        {"src_page_ids": array((3, 1), jnp.int32)},
        "src_page_ids has shape [3, 1], expected [num_copies]",
    ),
    (
        {"dst_page_ids": array((), jnp.int32)},
        "dst_page_ids has shape [], expected [num_copies]",
    ),
    (
        {"src_page_ids": array((3,), jnp.uint32)},
        "src_page_ids has dtype uint32, expected int32",
    ),
    (
        {"dst_page_ids": array((3,), jnp.float32)},
        "dst_page_ids has dtype float32, expected int32",
    ),
    (
        {"src_page_ids": array((1,), jnp.int32)},
        "1 src_page_ids do not pair with 3 dst_page_ids",
    ),
]
# Faults of what attention and writes have in common.
SHARED_FAULTS = [
    (
        {"kv_pages": array((9, 2, 4, 32))},
        "kv_pages has shape [9, 2, 4, 32], expected [num_layers, num_pages, num_kv_heads, "
        "page_size, kv_dim]",
    ),
    (
        {"kv_pages": array(POOL.shape, jnp.uint8), "kv_scale": array((2,))},
        "kv_pages has dtype uint8, expected a float or int8",
    ),
    (
        {"kv_pages": array(POOL.shape, jnp.int32), "kv_scale": array((2,))},
        "kv_pages has dtype int32, expected a float or int8",
    ),
    (
        {"kv_pages": array(POOL.shape, jnp.bool_)},
        "kv_pages has dtype bool, expected a float or int8",
    ),
    (
        {"kv_pages": array(POOL.shape, jnp.complex64)},
        "kv_pages has dtype complex64, expected a float or int8",
    ),
    (
        {"kv_pages": array(POOL.shape, jnp.int8)},
        "kv_pages of int8 need kv_scale, the size of one step of keys, values",
    ),
    (
        {"kv_scale": array(())},
        "kv_scale has shape [], expected [2]: keys, values",
    ),
    (
        {"kv_scale": array((2, 2))},
        "kv_scale has shape [2, 2], expected [2]: keys, values",
    ),
    (
        {"page_table": array((18,), jnp.int32)},
        "page_table has shape [18], expected [max_num_seqs, pages_per_seq]",
    ),
    (
        {"kv_lens": array((4,), jnp.int32)},
        "kv_lens has shape [4], expected [3] for a page_table of 3 rows",
    ),
    (
        {"cu_q_lens": array((3,), jnp.int32)},
        "cu_q_lens has shape [3], expected [4] for a page_table of 3 rows",
    ),
    (
        {"num_seqs": array((), jnp.int32)},
        "num_seqs has shape [], expected [1] for a page_table of 3 rows",
    ),
    (
        {"page_table": array((3, 6), jnp.int16)},
        "page_table has dtype int16, expected int32",
    ),
    (
        {"kv_lens": array((3,), jnp.uint32)},
        "kv_lens has dtype uint32, expected int32",
    ),
    (
        {"cu_q_lens": array((4,), jnp.float32)},
        "cu_q_lens has dtype float32, expected int32",
    ),
    (
        {"num_seqs": array((1,), jnp.int8)},
        "num_seqs has dtype int8, expected int32",
    ),
]


def named(faults):
    """A fault's test is called by what the message begins with."""
    return [pytest.param(*fault, id=fault[1][:40]) for fault in faults]


@pytest.mark.parametrize(("fault", "message"), named(ATTENTION_FAULTS + SHARED_FAULTS))
def test_attention_rejects(fault, message):
    rejects(pallas_kernels.paged_attention, ATTENTION | fault, message)


@pytest.mark.parametrize(("fault", "message"), named(WRITE_FAULTS + SHARED_FAULTS))
def test_write_rejects(fault, message):
    rejects(pallas_kernels.write_kv, WRITE | fault, message)


@pytest.mark.parametrize(("fault", "message"), named(COPY_FAULTS))
def test_copy_rejects(fault, message):
    rejects(pallas_kernels.copy_pages, COPY | fault, message)


def deleted(values):
    array = jnp.asarray(values)
    array.delete()
    return array


# What no jit looks at before the function does; an array, and how its message goes on.
NO_ARRAYS = [
    (lambda a: np.ma.array(a, mask=True), " is a masked array: give a plain one"),
    (np.ma.array, " is a masked array: give a plain one"),
    (lambda a: a.tolist(), " is a list, expected an array of jax or NumPy"),
    (lambda a: None, " is a NoneType, expected an array of jax or NumPy"),
    (lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), " is a ShapeDtypeStruct, expected an array"),
    (deleted, " was deleted or donated: give an array that is still there"),
    (lambda a: a.astype(object), " has dtype object, expected numbers"),
    (lambda a: a.astype(a.dtype.newbyteorder()), " has dtype >"),
    (lambda a: np.zeros(a.shape, [("a", a.dtype)]), " has dtype [('a', "),
]


@pytest.mark.parametrize(("spoil", "message"), NO_ARRAYS)
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (
            pallas_kernels.paged_attention,
            ATTENTION | {"kv_scale": array((2,)), "sinks": array((4,))},
        ),
        (pallas_kernels.write_kv, WRITE | {"kv_scale": array((2,))}),
        (pallas_kernels.copy_pages, COPY),
    ],
)
def test_what_is_no_array_of_numbers(function, arguments, spoil, message):
    arguments = {name: np.ones(a.shape, a.dtype) for name, a in arguments.items()}
    for name, good in arguments.items():
        if name in ("kv_scale", "sinks") and spoil(good) is None:
            continue
        with pytest.raises(ValueError, match=f"^{name}{re.escape(message)}"):
            function(**(arguments | {name: spoil(good)}), backend="xla")


@pytest.mark.parametrize(
    "layer", [0.5, True, "1", None, np.ma.array(1, mask=True), np.array([0]), jnp.ones(()), np.nan]
)
def test_what_is_no_layer(layer):
    for function, arguments in (
        (pallas_kernels.paged_attention, ATTENTION),
        (pallas_kernels.write_kv, WRITE),
    ):
        arguments = {name: np.ones(a.shape, a.dtype) for name, a in arguments.items()}
        with pytest.raises(ValueError, match=r"^layer=.* must be an integer"):
            function(**arguments, layer=layer, backend="xla")
        for outside in (2, -1, np.int64(2), np.array(2)):
            with pytest.raises(ValueError, match="is outside the 2 layers"):
                function(**arguments, layer=outside, backend="xla")


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (pallas_kernels.paged_attention, ATTENTION),
        (pallas_kernels.write_kv, WRITE),
        (pallas_kernels.copy_pages, COPY),
    ],
    ids=["paged_attention", "write_kv", "copy_pages"],
)
def test_every_function_asks(function, arguments):
    for backend in ("tpu", "metal"):
        with pytest.raises(ValueError, match=f"backend.*{backend}"):
            call(function, arguments | {"backend": backend})
    call(function, arguments | {"backend": None})


class TestContents:
    """`check_contents`: a sound case, and one fault at a time."""

    # Row 0 has 9 tokens on 3 pages of 4, row 1 has 5 on 2; the table is 6 wide.
    LENS = ((1, 9), (5, 5))

    @pytest.fixture
    def case(self):
        return make_case(list(self.LENS), page_size=4)

    def check(self, case):
        validation.check_contents(case.kv_pages, case.rows)

    def rejects(self, case, message):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            self.check(case)

    def test_sound(self, case):
        self.check(case)

    def test_padding_may_hold_anything(self, case):
        case.rows.page_table[0, 3:] = -7
        case.rows.page_table[2:] = 10**6
        case.rows.kv_lens[2:] = -1
        case.rows.cu_q_lens[3:] = -1
        self.check(case)

    def test_no_row(self, case):
        case.rows.num_seqs[0] = 0
        self.check(case)

    def test_full_table(self, case):
        case.rows.page_table[0] = [1, 2, 3, 4, 5, 6]
        case.rows.kv_lens[0] = 24
        self.check(case)

    @pytest.mark.parametrize("live", [-1, 5])
    def test_num_seqs(self, case, live):
        case.rows.num_seqs[0] = live
        self.rejects(case, f"num_seqs={live} is outside [0, 4]")

    def test_cu_q_lens_start(self, case):
        case.rows.cu_q_lens[0] = 1
        self.rejects(case, "cu_q_lens=[1 1 6] must start at 0 and never fall")

    def test_cu_q_lens_fall(self, case):
        case.rows.cu_q_lens[1] = 7
        self.rejects(case, "cu_q_lens=[0 7 6] must start at 0 and never fall")

    def test_more_queries_than_tokens(self, case):
        case.rows.kv_lens[1] = 4
        self.rejects(case, "row 1: 5 queries, but kv_lens is 4")

    def test_more_tokens_than_the_table_holds(self, case):
        case.rows.kv_lens[0] = 25
        self.rejects(
            case, "row 0: kv_lens=25 needs 7 pages of 4 tokens, but the page table holds 6"
        )

    @pytest.mark.parametrize("page", [0, -1, 11, 2**30])
    def test_page_outside_the_pool(self, case, page):
        assert case.kv_pages.shape[1] == 11
        case.rows.page_table[0, 2] = page
        self.rejects(case, f"row 0: page ids [{page}] are outside [1, 11)")

    def test_last_page_of_the_pool(self, case):
        case.rows.page_table[0, 2] = 10
        self.check(case)

    def test_masked_arrays(self, case):
        masked = np.ma.array(case.rows.page_table, mask=True)
        rows = dataclasses.replace(case.rows, page_table=masked)
        with pytest.raises(ValueError, match="page_table is a masked array"):
            validation.check_contents(case.kv_pages, rows)

    def test_arrays_of_jax(self, case):
        rows = jax.tree.map(jnp.asarray, case.rows)
        validation.check_contents(jnp.asarray(np.nan_to_num(case.kv_pages)), rows)
