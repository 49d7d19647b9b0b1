# SPDX-License-Identifier: Apache-2.0
"""How blocks of keys and values come from the page pool to a thread block of Mosaic GPU's."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.pallas_kernels.gpu import work

# Tokens of a block of keys: the rows of a register tile, which dead values are cleared in.
BLOCK_TOKENS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyBlocks:
    """The blocks of one split and KV head: they come by TMA, page by page, some of them ahead.

    Blocks take turns in the stages of shared memory. One warpgroup starts all copies.

    Attributes:
      plan: sizes.
      page_table_ref: i32[max_num_seqs, pages_per_seq].
      cells_ref: [num_layers * num_pages * num_kv_heads * page_size, kv_dim].
      scratch: that of `mosaic_kernel.attend_tile`.
      head: i32[], which KV head.
      seq: i32[], row of the page table.
      pages: i32[] each, first and last page of the sequence that any query sees.
      layer_page: i32[], the layer's first page among those of all layers.
      first: i32[], the split's first block.
      end: i32[], one past its last.
    """

    plan: work.AttentionPlan
    page_table_ref: Any
    cells_ref: Any
    scratch: dict[str, Any]
    head: jax.Array
    seq: jax.Array
    pages: tuple[jax.Array, jax.Array]
    layer_page: jax.Array
    first: jax.Array
    end: jax.Array

    @property
    def num_stages(self) -> int:
        """Blocks that are in shared memory, or on their way there, at once."""
        return self.scratch["kv"].shape[0]

    def stage(self, block: jax.Array) -> jax.Array:
        """The stage that a block takes its turn in."""
        return jax.lax.rem(block - self.first, self.num_stages)

    def find(self, block: jax.Array) -> list[jax.Array]:
        """Ids of the pages that a block lies in; for any block, as others than `pages` give way."""
        tokens = [block * BLOCK_TOKENS + start for start, _ in _runs(self.plan)]
        return [
            self.page_table_ref[self.seq, jnp.clip(token // self.plan.page_size, *self.pages)]
            for token in tokens
        ]

    def find_first(self) -> list[list[jax.Array]]:
        """Ids of the pages of the first blocks, one fewer than there are stages."""
        return [self.find(self.first + i) for i in range(self.num_stages - 1)]

    def start(self, page_ids: list[list[jax.Array]]) -> None:
        """Starts the copies of the first blocks, whose ids `find_first` gave."""
        for i, block_ids in enumerate(page_ids):
            block = self.first + i
            pl.when(block < self.end)(functools.partial(self._fetch, block, block_ids))

    def fetch_ahead(self, block: jax.Array, page_ids: list[jax.Array]) -> None:
        """Refills the stage that the block before had, with pages of known ids."""
        num_stages = self.num_stages
        before = jax.lax.rem(block - self.first - 1 + num_stages, num_stages)

        @pl.when(block > self.first)
        def _():
            plgpu.barrier_wait(self.scratch["kv_done"].at[before])

        ahead = block + num_stages - 1
        pl.when(ahead < self.end)(functools.partial(self._fetch, ahead, page_ids))

    def finish(self) -> None:
        """Waits for the stages' last turns, of which only the last one nobody has waited for."""
        plgpu.barrier_wait(self.scratch["kv_done"].at[self.stage(self.end - 1)])

    def _fetch(self, block: jax.Array, page_ids: list[jax.Array]) -> None:
        """Starts the copies of a block's pages."""
        plan, stage = self.plan, self.stage(block)
        for (start, size), page_id in zip(_runs(plan), page_ids, strict=True):
            page = (self.layer_page + page_id) * plan.num_kv_heads + self.head
            cell = page * plan.page_size
            cell += jax.lax.rem(block * BLOCK_TOKENS + start, plan.page_size)
            plgpu.copy_gmem_to_smem(
                self.cells_ref.at[pl.ds(cell, size), pl.ds(0, 2 * plan.head_dim)],
                self.scratch["kv"].at[stage, pl.ds(start, size)],
                self.scratch["kv_ready"].at[stage],
            )


def block_pages(plan: work.AttentionPlan) -> int:
    """Pages that a block of keys lies in."""
    return max(1, BLOCK_TOKENS // plan.page_size)


def _runs(plan: work.AttentionPlan) -> list[tuple[int, int]]:
    """Start and size of the parts of a block that lie in one page each."""
    size = BLOCK_TOKENS // block_pages(plan)
    return [(start, size) for start in range(0, BLOCK_TOKENS, size)]
