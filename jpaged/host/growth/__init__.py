# SPDX-License-Identifier: Apache-2.0
"""How requests grow: `base` says what of it others must know, the other modules are its kinds."""

from collections.abc import Collection

from jpaged.host.growth.base import Growth
from jpaged.host.growth.beam import BeamSearch
from jpaged.host.growth.sampling import Sampling
from jpaged.host.params import SamplingParams


def growth_of(
    params: SamplingParams,
    prompt_token_ids: list[int],
    max_new_tokens: int,
    eos_token_ids: Collection[int],
) -> Growth:
    """The growth that parameters ask for.

    Args:
      params: of the request, resolved.
      prompt_token_ids: its prompt.
      max_new_tokens: tokens after which it ends.
      eos_token_ids: the model's own; ignored where the parameters say so.
    """
    if params.beam_width is None:
        return Sampling(params.num_samples)
    return BeamSearch(params, prompt_token_ids, max_new_tokens, eos_token_ids)
