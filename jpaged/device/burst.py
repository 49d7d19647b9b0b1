# SPDX-License-Identifier: Apache-2.0
"""Several decode steps as one program: each token that is drawn is the next one's input."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.device import sampling
from jpaged.host.batch import SamplingRows
from jpaged.host.burst import BurstRows
from jpaged.host.config import EngineConfig
from jpaged.models.inputs import PagedInputs

# Where a step is shorter than what it takes to start one.
_DEFAULT_STEPS = 8


def default_decode_steps(config: EngineConfig) -> int:
    """Most decode steps of a dispatch: what `config.decode_steps` says, or what the platform asks.

    One where a dispatch costs little beside a step (CPU), and where each step is to be the same
    program (deterministic).
    """
    if config.decode_steps is not None:
        return config.decode_steps
    one = config.deterministic or jax.default_backend() == "cpu"
    return 1 if one else _DEFAULT_STEPS


def burst_function(apply: Callable[..., Any], max_steps: int, num_slots: int) -> Callable[..., Any]:
    """A burst as it is compiled: one program for any number of steps.

    A row that has taken its steps, or has drawn a token that ends it, computes its last token again
    until all are done: the same keys and values, where they are already. Nothing is drawn for it.

    Args:
      apply: the model as a pure function.
      max_steps: most steps of a burst.
      num_slots: to how many tokens the newest are padded.

    Returns:
      A function of parameters, pages, inputs, previous slots and tokens as in
      `runner.step_function`, sampling rows and burst rows. It returns pages, i32[num_slots] tokens
      of the last step's samples, and tokens and log-probabilities as in `step_result.BurstResult`:
      NaN beside what was not computed, as all rows had ended.
    """

    def burst(
        params,
        kv_pages,
        inputs: PagedInputs,
        previous_slots,
        previous_tokens,
        draws: SamplingRows,
        rows: BurstRows,
    ):
        num_rows = rows.num_steps.shape[0]  # each has one token, the first ones of their axis

        def ends(tokens):
            return (tokens[:, None] == rows.stop_token_ids).any(axis=-1)

        def step(state):
            index, going, advance, token, newest, tokens, logprobs, kv_pages = state
            logits, kv_pages = apply(params, _advanced(inputs, token, advance), kv_pages)
            # As in a step by itself, where tokens are drawn by another program: the same bits.
            logits = jax.lax.optimization_barrier(logits)
            drawn, logprob = sampling.sample(
                logits, draws._replace(positions=draws.positions + advance)
            )
            logprob = sampling.mark_not_finite(logits, logprob)
            newest = jnp.where(going, drawn, newest)
            going = going & (index + 1 < rows.num_steps) & ~ends(drawn) & jnp.isfinite(logprob)
            token, advance = jnp.where(going, drawn, token), advance + going.astype(jnp.int32)
            tokens, logprobs = tokens.at[index].set(drawn), logprobs.at[index].set(logprob)
            return index + 1, going, advance, token, newest, tokens, logprobs, kv_pages

        slots = previous_slots[:num_rows]
        # Slot -1 indexes the last sample, and is then not used.
        first = jnp.where(slots < 0, inputs.token_ids[:num_rows], previous_tokens[slots])
        # What has ended meanwhile was planned before the host could know.
        going = (rows.num_steps > 0) & ~((slots >= 0) & ends(first))
        tokens = jnp.zeros((max_steps, num_rows), jnp.int32)
        logprobs = jnp.full((max_steps, num_rows), jnp.nan, jnp.float32)
        state = jnp.int32(0), going, jnp.zeros(num_rows, jnp.int32), first, first
        # Not `going` alone, which takes no kernel if there is one row: for that the loop of a CUDA
        # graph does not wait, and a burst may find that the one before has ended.
        state = jax.lax.while_loop(
            lambda state: (state[1] & (state[0] < max_steps)).any(),
            step,
            (*state, tokens, logprobs, kv_pages),
        )
        *_, newest, tokens, logprobs, kv_pages = state
        newest = jnp.pad(newest[rows.slots], (0, num_slots - num_rows))
        return kv_pages, newest, tokens, logprobs

    return burst


def _advanced(inputs: PagedInputs, token: jax.Array, advance: jax.Array) -> PagedInputs:
    """The inputs of a later step: i32[num_rows] tokens, so many positions further on."""
    num_rows = token.shape[0]
    return dataclasses.replace(
        inputs,
        token_ids=jnp.asarray(inputs.token_ids).at[:num_rows].set(token),
        positions=jnp.asarray(inputs.positions).at[:num_rows].add(advance),
        rows=dataclasses.replace(inputs.rows, kv_lens=inputs.rows.kv_lens + advance),
    )
