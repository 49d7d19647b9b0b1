# SPDX-License-Identifier: Apache-2.0
"""Prompts as JSON objects, each with sampling parameters of its own."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jpaged.host.checks import shown
from jpaged.host.params import SamplingParams

_PARAMETERS = tuple(field.name for field in dataclasses.fields(SamplingParams))


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


def own_params(
    fields: Mapping[str, Any], others: Collection[str], params: SamplingParams
) -> SamplingParams:
    """Returns the parameters of a prompt.

    Args:
      fields: of its object.
      others: fields that are no parameters, and are left alone.
      params: what counts where the object has nothing else.

    Raises:
      ValueError: if a field is unknown, or has a wrong value.
    """
    own = {name: value for name, value in fields.items() if name not in others}
    if unknown := [name for name in own if name not in _PARAMETERS]:
        raise ValueError(
            f"unknown field {shown(unknown[0])}; there are {', '.join((*others, *_PARAMETERS))}"
        )
    return dataclasses.replace(params, **own) if own else params


def parse_json(text: str, name: str) -> Any:
    """Returns the value that a text is in JSON.

    Args:
      text: of one value.
      name: what it is, for messages.

    Raises:
      ValueError: if it is none, or an object has a field twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"{name} is not valid JSON: it is nested too deeply") from None
    except _FieldTwiceError as e:
        raise ValueError(f"{name} has {e} twice") from None
    except ValueError as e:
        raise ValueError(f"{name} is not valid JSON: {e}: {shown(text)}") from None


class _FieldTwiceError(ValueError):
    """An object has a field twice; the message names it."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _FieldTwiceError(f"the field {shown(twice)}")
    return found


def _prompt_of(value: Any, params: SamplingParams) -> tuple[str | list[int], SamplingParams]:
    if not isinstance(value, dict) or "prompt" not in value:
        raise ValueError(
            f'{shown(value)} must be an object with a prompt, such as {{"prompt": "Hello"}}'
        )
    prompt = value["prompt"]
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not prompt or not (isinstance(prompt, str) or is_ids):
        raise ValueError(f"prompt={shown(prompt)} must be text or token ids, not empty")
    return prompt, own_params(value, ("prompt",), params)
