# SPDX-License-Identifier: Apache-2.0
"""Fields of JSON objects that people write: a value from text, and sampling parameters from it."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

from jpaged.host.checks import shown
from jpaged.host.params import SamplingParams

PARAMETERS = tuple(field.name for field in dataclasses.fields(SamplingParams))


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
    if unknown := [name for name in own if name not in PARAMETERS]:
        raise ValueError(
            f"unknown field {shown(unknown[0])}; there are {', '.join((*others, *PARAMETERS))}"
        )
    return dataclasses.replace(params, **own) if own else params


def checked_prompt(prompt: Any) -> str | list[int]:
    """A prompt as JSON has it. Raises: ValueError, if it is neither text nor token ids."""
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not prompt or not (isinstance(prompt, str) or is_ids):
        raise ValueError(f"prompt={shown(prompt)} must be text or token ids, not empty")
    return prompt


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
