# SPDX-License-Identifier: Apache-2.0
"""Requests to measure with."""

import dataclasses
import math
from typing import Any

import numpy as np

from jpaged.simulation.lengths import Lengths


@dataclasses.dataclass(frozen=True)
class Item:
    """One request of a workload.

    Attributes:
      prompt_token_ids: the prompt.
      num_output_tokens: how many to generate, whatever they are.
      num_samples: how often.
      arrival_s: when it comes, in seconds.
    """

    prompt_token_ids: list[int]
    num_output_tokens: int
    num_samples: int = 1
    arrival_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests to run.

    Attributes:
      items: the requests, in order of arrival.
      num_cut: how many of them were drawn longer than max_model_len and cut to it.
    """

    items: list[Item]
    num_cut: int

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(item.prompt_token_ids) for item in self.items)

    @property
    def num_output_tokens(self) -> int:
        """Tokens to generate in all."""
        return sum(item.num_output_tokens for item in self.items)

    def describe(self) -> dict[str, Any]:
        """`num_requests`, `prompt_mean`, `output_mean` (tokens of one) and `num_cut`."""
        count = len(self.items)
        return {
            "num_requests": count,
            "prompt_mean": self.num_prompt_tokens / count,
            "output_mean": self.num_output_tokens / count,
            "num_cut": self.num_cut,
        }


def make_workload(
    num_requests: int,
    prompt_lengths: Lengths,
    output_lengths: Lengths,
    *,
    max_model_len: int,
    vocab_size: int,
    seed: int,
    num_samples: int = 1,
    rate: float = math.inf,
) -> Workload:
    """Draws requests; equal arguments give equal requests.

    Args:
      num_requests: how many.
      prompt_lengths: distribution of the prompts' lengths.
      output_lengths: distribution of the outputs' lengths.
      max_model_len: a prompt is cut to leave room for one token, then its output to what is left.
      vocab_size: token ids are below it.
      seed: of the lengths, the token ids and the arrivals.
      num_samples: of each request.
      rate: requests a second, which arrive independently (Poisson); infinite for all at once.

    Returns:
      The workload.

    Raises:
      ValueError: if not even the shortest lengths fit max_model_len.
    """
    shortest = prompt_lengths.least + output_lengths.least
    if shortest > max_model_len:
        raise ValueError(
            f"prompts and outputs have {shortest} tokens at least, more than max_model_len="
            f"{max_model_len}; shorten them or raise max_model_len"
        )
    # Streams of their own, so that one distribution does not change what another draws.
    prompt_rng, output_rng, token_rng, time_rng = np.random.default_rng(seed).spawn(4)
    drawn_prompts = prompt_lengths.draw(prompt_rng, num_requests)
    drawn_outputs = output_lengths.draw(output_rng, num_requests)
    prompts = np.minimum(drawn_prompts, max_model_len - 1)
    outputs = np.minimum(drawn_outputs, max_model_len - prompts)
    arrivals = time_rng.exponential(1 / rate, num_requests).cumsum()
    items = [
        Item(token_rng.integers(vocab_size, size=prompt).tolist(), output, num_samples, arrival_s)
        for prompt, output, arrival_s in zip(
            prompts.tolist(), outputs.tolist(), arrivals.tolist(), strict=True
        )
    ]
    num_cut = int(((prompts < drawn_prompts) | (outputs < drawn_outputs)).sum())
    return Workload(items, num_cut)
