# SPDX-License-Identifier: Apache-2.0
"""The rows of one step, as the one value that every kernel takes."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Which sequences a step has, where their pages are, and which tokens are whose.

    Rows past `num_seqs`, tokens past `cu_q_lens[num_seqs]` and table entries past a sequence's last
    page are padding: what they hold never reaches a live row.

    Attributes:
      page_table: i32[max_num_seqs, pages_per_seq], physical page ids. A model whose layers are in
        groups with pages of their own has a table for each, i32[num_groups, max_num_seqs,
        pages_per_seq]; kernels take those of one (`of_group`).
      kv_lens: i32[max_num_seqs], tokens visible to each sequence, this step's included.
      cu_q_lens: i32[max_num_seqs + 1], where each row's queries start on the token axis.
      num_seqs: i32[1], live rows.
    """

    page_table: jax.Array
    kv_lens: jax.Array
    cu_q_lens: jax.Array
    num_seqs: jax.Array

    @property
    def max_num_seqs(self) -> int:
        """Rows, padding included."""
        return self.page_table.shape[-2]

    @property
    def pages_per_seq(self) -> int:
        """Pages that a sequence can have."""
        return self.page_table.shape[-1]

    @property
    def has_groups(self) -> bool:
        """Whether there is a page table for each group of layers."""
        return self.page_table.ndim == 3

    def of_group(self, group: int | jax.Array) -> "Rows":
        """The rows with the page table of one group, which may be traced."""
        return dataclasses.replace(self, page_table=self.page_table[group])

    def is_decode(self, num_tokens: int) -> bool:
        """Whether a step of so many tokens, padding included, is taken for decode."""
        return num_tokens <= self.max_num_seqs

    def q_lens(self) -> jax.Array:
        """i32[max_num_seqs]: queries of each row; 0 for padding."""
        q_lens = self.cu_q_lens[1:] - self.cu_q_lens[:-1]
        return jnp.where(jnp.arange(self.max_num_seqs) < self.num_seqs[0], q_lens, 0)
