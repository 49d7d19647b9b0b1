# SPDX-License-Identifier: Apache-2.0
"""What there is to compile ahead of need, for shapes of steps and parameters of requests."""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np

from jpaged.host.batch import BeamBatch, ShapeBuckets, StepShape
from jpaged.host.checks import Rule, at_least, checked, instance_of, shown
from jpaged.host.growth import growth_of
from jpaged.host.logits_processors import LogitsProcessors
from jpaged.host.params import LogprobsMode, SamplingParams


def idle_beams(params: SamplingParams, eos_token_ids: Collection[int]) -> BeamBatch:
    """Beams of a search that has not begun, to compile with: running them changes nothing."""
    chooser = growth_of(params, [0], 1, eos_token_ids).chooser
    assert chooser is not None, "not a search"
    selection = chooser.selection()
    slots = np.zeros(selection.width, np.int32)
    return BeamBatch(slots, slots.astype(np.float32) - np.inf, selection.num_candidates)


def warm_up_plan(
    buckets: ShapeBuckets,
    vocab_size: int,
    eos_token_ids: Collection[int],
    defaults: SamplingParams,
    max_model_len: int,
    shapes: Collection[StepShape] | None,
    num_logprobs: int,
    params: Collection[SamplingParams],
) -> dict[str, Any]:
    """What there is to compile ahead of need; see `Engine.warm_up`.

    Args:
      buckets: the shapes that steps have.
      vocab_size: the model's.
      eos_token_ids: likewise.
      defaults: the model's own sampling parameters.
      max_model_len: most tokens of a request.
      shapes: as in `Engine.warm_up`, like the rest.
      num_logprobs: likewise.
      params: likewise.

    Returns:
      Arguments of `ModelRunner.warm_up`.

    Raises:
      ValueError: if one of the last three cannot be.
    """
    most = Rule(f"at most {vocab_size}, the vocabulary", vocab_size.__ge__)
    num_logprobs = checked("num_logprobs", num_logprobs, int, (*at_least(0), most))
    shapes = buckets.all_shapes() if shapes is None else shapes
    possible = {*buckets.all_shapes(), *dataclasses.replace(buckets, given=()).all_shapes()}
    for name, value in (("shapes", shapes), ("params", params)):
        if isinstance(value, str) or not isinstance(value, Collection):
            raise ValueError(f"{name}={shown(value)} must be a list")
    for shape in shapes:
        if instance_of("shapes", shape, StepShape) not in possible:
            raise ValueError(f"shapes={shape} must be shapes that steps of this engine have")
    resolved = [
        instance_of("params", own, SamplingParams).resolve(defaults, max_model_len)
        for own in params
    ]
    num_logprobs = max(num_logprobs, *(own.prompt_logprobs or 0 for own in resolved), 0)
    widths: set[int] = set()
    for own in (defaults.resolve(room=max_model_len), *resolved):
        if processors := LogitsProcessors.of(own, (), vocab_size):
            widths.update(processors.widths(min(own.max_tokens or 0, max_model_len)))
    return {
        "shapes": list(shapes),
        "bursts": [own for own in shapes if buckets.single or own.num_tokens == own.num_rows],
        "num_logprobs": num_logprobs,
        "beams": [idle_beams(own, eos_token_ids) for own in resolved if own.beam_width is not None],
        "processors": sorted(widths),
        "scores": any(own.prompt_logprobs is not None for own in resolved),
        "modes": any(own.logprobs_mode != LogprobsMode.RAW for own in resolved),
    }
