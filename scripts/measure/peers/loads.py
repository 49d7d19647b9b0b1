# SPDX-License-Identifier: Apache-2.0
"""What peers are given to do, round by round."""

import dataclasses

import numpy as np

from jpaged.simulation.lengths import Lengths
from jpaged.simulation.workload import make_workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Requests whose lengths are the same in every round, of tokens that are new in each.

    Prompts that come again would be found in caches of prefixes, and not be computed.

    Attributes:
      name: that reports have.
      rows: sequences at once, at most.
      prompt_lens: tokens of each request's prompt.
      output_lens: tokens to generate for each.
    """

    name: str
    rows: int
    prompt_lens: list[int]
    output_lens: list[int]

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return max(p + o for p, o in zip(self.prompt_lens, self.output_lens, strict=True))

    def prompts(self, rng: np.random.Generator, vocab_size: int) -> list[list[int]]:
        """Draws the prompts of a round."""
        return [rng.integers(vocab_size, size=length).tolist() for length in self.prompt_lens]


def make_load(
    name: str,
    rows: int,
    num_requests: int,
    prompt_lengths: Lengths,
    output_lengths: Lengths,
    *,
    max_model_len: int,
    seed: int,
) -> Load:
    """Draws the lengths of a load.

    Args:
      name: of the load.
      rows: sequences at once, at most.
      num_requests: how many.
      prompt_lengths: distribution of the prompts' lengths.
      output_lengths: distribution of the outputs' lengths.
      max_model_len: longer sequences are cut to it.
      seed: of the lengths.

    Raises:
      ValueError: if not even the shortest fit.
    """
    items = make_workload(
        num_requests, prompt_lengths, output_lengths,
        max_model_len=max_model_len, vocab_size=1, seed=seed,
    ).items  # fmt: skip
    prompt_lens = [len(item.prompt_token_ids) for item in items]
    outputs = [item.num_output_tokens for item in items]
    return Load(name=name, rows=rows, prompt_lens=prompt_lens, output_lens=outputs)
