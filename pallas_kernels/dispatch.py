# SPDX-License-Identifier: Apache-2.0
"""Chooses the backend of each public function; never falls back in silence."""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, cast

import jax
import jax.numpy as jnp

from jpaged.pallas_kernels import validation
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant

logger = logging.getLogger(__name__)

BACKENDS = ("tpu", "gpu", "cpu", "xla")
BACKEND_OF_PLATFORM: Mapping[str, str] = MappingProxyType(
    {"cpu": "cpu", "tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}
)
"""Whose kernels run on a platform, as jax names those, unless told."""


class Backend(Protocol):
    """What the package of a backend offers; arguments are checked, and as documented below."""

    def check_platform(self) -> None:
        """Raises ValueError where the kernels can neither run, nor be compiled or interpreted."""
        ...

    def paged_attention(
        self,
        q: jax.Array,
        kv_pages: jax.Array,
        rows: Rows,
        variant: AttentionVariant,
        *,
        layer: int | jax.Array,
        kv_scale: jax.Array | None,
        sinks: jax.Array | None,
    ) -> jax.Array:
        """See `attend`; sinks are float32."""
        ...

    def write_kv(
        self,
        kv_pages: jax.Array,
        k: jax.Array,
        v: jax.Array,
        rows: Rows,
        *,
        layer: int | jax.Array,
        kv_scale: jax.Array | None,
    ) -> jax.Array:
        """See `write`."""
        ...

    def copy_pages(
        self, kv_pages: jax.Array, src_page_ids: jax.Array, dst_page_ids: jax.Array
    ) -> jax.Array:
        """See the function of that name."""
        ...


def resolve_backend(backend: str | None) -> str:
    """Returns the backend to use: as asked, or that of JAX's default device.

    Raises:
      ValueError: for a name that is no backend, or a backend that cannot be used here.
    """
    asked = backend if backend is not None else BACKEND_OF_PLATFORM.get(jax.default_backend())
    if backend is None and asked == "cpu":
        return _backend_of_cpus()
    if asked not in BACKENDS:
        raise ValueError(
            f"backend={backend!r} on platform {jax.default_backend()!r}: choose one of {BACKENDS}"
        )
    _package(asked).check_platform()
    return asked


@functools.cache
def _backend_of_cpus() -> str:
    """What CPUs get: "xla", which runs everywhere, where "cpu" cannot be had, and says so once."""
    try:
        _package("cpu").check_platform()
    except ValueError as error:
        # It is an extra, and no fault of anybody that it is not there.
        is_there = importlib.util.find_spec("llvmlite") is not None
        level = logging.WARNING if is_there else logging.INFO
        logger.log(level, "steps take longer, by backend 'xla': %s", error)
        return "xla"
    return "cpu"


def product_of(
    backend: str, x: jax.Array, weight: jax.Array
) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """A backend's own `x @ weight.T`; None where XLA's is all that there is for such arrays.

    Args:
      backend: as `resolve_backend` gives it.
      x: [tokens, in].
      weight: [features, in].
    """
    if backend != "cpu":
        return None
    kernels = importlib.import_module("jpaged.pallas_kernels.cpu.products")
    return kernels.product if kernels.takes(x, weight) else None


def _package(backend: str) -> Backend:
    """The backend's package, imported when it is first used: Pallas costs every start 0.1 s."""
    return cast(Backend, importlib.import_module(f"jpaged.pallas_kernels.{backend}"))


def paged_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    layer: int | jax.Array = 0,
    sm_scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    kv_scale: jax.Array | None = None,
    sinks: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Attends ragged queries to keys and values stored in pages.

    One call serves decode (one query a row), a prefill chunk, and any mix of both: row i's queries
    are the last `cu_q_lens[i+1] - cu_q_lens[i]` positions of its `kv_lens[i]` tokens, each
    attending causally. Rows past `num_seqs`, tokens past `cu_q_lens[num_seqs]` and table entries
    past a sequence's last page are padding: what they hold, NaN included, never reaches a live row.
    A call with no more tokens than rows is taken for decode, where each query reads its sequence by
    itself: right for prefill too, but slow.

    Args:
      q: bf16|f16|f32[num_tokens, num_q_heads, head_dim], sequences back to back.
      kv_pages: [num_layers, num_pages, num_kv_heads, page_size, kv_dim], the queries' own keys and
        values included (see `write_kv`); any float dtype, or int8 with `kv_scale`.
      page_table: i32[max_num_seqs, pages_per_seq], physical page ids.
      kv_lens: i32[max_num_seqs], tokens visible to each sequence, this step's included.
      cu_q_lens: i32[max_num_seqs + 1], where each row's queries start.
      num_seqs: i32[1], live rows.
      layer: which layer of the pool to read; may be traced.
      sm_scale: multiplies the scores; 1 / sqrt(head_dim) by default.
      sliding_window: a query sees itself and the `sliding_window - 1` tokens before it.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`.
      kv_scale: f32[2], what stored keys and stored values are multiplied by.
      sinks: bf16|f16|f32[num_q_heads], a score of each head beside those of the keys, neither
        scaled nor capped, that takes its share of the weights and has no value; -inf is none.
      backend: "tpu", "gpu", "cpu" or "xla"; by default the one of JAX's default device, and on
        CPUs "xla" where what "cpu" needs is not there. What is sharded, or exported by
        `jax.export`, takes "xla": compilers neither split other kernels nor promise to keep them;
        within `jax.shard_map` all can be used.

    Returns:
      Same shape and dtype as `q`, accumulated in float32; zeros for padding tokens.

    Raises:
      ValueError: if shapes or dtypes do not fit together, or the backend is not available.

    Source: Kwon et al. 2023, section 4.1; online softmax, Milakov & Gimelshein 2018; sinks, Xiao et
    al. 2024, as learned by gpt-oss.
    """
    rows = Rows(page_table, kv_lens, cu_q_lens, num_seqs)
    variant = AttentionVariant(sm_scale, sliding_window, soft_cap)
    return attend(
        q, kv_pages, rows, variant, layer=layer, kv_scale=kv_scale, sinks=sinks, backend=backend
    )


def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    rows: Rows,
    variant: AttentionVariant,
    *,
    layer: int | jax.Array = 0,
    kv_scale: jax.Array | None = None,
    sinks: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """`paged_attention`, for callers that have its arguments as values already."""
    kernels = _package(resolve_backend(backend))
    validation.check_attention(q, kv_pages, rows, variant, kv_scale=kv_scale, sinks=sinks)
    validation.check_layer(kv_pages, layer)
    if sinks is not None:
        sinks = jnp.asarray(sinks, jnp.float32)
    with jax.named_scope("paged_attention"):  # in traces, by which backend ever
        return kernels.paged_attention(
            q, kv_pages, rows, variant, layer=layer, kv_scale=kv_scale, sinks=sinks
        )


def write_kv(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    layer: int | jax.Array = 0,
    kv_scale: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Writes the step's new keys and values into their sequences' pages.

    Every other cell, those of other layers included, stays as it was; under donation nothing but
    the written cells moves.

    Args:
      kv_pages: [num_layers, num_pages, num_kv_heads, page_size, kv_dim]; may be donated.
      k: [num_tokens, num_kv_heads, head_dim], keys of the tokens that `cu_q_lens` delimits.
      v: same shape and dtype as `k`.
      page_table: i32[max_num_seqs, pages_per_seq].
      kv_lens: i32[max_num_seqs], this step's tokens included.
      cu_q_lens: i32[max_num_seqs + 1].
      num_seqs: i32[1].
      layer: which layer of the pool to write; may be traced.
      kv_scale: f32[2]; keys are stored divided by the first, values by the second.
      backend: as in `paged_attention`.

    Returns:
      `kv_pages` with the cells written, converted to the pool's dtype; what eight bits cannot hold
      becomes the nearest number that they can.

    Raises:
      ValueError: if shapes or dtypes do not fit together, or the backend is not available.
    """
    rows = Rows(page_table, kv_lens, cu_q_lens, num_seqs)
    return write(kv_pages, k, v, rows, layer=layer, kv_scale=kv_scale, backend=backend)


def write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: Rows,
    *,
    layer: int | jax.Array = 0,
    kv_scale: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """`write_kv`, for callers that have its index arrays as a value already."""
    kernels = _package(resolve_backend(backend))
    validation.check_write(kv_pages, k, v, rows, kv_scale=kv_scale)
    validation.check_layer(kv_pages, layer)
    with jax.named_scope("write_kv"):
        return kernels.write_kv(kv_pages, k, v, rows, layer=layer, kv_scale=kv_scale)


def copy_pages(
    kv_pages: jax.Array,
    src_page_ids: jax.Array,
    dst_page_ids: jax.Array,
    *,
    backend: str | None = None,
) -> jax.Array:
    """Copies whole pages in every layer; all sources are read before any destination is written.

    Args:
      kv_pages: [num_layers, num_pages, num_kv_heads, page_size, kv_dim]; may be donated.
      src_page_ids: i32[num_copies]; pad with `NULL_PAGE`.
      dst_page_ids: i32[num_copies], distinct but for the padding; pad with `NULL_PAGE`.
      backend: as in `paged_attention`.

    Returns:
      `kv_pages` with the copies made.

    Raises:
      ValueError: if shapes or dtypes do not fit together, or the backend is not available.
    """
    kernels = _package(resolve_backend(backend))
    validation.check_copy(kv_pages, src_page_ids, dst_page_ids)
    with jax.named_scope("copy_pages"):
        return kernels.copy_pages(kv_pages, src_page_ids, dst_page_ids)
