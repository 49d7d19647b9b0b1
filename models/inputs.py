# SPDX-License-Identifier: Apache-2.0
"""What one step of a decoder consumes."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedInputs:
    """One step's tokens and where their keys and values live; an immutable pytree.

    Rows past `num_seqs`, tokens past `cu_q_lens[num_seqs]` and table entries past a sequence's last
    page are padding: they may hold anything that is safe to index with and never reach a live row.

    Attributes:
      token_ids: i32[num_tokens], the sequences' new tokens back to back.
      positions: i32[num_tokens], position of each token in its sequence.
      page_table: i32[max_num_seqs, pages_per_seq], physical page ids.
      kv_lens: i32[max_num_seqs], tokens of each sequence, this step's included.
      cu_q_lens: i32[max_num_seqs + 1], where each sequence's tokens start in `token_ids`.
      num_seqs: i32[1], live rows.
      logits_indices: i32[num_samples], the tokens whose next-token logits are wanted.
    """

    token_ids: jax.Array
    positions: jax.Array
    page_table: jax.Array
    kv_lens: jax.Array
    cu_q_lens: jax.Array
    num_seqs: jax.Array
    logits_indices: jax.Array
