# SPDX-License-Identifier: Apache-2.0
"""Decode for few query heads a KV head, on Hopper: keys are the rows of both products.

A tile is one token, and the query heads of its group are the columns, padded to a multiple of 8:

    scores^T [block, columns] = keys [block, head_dim] x queries^T [head_dim, columns]
    values^T [head_dim, columns] += values^T [head_dim, block] x weights^T [block, columns]

so that scores and sums take few registers, several thread blocks fit on a multiprocessor, and they
hide each other's waits. The largest score is taken over rows, through all four warps.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.pallas_kernels import versions
from jpaged.pallas_kernels.gpu import work
from jpaged.pallas_kernels.gpu.mosaic_kernel import LOG2_E, MASKED, Warpgroup
from jpaged.pallas_kernels.gpu.mosaic_pages import BLOCK_TOKENS

# Columns of a product are a multiple of this.
_COLUMN_STEP = 8
# More query heads a KV head than this fill enough of the usual kernel's rows.
MAX_GROUP = 16
# The rows of a product are 64, of keys and, transposed, of lanes of values.
_ROW_STEP = 64


def takes(group: int, head_dim: int) -> bool:
    """Whether decode of so many query heads a KV head can have keys as rows."""
    return group <= MAX_GROUP and head_dim % _ROW_STEP == 0


def num_columns(plan: work.AttentionPlan) -> int:
    """Columns of the products: the query heads of a group, and padding."""
    return -(-plan.group // _COLUMN_STEP) * _COLUMN_STEP


def pad_columns(q_rows: jax.Array, plan: work.AttentionPlan) -> jax.Array:
    """[num_kv_heads, tokens * columns, head_dim] of [num_kv_heads, tokens * group, head_dim]."""
    q = q_rows.reshape(plan.num_kv_heads, -1, plan.group, plan.head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, num_columns(plan) - plan.group), (0, 0)))
    return q.reshape(plan.num_kv_heads, -1, plan.head_dim)


class NarrowWarpgroup(Warpgroup):
    """A token's query heads of one KV head, which meet the blocks of a split.

    Of its scratch, by name, differ from what `attend_tile` has: q [1, columns, head_dim], weights
    [1, columns, block], out [columns, head_dim], lse f32[columns, 64], and the barrier q_ready.
    """

    def start(self, q_ref) -> None:
        """See `Warpgroup`; queries are those that `pad_columns` gives."""
        page_ids = self.blocks.find_first()
        columns = num_columns(self.plan)
        first = self.first_row // self.plan.group * columns
        plgpu.copy_gmem_to_smem(
            q_ref.at[self.blocks.head, pl.ds(first, columns)],
            self.scratch["q"].at[0],
            self.scratch["q_ready"],
        )
        self.blocks.start(page_ids)

    def attend(self) -> tuple[jax.Array, ...]:
        """The sums over all blocks.

        Largest score of each column, f32[columns], weights of keys that have the same place in
        their blocks, f32[block, columns], and weighted sums of values, f32[head_dim, columns].
        """
        blocks, layout = self.blocks, plgpu.Layout.WGMMA
        columns = num_columns(self.plan)

        def full(shape, value, layout):
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        carry = (
            blocks.find(blocks.first + blocks.num_stages - 1),
            full((columns,), MASKED, layout.reduce(0)),
            full((BLOCK_TOKENS, columns), 0, layout),
            full((self.plan.head_dim, columns), 0, layout),
        )
        plgpu.barrier_wait(self.scratch["q_ready"])
        _, *sums = jax.lax.fori_loop(blocks.first, blocks.end, self._attend_columns, carry)
        return tuple(sums)

    def _attend_columns(self, block, carry):
        """Adds a block to the sums."""
        page_ids, peak, total, acc = carry
        blocks, scratch = self.blocks, self.scratch
        stage = blocks.stage(block)
        blocks.fetch_ahead(block, page_ids)
        # For the next block; they come while this one is multiplied.
        page_ids = blocks.find(block + blocks.num_stages)
        plgpu.barrier_wait(scratch["kv_ready"].at[stage])
        keys, values = self._operands(block, stage)
        queries, weights_ref = (scratch[name].at[0].transpose((1, 0)) for name in ("q", "weights"))
        scores = self._scaled(self.cores.multiply(keys, queries, "", scratch))
        key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
        seen = self.variant.sees(self.lowest_query, key + block * BLOCK_TOKENS)
        scores = jnp.where(seen, scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(axis=0))
        shrink = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(scores - _over_rows(new_peak, scores.shape))
        total = total * _over_rows(shrink, total.shape) + weights
        weights_ref[...] = plgpu.layout_cast(
            weights.astype(self.plan.dtype), plgpu.Layout.WGMMA_TRANSPOSED
        )
        plgpu.commit_smem()
        added = self.cores.multiply(values.transpose((1, 0)), weights_ref, "", scratch)
        acc = acc * _over_rows(shrink, acc.shape) + added
        plgpu.barrier_arrive(scratch["kv_done"].at[stage])
        return page_ids, new_peak, total, acc

    def store(self, out_ref, split, peak, total, acc) -> None:
        """See `Warpgroup`."""
        plan, scratch = self.plan, self.scratch
        total = total.sum(axis=0)
        results = acc * _over_rows(self.scale_ref[1] / total, acc.shape)
        home_ref = out_ref.at[split, self.blocks.head]
        _store_transposed(scratch["out"], results.astype(plan.out_type.dtype))
        if plan.gives_lse:
            peak, total = (_over_rows(x, (BLOCK_TOKENS, *x.shape)) for x in (peak, total))
            _store_transposed(scratch["lse"], peak / LOG2_E + jnp.log(total))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            scratch["out"].at[pl.ds(0, plan.group)],
            home_ref.at[pl.ds(self.first_row, plan.group), pl.ds(0, plan.head_dim)],
        )
        if plan.gives_lse:
            lanes = pl.ds(plan.head_dim, work.LSE_LANES)
            for row in range(plan.group):
                plgpu.copy_smem_to_gmem(
                    scratch["lse"].at[row, pl.ds(0, work.LSE_LANES)],
                    home_ref.at[self.first_row + row, lanes],
                )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store_transposed(ref, numbers) -> None:
    """Stores [n, m] to shared memory [m, n]."""
    numbers = plgpu.layout_cast(numbers, plgpu.Layout.WGMMA_TRANSPOSED)
    versions.mosaic_store(ref.transpose((1, 0)), numbers)


def _over_rows(x, shape):
    return jax.lax.broadcast_in_dim(x, shape, (1,))
