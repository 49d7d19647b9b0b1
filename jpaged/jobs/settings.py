# SPDX-License-Identifier: Apache-2.0
"""What `jpaged batch` and all that answer as it does set where nobody said anything."""

import dataclasses
from collections.abc import Collection
from typing import Any

from jpaged.defaults import Defaults
from jpaged.host.config import EngineConfig
from jpaged.host.params import SamplingParams

# With one shape for every step, this many tokens a sequence that runs: enough for prompts to come
# in while others decode, and little to compute in vain.
_TOKENS_PER_SEQ = 4


def for_jobs(config: EngineConfig, given: Collection[str]) -> EngineConfig:
    """An engine's settings for a job: with one shape for every step, unless they say otherwise.

    Args:
      config: what was asked for.
      given: names of the fields that somebody set, which stay as they are.
    """
    changes: dict[str, Any] = {}
    if "deterministic" not in given:
        changes["deterministic"] = True
    deterministic = changes.get("deterministic", config.deterministic)
    if deterministic and "max_num_batched_tokens" not in given:
        changes["max_num_batched_tokens"] = max(_TOKENS_PER_SEQ * config.max_num_seqs, 64)
    return dataclasses.replace(config, **changes)


def with_fallbacks(params: SamplingParams, defaults: Defaults) -> SamplingParams:
    """Where neither a prompt nor the model say: answers that are neither dull nor endless."""
    values: dict[str, Any] = {}
    own = defaults.params
    if params.max_tokens is None and own.max_tokens is None and defaults.max_length is None:
        values["max_tokens"] = max(128, params.min_tokens or own.min_tokens or 0)
    sampled = params.beam_width is None
    if sampled and params.temperature is None and own.temperature is None:
        values["temperature"] = 0.7
    return dataclasses.replace(params, **values)
