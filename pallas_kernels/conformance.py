# SPDX-License-Identifier: Apache-2.0
"""Holds any implementation of the kernels' contract, ours or a stranger's, to dense float64.

    from pallas_kernels import conformance
    for result in conformance.run(paged_attention=my_attention):
        print(result)

Pages are permuted, every sequence has contents of its own, and everything that no sequence owns is
poisoned: cells, queries and keys of padding tokens are NaN (integers: as large as they get), table
entries past a sequence's end are ids of other sequences' pages. The tolerance of each output
follows from the sums that lead to it and the dtypes, see `dense_attention`; it is fitted to nobody.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.layout import kv_pages_shape

# Half the distance between neighbouring numbers of size 1: what rounding to the dtype can cost.
UNIT_ROUNDOFF = {np.dtype(jnp.float32): 2.0**-24, np.dtype(jnp.bfloat16): 2.0**-9} | {
    np.dtype(jnp.float16): 2.0**-12
}
# A kernel's own freedom: the smallest block of keys after which it may rescale its sums, and the
# units in the last place by which its exp and tanh may be off.
_LEAST_BLOCK = 8
_FUNCTION_ULPS = 8


@dataclasses.dataclass
class Case:
    """Arguments of the kernels as NumPy arrays, with each sequence's dense keys and values.

    Attributes:
      q, k, v, kv_pages: float32, of numbers that `dtype` and `kv_dtype` represent exactly.
      page_table, kv_lens, cu_q_lens, num_seqs, layer: as in `pallas_kernels.paged_attention`.
      dense: keys and values of each live row, [kv_len, num_kv_heads, head_dim], what the stored
        numbers stand for.
      dtype: of queries, and of new keys and values.
      kv_dtype: of the pool.
      options: sm_scale, sliding_window, soft_cap and kv_scale where they are not the default.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    kv_pages: np.ndarray
    page_table: np.ndarray
    kv_lens: np.ndarray
    cu_q_lens: np.ndarray
    num_seqs: np.ndarray
    layer: int
    dense: list[tuple[np.ndarray, np.ndarray]]
    dtype: Any = np.float32
    kv_dtype: Any = np.float32
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def index(self) -> tuple[jax.Array, ...]:
        """The index arrays, in the order in which every kernel takes them."""
        arrays = (self.page_table, self.kv_lens, self.cu_q_lens, self.num_seqs)
        return tuple(jnp.asarray(array) for array in arrays)


def make_case(
    lens: list[tuple[int, int]],
    *,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    page_size: int = 4,
    num_layers: int = 2,
    layer: int = 1,
    pad_rows: int = 2,
    pad_tokens: int = 3,
    pad_pages: int = 3,
    lane_padding: int | None = 0,
    dtype: Any = np.float32,
    kv_dtype: Any = None,
    written: bool = True,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Builds a case of rows `(q_len, kv_len)`.

    Args:
      lens: queries and tokens of each live row.
      num_q_heads: query heads.
      num_kv_heads: KV heads.
      head_dim: lanes of a key.
      page_size: tokens a page holds.
      num_layers: layers of the pool.
      layer: the one that is used; the others are poisoned whole.
      pad_rows: rows past the live ones.
      pad_tokens: tokens past the live ones.
      pad_pages: columns of the table past the longest sequence.
      lane_padding: lanes of a cell past the values; None takes as many as a TPU's pool has.
      dtype: see `Case`.
      kv_dtype: see `Case`; dtype by default.
      written: whether this step's cells are filled.
      seed: of everything drawn.
      **options: see `Case`.
    """
    rng = np.random.default_rng(seed)
    kv_dtype = np.dtype(dtype if kv_dtype is None else kv_dtype)
    key_scale, value_scale = options.get("kv_scale", (1.0, 1.0))
    integers = jnp.iinfo(kv_dtype) if jnp.issubdtype(kv_dtype, jnp.integer) else None
    poison = integers.max if integers else np.nan
    pages_per_seq = max(-(-kv_len // page_size) for _, kv_len in lens) + pad_pages
    owned = [-(-kv_len // page_size) for _, kv_len in lens]
    num_pages = 1 + sum(owned) + 5
    free = list(rng.permutation(np.arange(1, num_pages)))
    sizes = (num_layers, num_pages, num_kv_heads, page_size, head_dim)
    if lane_padding is None:
        shape = kv_pages_shape(*sizes, backend="tpu")
    else:
        shape = (*sizes[:4], 2 * head_dim + lane_padding)
    kv_pages = np.full(shape, poison, np.float32)
    rows = len(lens) + pad_rows
    # Padding entries point at pages that other sequences own, or at the null page.
    page_table = rng.integers(0, num_pages, (rows, pages_per_seq)).astype(np.int32)
    num_tokens = sum(q_len for q_len, _ in lens) + pad_tokens

    def draw(*shape):
        return np.array(jnp.asarray(rng.standard_normal(shape), dtype), np.float32)

    def stored(numbers, scale):
        scaled = numbers / np.float32(scale)
        if integers:
            return np.clip(np.round(scaled), integers.min, integers.max)
        return scaled.astype(kv_dtype).astype(np.float32)

    q = draw(num_tokens, num_q_heads, head_dim)
    k = np.full((num_tokens, num_kv_heads, head_dim), np.nan, np.float32)
    v = np.full_like(k, np.nan)
    cu_q_lens = [0]
    dense = []
    for row, (q_len, kv_len) in enumerate(lens):
        keys, values = draw(kv_len, num_kv_heads, head_dim), draw(kv_len, num_kv_heads, head_dim)
        start, cu = cu_q_lens[-1], cu_q_lens[-1] + q_len
        k[start:cu], v[start:cu] = keys[kv_len - q_len :], values[kv_len - q_len :]
        cu_q_lens.append(cu)
        keys, values = stored(keys, key_scale), stored(values, value_scale)
        dense.append((keys * np.float64(key_scale), values * np.float64(value_scale)))
        ids = [free.pop() for _ in range(owned[row])]
        page_table[row, : len(ids)] = ids
        positions = np.arange(kv_len if written else kv_len - q_len)
        at = (layer, np.array(ids, int)[positions // page_size], slice(None), positions % page_size)
        cells = kv_pages[at]
        cells[..., :head_dim] = keys[: len(positions)]
        cells[..., head_dim : 2 * head_dim] = values[: len(positions)]
        kv_pages[at] = cells
    q[cu_q_lens[-1] :] = np.nan
    return Case(
        q=q,
        k=k,
        v=v,
        kv_pages=kv_pages,
        page_table=page_table,
        kv_lens=np.array([kv_len for _, kv_len in lens] + [7] * pad_rows, np.int32),
        cu_q_lens=np.array(cu_q_lens + [cu_q_lens[-1]] * pad_rows, np.int32),
        num_seqs=np.array([len(lens)], np.int32),
        layer=layer,
        dense=dense,
        dtype=dtype,
        kv_dtype=kv_dtype,
        options=options,
    )


def dense_attention(case: Case, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Float64 attention over each sequence's dense keys and values, one query at a time.

    The bound is a priori (Higham 2002, section 3.1: a sum of n products is off by at most n units
    of roundoff of the sum of their sizes, in any order). Scores are sums of head_dim products;
    their error, and that of `exp`, is a relative error of the weights; numerator and denominator
    are sums over the keys, rescaled after every block; weights may be rounded to the queries' dtype
    before they meet the values, and the result is.

    Args:
      case: what to compute.
      **options: replace the case's own.

    Returns:
      float64[num_tokens, num_q_heads, head_dim], zero for padding, and how far a right
      implementation that accumulates in float32 can be off.
    """
    options = case.options | options
    window, cap = options.get("sliding_window"), options.get("soft_cap")
    num_q_heads, head_dim = case.q.shape[1:]
    scale = options.get("sm_scale")
    scale = head_dim**-0.5 if scale is None else scale
    u, out_u = 2.0**-24, UNIT_ROUNDOFF[np.dtype(case.dtype)]
    weight_u = out_u if out_u > u else 0.0
    out, bound = np.zeros(case.q.shape), np.zeros(case.q.shape)
    for row, (keys, values) in enumerate(case.dense):
        group = num_q_heads // keys.shape[1]
        start, end = case.cu_q_lens[row : row + 2]
        for token in range(start, end):
            position = len(keys) - (end - token)
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(num_q_heads):
                seen = keys[first : position + 1, head // group].astype(np.float64)
                value = values[first : position + 1, head // group].astype(np.float64)
                query = case.q[token, head].astype(np.float64)
                scores = seen @ query * scale
                score_error = (head_dim + 3) * u * (np.abs(seen) @ np.abs(query)).max() * abs(scale)
                if cap is not None:
                    scores = cap * np.tanh(scores / cap)
                    score_error += _FUNCTION_ULPS * u * cap
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[token, head] = weights @ value
                # Rounding of differences of scores, each step's own and of the running maximum's.
                score_error += 4 * u * np.abs(scores).max()
                blocks = -(-len(scores) // _LEAST_BLOCK) + 1
                relative = np.expm1(2 * score_error) + _FUNCTION_ULPS * u * blocks
                relative += 2 * (len(scores) + 2) * u + weight_u
                size = weights @ np.abs(value)
                error = relative * size
                bound[token, head] = error + out_u * (np.abs(out[token, head]) + error)
    return out, 1.1 * bound + np.finfo(np.float32).tiny  # 1.1: products of errors


def check_attention(attend: Callable[..., jax.Array], case: Case) -> float:
    """Compares one call with `dense_attention`.

    Returns:
      The largest share of its bound that an error takes.

    Raises:
      AssertionError: naming the first output that is off, with row, position and head.
      Exception: whatever `attend` raises.
    """
    options = dict(case.options)
    if "kv_scale" in options:
        options["kv_scale"] = jnp.asarray(options["kv_scale"], jnp.float32)
    q = jnp.asarray(case.q, case.dtype)
    pool = jnp.asarray(case.kv_pages, case.kv_dtype)
    # The layer is traced, as a scan over layers needs it.
    call = jax.jit(functools.partial(attend, **options))
    got = call(q, pool, *case.index, layer=jnp.int32(case.layer))
    assert got.dtype == case.dtype, f"dtype {got.dtype} is not that of the queries, {case.dtype}"
    assert got.shape == q.shape, f"shape {got.shape} is not that of the queries, {q.shape}"
    want, bound = dense_attention(case)
    live = int(case.cu_q_lens[case.num_seqs[0]])
    got = np.asarray(got.astype(jnp.float32), np.float64)[:live]
    shares = np.abs(got - want[:live]) / bound[:live]
    wrong = ~(shares <= 1)
    if wrong.any():
        token, head, lane = np.argwhere(wrong)[0]
        row = int(np.searchsorted(case.cu_q_lens[1 : len(case.dense) + 1], token, side="right"))
        position = int(case.kv_lens[row]) - int(case.cu_q_lens[row + 1] - token)
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} numbers are wrong; the first in row {row}, position "
            f"{position} of {case.kv_lens[row]}, head {head}, lane {lane}: "
            f"{got[token, head, lane]:.6g} is not {want[token, head, lane]:.6g} "
            f"within {bound[token, head, lane]:.2g}"
        )
    return float(shares.max(initial=0))


def poisoned_pool(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """A pool whose numbers differ from their neighbours in their bits, NaN wherever that can be.

    Comparing bits then shows a cell that was moved or taken from another.
    """
    dtype = np.dtype(dtype)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    count = np.arange(np.prod(shape), dtype=np.int64)
    if dtype == ml_dtypes.bfloat16:
        # XLA keeps no payload of a bfloat16 NaN: every third number is the plain one.
        bits = np.where(count % 3 == 0, 0x7FC0, 0x3000 + count * 7919 % 0x2FFF)
    elif dtype.itemsize == 1:
        bits = count * 89 % 113  # no two neighbours equal, and finite in every 8-bit format
    else:
        nan, free = {2: (0x7E00, 9), 4: (0x7FC00000, 22)}[dtype.itemsize]
        bits = nan + count * 7919 % (2**free - 1)
    return bits.astype(unsigned).reshape(shape).view(dtype)


def written_pool(case: Case, pool: np.ndarray) -> np.ndarray:
    """What `write_kv` should make of a pool: one cell at a time."""
    want = pool.copy()
    page_size, head_dim = pool.shape[3], case.k.shape[2]
    scales = np.asarray(case.options.get("kv_scale", (1.0, 1.0)), np.float32)

    def stored(numbers, scale):
        if "kv_scale" in case.options:
            numbers = numbers / scale
        if jnp.issubdtype(pool.dtype, jnp.integer):
            info = jnp.iinfo(pool.dtype)
            numbers = np.clip(np.round(numbers), info.min, info.max)
        return numbers.astype(pool.dtype)

    for row in range(int(case.num_seqs[0])):
        start, end = case.cu_q_lens[row : row + 2]
        for token in range(start, end):
            position = case.kv_lens[row] - (end - token)
            page, slot = case.page_table[row, position // page_size], position % page_size
            for head in range(pool.shape[2]):
                cell = want[case.layer, page, head, slot]
                cell[:head_dim] = stored(case.k[token, head], scales[0])
                cell[head_dim : 2 * head_dim] = stored(case.v[token, head], scales[1])
    return want


def check_write(write: Callable[..., jax.Array], case: Case) -> float:
    """Compares one call, bit for bit, with a loop over the tokens.

    Returns:
      0, the share of the tolerance that is used.

    Raises:
      AssertionError: naming the first number that is off.
      Exception: whatever `write` raises.
    """
    options = {}
    if "kv_scale" in case.options:
        options["kv_scale"] = jnp.asarray(case.options["kv_scale"], jnp.float32)
    pool = poisoned_pool(case.kv_pages.shape, case.kv_dtype)
    new = (jnp.asarray(case.k, case.dtype), jnp.asarray(case.v, case.dtype))
    call = jax.jit(functools.partial(write, **options), donate_argnums=0)
    got = call(jnp.asarray(pool), *new, *case.index, layer=jnp.int32(case.layer))
    _check_bits(got, written_pool(case, pool))
    return 0.0


def check_copy(copy: Callable[..., jax.Array], case: Case) -> float:
    """Copies pages, a chain among them, and compares bit for bit; as `check_write`."""
    pool = poisoned_pool(case.kv_pages.shape, case.kv_dtype)
    last = pool.shape[1] - 1
    # Page 2 is read and written: every source is read first. The null page onto itself is padding.
    sources, targets = np.array([1, 2, 1, 0, 0], np.int32), np.array([2, 3, last, 0, 0], np.int32)
    got = jax.jit(copy, donate_argnums=0)(jnp.asarray(pool), sources, targets)
    want = pool.copy()
    want[:, targets] = pool[:, sources]
    _check_bits(got, want)
    return 0.0


def _check_bits(result: jax.Array, want: np.ndarray) -> None:
    got = np.asarray(result)
    assert (got.dtype, got.shape) == (want.dtype, want.shape), (
        f"{got.dtype}{list(got.shape)} is not {want.dtype}{list(want.shape)}"
    )
    unsigned = np.dtype(f"u{got.dtype.itemsize}")
    different = np.argwhere(got.view(unsigned) != want.view(unsigned))
    if len(different):
        at = tuple(different[0])
        raise AssertionError(
            f"{len(different)} of {got.size} numbers are wrong; the first at [layer, page, head, "
            f"slot, lane] = {[int(i) for i in at]}: {got[at]} is not {want[at]}"
        )


_DECODE = [(1, 1), (1, 4), (1, 5), (1, 130), (1, 257), (1, 3)]
_PREFILL = [(1, 1), (4, 4), (7, 7), (40, 40), (33, 65), (2, 130)]
_MIXED = [(1, 9), (5, 5), (1, 140), (70, 133), (0, 6), (3, 8), (1, 1)]
_SMALL = [(1, 20), (9, 9), (1, 33), (3, 40)]


def suite() -> dict[str, Callable[[], Case]]:
    """The cases by name; each is built when it is called."""
    usual = {"head_dim": 128, "page_size": 16, "lane_padding": None}
    cases: dict[str, dict[str, Any]] = {}
    for kind, lens in (("decode", _DECODE), ("prefill", _PREFILL), ("mixed", _MIXED)):
        for page_size in (8, 16, 64, 256):
            cases[f"{kind}, page_size {page_size}"] = {"lens": lens, "page_size": page_size}
    edges = [(1, 16 * n + d) for n in (1, 2, 8) for d in (-1, 0, 1)]
    cases["decode around page boundaries"] = {"lens": edges}
    chunks = [(q, 16 * n + d) for q in (2, 15, 16, 17) for n, d in ((2, -1), (2, 0), (3, 1))]
    cases["chunks around page boundaries"] = {"lens": chunks}
    cases["decode without padding"] = {"lens": _DECODE, "pad_rows": 0, "pad_tokens": 0}
    cases["much padding"] = {"lens": _MIXED, "pad_rows": 9, "pad_tokens": 50, "pad_pages": 40}
    cases["512 rows"] = {"lens": [(1, 1 + i % 37) for i in range(512)], "num_q_heads": 2}
    for window in (1, 15, 16, 17, 100, 129):
        cases[f"sliding_window {window}"] = {"lens": _MIXED, "sliding_window": window}
    cases["sliding_window 40, decode"] = {"lens": _DECODE, "sliding_window": 40}
    cases["soft_cap and sm_scale"] = {"lens": _MIXED, "soft_cap": 1.5, "sm_scale": 0.7}
    for q, kv in ((1, 1), (8, 8), (8, 1), (5, 1), (9, 3), (14, 2), (16, 1), (32, 8)):
        cases[f"{q} query heads, {kv} KV heads"] = {
            "lens": _SMALL,
            "num_q_heads": q,
            "num_kv_heads": kv,
        }
    for head_dim in (64, 80, 96, 256):
        for kind, lens in (("decode", _DECODE), ("mixed", _MIXED)):
            cases[f"head_dim {head_dim}, {kind}"] = {"lens": lens, "head_dim": head_dim}
    for dtype in (jnp.bfloat16, jnp.float16):
        for kind, lens in (("decode", _DECODE), ("mixed", _MIXED)):
            cases[f"{dtype.__name__}, {kind}"] = {"lens": lens, "dtype": dtype}
    for kv_dtype in (jnp.int8, jnp.float8_e4m3fn):
        cases[f"{kv_dtype.__name__} pages"] = {
            "lens": _MIXED,
            "dtype": jnp.bfloat16,
            "kv_dtype": kv_dtype,
            "kv_scale": (2**-5, 2**-4),  # exact divisors, so that writes are exact too
        }
    cases["33,000 tokens"] = {"lens": [(1, 33000), (1, 5)], "num_layers": 1, "layer": 0} | {
        "num_kv_heads": 1,
        "num_q_heads": 2,
        "page_size": 64,
    }
    cases["33,000 tokens, sliding_window 100"] = cases["33,000 tokens"] | {"sliding_window": 100}
    cases["one row, without queries"] = {"lens": [(0, 3)]}
    return {name: functools.partial(make_case, **usual | case) for name, case in cases.items()}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one implementation made of one case.

    Attributes:
      function: "paged_attention", "write_kv" or "copy_pages".
      case: its name in `suite`.
      status: "passed", "failed", or "refused" where the implementation raised ValueError or
        NotImplementedError, which is how it says that a case is beyond it.
      detail: why, where it did not pass.
      error_share: largest error as a share of what is allowed; 0 for what must be exact.
      took_s: seconds, compilation included.
    """

    function: str
    case: str
    status: str
    detail: str
    error_share: float
    took_s: float


def run(
    *,
    paged_attention: Callable[..., jax.Array] | None = None,
    write_kv: Callable[..., jax.Array] | None = None,
    copy_pages: Callable[..., jax.Array] | None = None,
    only: str = "",
) -> Iterator[Result]:
    """Runs the suite on implementations with the signatures of those in `pallas_kernels`.

    Args:
      paged_attention: called without `backend`; `layer` is traced. None leaves it out.
      write_kv: likewise; the pool is donated.
      copy_pages: likewise.
      only: runs the cases whose name contains this.

    Yields:
      A result a function and case, as soon as it is there.
    """
    for name, make in suite().items():
        if only not in name:
            continue
        case = make()
        for function, implementation, check in (
            ("paged_attention", paged_attention, check_attention),
            ("write_kv", write_kv, check_write),
            ("copy_pages", copy_pages, check_copy),
        ):
            if implementation is None:
                continue
            start, share, status, detail = time.perf_counter(), 0.0, "passed", ""
            try:
                share = check(implementation, case)
            except (ValueError, NotImplementedError) as e:
                status, detail = "refused", str(e)
            except Exception as e:  # the suite goes on, whatever a stranger's kernel raises
                status, detail = "failed", f"{type(e).__name__}: {e}"
            yield Result(function, name, status, detail, share, time.perf_counter() - start)
