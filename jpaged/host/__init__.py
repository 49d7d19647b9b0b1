# SPDX-License-Identifier: Apache-2.0
"""The host's side of PagedAttention: pages, sequences and what a step computes; needs no jax."""
