# SPDX-License-Identifier: Apache-2.0
"""The sampling parameters that a model asks for itself, in its generation_config.json."""

import typing

from jpaged.host.checks import instance_of
from jpaged.host.params import SamplingParams
from jpaged.models.generation_config import GenerationConfig


class Defaults(typing.NamedTuple):
    """What a model asks for itself.

    Attributes:
      params: what stands for parameters that are None; None in them is neutral.
      max_length: most tokens of prompt and answer together, where no max_tokens is given by request
        or model; None has no limit.
    """

    params: SamplingParams = SamplingParams()
    max_length: int | None = None


def model_defaults(config: GenerationConfig | None, vocab_size: int) -> Defaults:
    """What stands for sampling parameters that are None; see `SamplingParams.resolve`.

    A file that does not say do_sample is taken as if it did, as other engines do: what it says of
    temperature and filters was meant. transformers is greedy then, and keeps the 50 likeliest
    tokens where a file that samples has no top_k; here no field means no filter.

    Args:
      config: the model's; None says nothing.
      vocab_size: tokens beyond it cannot be chosen anyway, and are left out.

    Returns:
      The parameters that the model sets, the others None, and its max_length.

    Raises:
      ValueError: if a value is none that the parameter can have.
    """
    if config is None:
        config = GenerationConfig()
    instance_of("generation_config", config, GenerationConfig)
    least, most = config.min_new_tokens, config.max_new_tokens
    if least is not None and most is not None:
        least = min(least, most)  # the length ends an answer in any case
    try:
        params = SamplingParams(
            max_tokens=most,
            temperature=0.0 if config.do_sample is False else config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            min_tokens=least,
            suppress_tokens=tuple(t for t in config.suppress_tokens if 0 <= t < vocab_size) or None,
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
            renormalize_logits=config.renormalize_logits,
        )
    except ValueError as e:
        raise ValueError(
            f"generation_config.json: {e}; EngineConfig(generation_config='ignore'), or "
            "--generation_config=ignore, leaves the file's settings aside"
        ) from e
    return Defaults(params, config.max_length if most is None else None)
