# SPDX-License-Identifier: Apache-2.0
"""What one step of a decoder consumes."""

import dataclasses

import jax

from jpaged.pallas_kernels.rows import Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedInputs:
    """One step's tokens, and the rows that they belong to; an immutable pytree.

    Attributes:
      token_ids: i32[num_tokens], the rows' new tokens back to back; padding is as in `Rows`.
      positions: i32[num_tokens], position of each token in its sequence.
      rows: the sequences, whose `cu_q_lens` say where the tokens of each start.
      logits_indices: i32[num_samples], the tokens whose next-token logits are wanted.
    """

    token_ids: jax.Array
    positions: jax.Array
    rows: Rows
    logits_indices: jax.Array
