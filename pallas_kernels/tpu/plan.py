# SPDX-License-Identifier: Apache-2.0
"""How a call is cut into tiles, and the on-chip memory that takes: known before compiling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.pallas_kernels import tuning
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.tpu.chip import Chip, target_chip

LANES = 128
SUBLANES = 8
# A page is attended to at once: longer ones would take the vector memory of many scores.
MAX_PAGE_SIZE = 256
# Entries of the page table in scalar memory at once: two parts, each double-buffered.
_MAX_TABLE_PART = 2048
# What the compiler takes for itself beside what is planned: spilled registers and the like.
_VMEM_RESERVE_BYTES = 3 * 2**20
_SMEM_RESERVE_BYTES = 2**17


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """The tiles of one attention kernel.

    Attributes:
      num_q_heads, num_kv_heads, head_dim, page_size, kv_dim: as in `paged_attention`.
      dtype: of the queries; what the matrix unit multiplies.
      kv_dtype: of the pool.
      q_tile: queries of one sequence that are computed together; a power of two.
      group_pages: pages that are fetched and attended to together; a power of two.
      table_part: entries of the page table in scalar memory at once; a multiple of `group_pages`.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    kv_dim: int
    dtype: np.dtype
    kv_dtype: np.dtype
    q_tile: int
    group_pages: int
    table_part: int

    @property
    def group_tokens(self) -> int:
        """Tokens of a group of pages."""
        return self.group_pages * self.page_size

    @property
    def head_queries(self) -> int:
        """Rows of a tile that meet one KV head: its query heads times `q_tile`."""
        return self.num_q_heads // self.num_kv_heads * self.q_tile

    @property
    def score_rows(self) -> int:
        """`head_queries`, padded to whole vector registers of float32."""
        return round_up(self.head_queries, SUBLANES)

    @property
    def block_rows(self) -> int:
        """`head_queries`, padded to whole vector registers of `dtype`."""
        return round_up(self.head_queries, SUBLANES * 4 // self.dtype.itemsize)

    @property
    def softmax_heads(self) -> int:
        """KV heads whose scores go through one softmax: as many as fill the vector registers."""
        return min(self.num_kv_heads, max(1, 64 // self.score_rows))

    # Where lanes do not split at a register, queries are padded with zeros over the lanes that
    # follow the key, and the lanes of the result that belong to the key are dropped.

    @property
    def key_lanes(self) -> int:
        """Lanes of a cell that are multiplied by queries, `[0, key_lanes)`."""
        return round_up(self.head_dim, LANES)

    @property
    def value_lanes(self) -> tuple[int, int]:
        """Lanes `[start, end)` of a cell that are multiplied by weights."""
        return self.head_dim // LANES * LANES, round_up(2 * self.head_dim, LANES)

    @property
    def acc_lanes(self) -> int:
        """How many lanes `value_lanes` are."""
        start, end = self.value_lanes
        return end - start

    @property
    def vmem_bytes(self) -> int:
        """Vector memory: two blocks each of queries, results and pages, and the running sums."""
        heads, rows = self.num_kv_heads, self.score_rows
        blocks = heads * self.block_rows * (self.key_lanes + round_up(self.head_dim, LANES))
        page = heads * self.page_size * self.kv_dim
        sums = heads * rows * (2 * LANES + self.acc_lanes)
        scores = self.softmax_heads * rows * round_up(self.group_tokens, LANES)
        return (
            2 * blocks * self.dtype.itemsize
            + 2 * self.group_pages * page * self.kv_dtype.itemsize
            + 4 * (sums + scores)
        )

    def max_tiles(self, num_tokens: int, num_rows: int) -> int:
        """Tiles at most: one a block of the token axis, and one more a row of several queries."""
        blocks = -(-num_tokens // self.q_tile)
        return blocks if self.q_tile == 1 else blocks + min(num_rows, num_tokens // 2)

    def num_parts(self, pages_per_seq: int) -> int:
        """Parts of a row of the page table: as many spans has a tile at most."""
        return -(-pages_per_seq // self.table_part)

    def smem_bytes(self, num_spans: int) -> int:
        """Scalar memory: the spans' fields and four parts of the page table."""
        return 4 * (SUBLANES * round_up(num_spans + 1, LANES) + 4 * self.table_part)


def plan_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    rows: Rows,
    *,
    decode: bool,
    chip: Chip | None = None,
    tiles: tuning.TpuTiles | None = None,
) -> AttentionPlan:
    """Chooses the tiles of one call: those of `tuning`, or the largest below that fit the chip.

    Args:
      q: as in `paged_attention`; only its shape and dtype matter, as those of the others.
      kv_pages: likewise.
      rows: likewise.
      decode: whether tiles have one query.
      chip: what to fit; by default that which the trace is for.
      tiles: instead of those of `tuning`.

    Returns:
      The plan.

    Raises:
      ValueError: if the chip cannot do this; the message has the rule, or the bytes and the limit.
    """
    chip = chip or target_chip()
    num_q_heads, head_dim = q.shape[1:]
    num_kv_heads, page_size, kv_dim = kv_pages.shape[2:]
    check_pool(kv_pages)
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"backend 'tpu' multiplies bfloat16 and float32, but q has dtype {q.dtype}; convert "
            "it, or pass backend='xla'"
        )
    tiles = tiles or tuning.tpu_tiles(
        chip.name, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    group_pages = min(_power_of_two(max(1, tiles.group_tokens // page_size)), _MAX_TABLE_PART)
    plan = AttentionPlan(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        kv_dim=kv_dim,
        dtype=jnp.dtype(q.dtype),
        kv_dtype=jnp.dtype(kv_pages.dtype),
        q_tile=1 if decode else tiles.q_tile,
        group_pages=group_pages,
        table_part=min(_MAX_TABLE_PART, round_up(rows.pages_per_seq, max(LANES, group_pages))),
    )
    limit = chip.vmem_bytes - _VMEM_RESERVE_BYTES
    while plan.vmem_bytes > limit and plan.q_tile > 1:
        plan = dataclasses.replace(plan, q_tile=plan.q_tile // 2)
    while plan.vmem_bytes > limit and plan.group_pages > 1:
        plan = dataclasses.replace(plan, group_pages=plan.group_pages // 2)
    if plan.vmem_bytes > limit:
        raise ValueError(
            f"attention over pages of {page_size} tokens, {num_kv_heads} KV heads and {kv_dim} "
            f"lanes needs {plan.vmem_bytes} bytes of vector memory, more than the {limit} that a "
            f"{chip.name} has for it; lower page_size, or shard the KV heads over more chips"
        )
    return plan


def check_pool(kv_pages: jax.Array) -> None:
    """Raises ValueError for a pool that the TPU kernels do not take, with the rule."""
    page_size, kv_dim = kv_pages.shape[3:]
    dtypes = (jnp.bfloat16, jnp.float32, jnp.int8, jnp.float8_e4m3fn)
    if kv_pages.dtype not in dtypes:
        names = ", ".join(jnp.dtype(dtype).name for dtype in dtypes)
        raise ValueError(f"backend 'tpu' takes pages of {names}, not of {kv_pages.dtype}")
    if page_size % SUBLANES or page_size > MAX_PAGE_SIZE:
        raise ValueError(
            f"backend 'tpu' needs a page_size that is a multiple of {SUBLANES} and at most "
            f"{MAX_PAGE_SIZE}, not {page_size}"
        )
    if kv_dim % LANES:
        raise ValueError(
            f"backend 'tpu' needs cells of a multiple of {LANES} lanes, not {kv_dim}; "
            "kv_pages_shape(..., backend='tpu') gives them"
        )


def check_scalars(name: str, num_bytes: int, num_rows: int, chip: Chip | None = None) -> None:
    """Raises ValueError if a kernel's list of work does not fit scalar memory."""
    chip = chip or target_chip()
    limit = chip.smem_bytes - _SMEM_RESERVE_BYTES
    if num_bytes > limit:
        raise ValueError(
            f"{name} of {num_rows} rows needs {num_bytes} bytes of scalar memory, more than the "
            f"{limit} that a {chip.name} has for it; lower max_num_seqs, max_model_len or "
            "max_num_batched_tokens, or raise page_size"
        )


def check_vmem(name: str, num_bytes: int, chip: Chip | None = None) -> None:
    """Raises ValueError if what a kernel works on does not fit vector memory."""
    chip = chip or target_chip()
    limit = chip.vmem_bytes - _VMEM_RESERVE_BYTES
    if num_bytes > limit:
        raise ValueError(
            f"{name} needs {num_bytes} bytes of vector memory, more than the {limit} that a "
            f"{chip.name} has for it; shard the KV heads over more chips"
        )


def vmem_limit(vmem_bytes: int) -> int:
    """What to ask the compiler for, so that it neither refuses a plan nor hoards for it."""
    return max(16 * 2**20, vmem_bytes + _VMEM_RESERVE_BYTES)


def _power_of_two(number: int) -> int:
    """The largest power of two that is at most `number`."""
    return 1 << (number.bit_length() - 1)
