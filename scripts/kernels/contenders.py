# SPDX-License-Identifier: Apache-2.0
"""Attention kernels that `benchmark_kernels` measures, ours and others, on the same numbers."""

import dataclasses
import functools
import importlib
import math
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jpaged import pallas_kernels
from jpaged.device.compiler_options import compiler_options
from jpaged.pallas_kernels import reference
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant

OWN = ("cpu", "gpu", "gpu-mosaic", "gpu-narrow", "gpu-triton", "tpu", "xla")
PEERS = ("xla", "jax_triton", "cudnn", "torch_sdpa", "torch_flex")
UNCACHED_BYTES = 2**27  # more than any GPU's cache holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One step: queries and tokens of each sequence, and what a layer looks like."""

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that a call reads, each once."""
        cell = 2 * self.num_kv_heads * self.head_dim * jnp.dtype(self.kv_dtype).itemsize
        return sum(self.kv_lens) * cell

    @property
    def flops(self) -> int:
        """Multiplications and additions of a call, of queries and the keys that they see."""
        lens = zip(self.q_lens, self.kv_lens, strict=True)
        pairs = sum(q * (kv - q) + q * (q + 1) // 2 for q, kv in lens)
        return 4 * pairs * self.num_q_heads * self.head_dim

    @property
    def layers(self) -> int:
        """Layers that calls take turns with; of a single one, a gather could be hoisted."""
        return max(2, min(4, -(-UNCACHED_BYTES // self.kv_bytes)))

    @property
    def bytes_needed(self) -> int:
        """Memory: the pool, a contender's copy of it, and what making one layer of each takes."""
        whole_pages = tuple(-(-n // self.page_size) * self.page_size for n in self.kv_lens)
        layer_bytes = dataclasses.replace(self, kv_lens=whole_pages).kv_bytes
        queries = 16 * sum(self.q_lens) * self.num_q_heads * self.head_dim
        return 2 * (self.layers + 1) * layer_bytes + queries


class Refused(Exception):
    """A contender does not do this, or not here."""


class Inputs:
    """The numbers of a case: q, pool (of all layers), and the other arguments of a call in rest."""

    def __init__(self, case: Case):
        self.case = case
        pages = [-(-length // case.page_size) for length in case.kv_lens]
        ids = 1 + np.random.default_rng(0).permutation(sum(pages))  # 0 is reserved
        table = np.zeros((len(pages), max(pages)), np.int32)
        for row, (end, count) in enumerate(zip(np.cumsum(pages), pages, strict=True)):
            table[row, :count] = ids[end - count : end]
        q_key, key = jax.random.split(jax.random.key(0, impl="rbg"))
        shape = (sum(case.q_lens), case.num_q_heads, case.head_dim)
        self.q = jax.random.normal(q_key, shape, case.dtype)
        sizes = (1 + sum(pages), case.num_kv_heads, case.page_size, case.head_dim)
        _, *layer = pallas_kernels.kv_pages_shape(case.layers, *sizes, backend="gpu")
        self.pool = _draw(jax.random.split(key, case.layers), tuple(layer), case.kv_dtype)
        self.table, self.kv_lens = jnp.asarray(table), jnp.array(case.kv_lens, jnp.int32)
        cu_q_lens = jnp.asarray(np.cumsum([0, *case.q_lens]), jnp.int32)
        self.rest = (self.table, self.kv_lens, cu_q_lens, jnp.array([len(pages)], jnp.int32))
        self.kv_scale = jnp.full(2, 2.0**-5) if case.kv_dtype == "int8" else None

    def dense(self) -> list[list[jax.Array]]:
        """Keys and values of each layer, [rows, context, num_kv_heads, head_dim] each."""
        if len({*zip(self.case.q_lens, self.case.kv_lens, strict=True)}) > 1:
            raise Refused("sequences differ, and it takes one dense array")
        shape = (len(self.case.q_lens), self.case.kv_lens[0])
        return [_densify(self.pool, i, self.table, shape) for i in range(self.case.layers)]

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Some tokens, and their results in layer 0, f32[tokens, num_q_heads, head_dim]."""
        ends = np.cumsum(self.case.q_lens)
        tokens = np.unique(np.linspace(0, ends[-1] - 1, 16).astype(int))
        attend, results = jax.jit(reference.paged_attention, static_argnums=3), []
        with jax.default_matmul_precision("highest"):
            # One by one, for less memory: a token ends the sequence that it sees.
            for token in tokens:
                row = np.searchsorted(ends, token, side="right")
                length = self.case.kv_lens[row] - ends[row] + token + 1
                q, lens = self.q[token][None].astype("float32"), jnp.array([length], jnp.int32)
                one = jnp.ones(1, jnp.int32)
                rows = Rows(self.table[row][None], lens, jnp.arange(2, dtype=jnp.int32), one)
                out = attend(q, self.pool, rows, AttentionVariant(), kv_scale=self.kv_scale)
                results.append(np.asarray(out[0]))
        return tokens, np.stack(results)


@jax.jit(static_argnums=(1, 2))
def _draw(keys, shape, dtype):
    if dtype == "int8":
        return jax.lax.map(lambda key: jax.random.randint(key, shape, -100, 101, dtype), keys)
    return jax.lax.map(lambda key: jax.random.normal(key, shape, "bfloat16").astype(dtype), keys)


@jax.jit(static_argnums=3)
def _densify(pool, layer, table, shape):
    cells = pool[layer, table].swapaxes(2, 3)
    cells = cells.reshape(shape[0], -1, *cells.shape[-2:])[:, : shape[1]]
    return jnp.split(cells, 2, axis=-1)


# Of jax's contenders, each gives call(q, layer, operands) and the operands.


def _paged(name: str, inputs: Inputs):
    backend, _, lowering = name.partition("-")

    def call(q, layer, operands):
        *operands, kv_scale = operands
        spec = {"layer": layer, "kv_scale": kv_scale, "backend": backend}
        if not lowering:
            return pallas_kernels.paged_attention(q, *operands, **spec)
        forced = importlib.import_module(f"jpaged.pallas_kernels.gpu.{lowering}")
        with mock.patch("jpaged.pallas_kernels.gpu.attention.choose_lowering", lambda *_: forced):
            return pallas_kernels.paged_attention(q, *operands, **spec)

    return call, (inputs.pool, *inputs.rest, inputs.kv_scale)


def _jax_triton(inputs: Inputs):
    if max(inputs.case.q_lens) > 1:
        raise Refused("decode only")
    from jax.experimental.pallas.ops.gpu import paged_attention as module  # deprecated: only here

    # Its defaults, or the powers of two below that divide the pages.
    splits = math.gcd(inputs.table.shape[1], 16)
    block = math.gcd(inputs.table.shape[1] // splits, 8)
    spec = {"k_splits": splits, "pages_per_compute_block": block}

    def call(q, layer, operands):
        layers, table, kv_lens = operands
        q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)  # it does not scale scores
        return module.paged_attention(q, *layers[layer], table, kv_lens, **spec)

    split = jax.jit(lambda pool, layer: jnp.split(pool[layer].swapaxes(0, 1), 2, axis=-1))
    layers = [split(inputs.pool, layer) for layer in range(inputs.case.layers)]
    return call, (layers, inputs.table, inputs.kv_lens)


def _cudnn(inputs: Inputs):
    case = inputs.case
    layers, causal = inputs.dense(), case.q_lens[0] > 1
    if causal and case.q_lens != case.kv_lens:
        raise Refused("is_causal puts the first query beside the first key")

    def call(q, layer, layers):
        rows = q.reshape(len(case.q_lens), -1, *q.shape[1:])
        spec = {"is_causal": causal, "implementation": "cudnn"}
        return jax.nn.dot_product_attention(rows, *layers[layer], **spec).reshape(q.shape)

    return call, layers


def _jax_runner(name: str, inputs: Inputs):
    """Returns once(), which gives a call's result, and chain(trips), all layers' calls in a row."""
    peers = {"jax_triton": _jax_triton, "cudnn": _cudnn}
    call, operands = peers[name](inputs) if name in peers else _paged(name, inputs)
    layers = inputs.case.layers
    # So that the kernel is lowered once. Peers take each layer from arrays of its own.
    call = jax.jit(call, static_argnums=1 if name in peers else ())

    def chain(trips):
        # As steps are compiled: one graph, without the host between two kernels.
        @functools.partial(jax.jit, compiler_options=compiler_options(jax.default_backend()))
        def loop(q, operands):
            def trip(i, q):
                for layer in range(layers):
                    # XLA's own could be moved out of the loop in part, did it know the layer.
                    q = call(q, (i + layer) % layers if name in ("cpu", "xla") else layer, operands)
                return q

            # XLA is told how many trips there are; else the host would look after each of them.
            return jax.lax.fori_loop(0, trips, trip, q)

        return lambda: jax.block_until_ready(loop(inputs.q, operands))

    return lambda: jax.block_until_ready(call(inputs.q, 0, operands)), chain


def _torch_runner(name: str, inputs: Inputs):
    """Likewise for PyTorch, whose calls are put into a CUDA graph so that they follow at once."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import bias, flex_attention  # pyright: ignore[reportMissingImports]

    if not torch.cuda.is_available():
        raise Refused(f"PyTorch {torch.__version__} sees no CUDA device")
    queries, context = inputs.case.q_lens[0], inputs.case.kv_lens[0]

    def to_torch(array):
        return torch.from_dlpack(array).transpose(1, 2).contiguous()

    layers = [[to_torch(x) for x in layer] for layer in jax.block_until_ready(inputs.dense())]
    q = to_torch(inputs.q.reshape(layers[0][0].shape[0], -1, *inputs.q.shape[1:]))
    spec: dict[str, Any] = {"enable_gqa": True}
    if name == "torch_sdpa":
        attend = torch.nn.functional.scaled_dot_product_attention
        if queries > 1:
            spec["attn_mask"] = bias.causal_lower_right(queries, context)
    else:
        attend, seen = torch.compile(flex_attention.flex_attention), context - queries
        if queries > 1:
            rule = (lambda batch, head, query, key: query + seen >= key), None, None
            spec["block_mask"] = flex_attention.create_block_mask(*rule, queries, context)

    @torch.no_grad()
    def in_a_row(layers):
        out = q
        for k, v in layers:
            out = attend(out, k, v, **spec)
        return out

    def chain(trips):
        in_a_row(layers)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            in_a_row(layers)
        return lambda: ([graph.replay() for _ in range(trips)], torch.cuda.synchronize())

    def once():
        out = in_a_row(layers[:1]).transpose(1, 2).reshape(inputs.q.shape).contiguous()
        torch.cuda.synchronize()
        return jnp.from_dlpack(out)

    return once, chain


def runner(name: str, inputs: Inputs):
    """What measures a contender of `OWN` or `PEERS`: see `_jax_runner`.

    Raises:
      Refused: if it does not do this, or not here.
      Exception: whatever a contender raises.
    """
    case = inputs.case
    if name not in OWN and jax.default_backend() != "gpu":
        raise Refused(f"runs on GPUs, not on {jax.default_backend()!r}")
    if name not in OWN and case.kv_dtype != case.dtype:
        raise Refused(f"takes no pages of {case.kv_dtype} for queries of {case.dtype}")
    return (_torch_runner if name.startswith("torch") else _jax_runner)(name, inputs)
