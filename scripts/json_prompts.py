# SPDX-License-Identifier: Apache-2.0
"""Prompts as JSON objects, each with sampling parameters of its own."""

from collections.abc import Sequence
from typing import Any

from jpaged.host.checks import shown
from jpaged.host.params import SamplingParams
from jpaged.jobs.fields import checked_prompt, own_params, parse_json


def read_json_prompts(
    lines: Sequence[str], path: str, params: SamplingParams
) -> list[tuple[str | list[int], SamplingParams]]:
    """Returns the prompts of a file with a JSON object a line, each with its parameters.

    An object has a "prompt", text or token ids, and any parameters by the names of
    `SamplingParams`; null is the default of one, whatever the flags say.

    Args:
      lines: of the file.
      path: of the file, for messages.
      params: what counts where a line has nothing else.

    Raises:
      ValueError: if a line is none; one line, which names that line and the field.
    """
    found: list[tuple[str | list[int], SamplingParams]] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_prompt_of(parse_json(line, "it"), params))
        except ValueError as e:
            raise ValueError(f"{path}: line {number}: {e}") from e
    return found


def _prompt_of(value: Any, params: SamplingParams) -> tuple[str | list[int], SamplingParams]:
    if isinstance(value, dict) and "messages" in value and "prompt" not in value:
        raise ValueError("it is a conversation: give --chat to have it answered")
    if not isinstance(value, dict) or "prompt" not in value:
        raise ValueError(
            f'{shown(value)} must be an object with a prompt, such as {{"prompt": "Hello"}}'
        )
    return checked_prompt(value["prompt"]), own_params(value, ("prompt",), params)
