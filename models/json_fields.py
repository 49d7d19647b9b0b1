# SPDX-License-Identifier: Apache-2.0
"""Fields of the JSON files that come with a model: read within bounds, typed, sorted by effect.

The policy for config.json and generation_config.json alike: a field that changes the result is
honoured or refused by name; one that cannot is passed over. null, and an empty value, say nothing
and so never refuse a model.
"""

import dataclasses
import json
import os
import pathlib
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from jpaged.models.paths import is_address

_MAX_JSON_BYTES = 64 * 2**20  # The index of a model of 500,000 tensors.
_INT32_MAX = 2**31 - 1
_FLOAT32_MAX = 3.4028234663852886e38
_MAX_LISTED = 8


class ModelConfigError(ValueError):
    """A model description that this code cannot honour; the message names field and value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldPolicy:
    """What becomes of each field of one kind of file.

    Attributes:
      read: fields whose values are used.
      neutral: fields that change nothing at the values listed (null and empty ones besides), and
        would at any other.
      inert: fields that change nothing, whatever they hold.
      inert_prefixes: likewise for every field whose name starts so.
    """

    read: Collection[str]
    neutral: Mapping[str, tuple]
    inert: Collection[str]
    inert_prefixes: tuple[str, ...] = ()

    def refused(self, fields: Mapping[str, Any]) -> dict[str, str]:
        """The fields with a value that is not computed here, each with what is supported."""
        return {
            field: " or ".join(repr(value) for value in self.neutral[field]) or "null"
            for field, value in fields.items()
            if field in self.neutral and not _is_neutral(value, self.neutral[field])
        }

    def unknown(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that no list has and that say something: not null, false, zero or empty."""
        return {
            field: value
            for field, value in sorted(fields.items())
            if value
            and field not in self.read
            and field not in self.neutral
            and field not in self.inert
            and not field.startswith(self.inert_prefixes)
        }


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: a file in UTF-8, with or without a byte order mark.

    Returns:
      Its fields.

    Raises:
      FileNotFoundError: if there is no such file.
      ModelConfigError: if it is not a file, not JSON, too large or nested too deeply, or if a name
        stands twice in one object with different values.
    """
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ModelConfigError(f"{path} is not a file that can be read")
    try:
        content: Any = path.stat()
        size = content.length if is_address(path) else content.st_size
        if size > _MAX_JSON_BYTES:
            raise ModelConfigError(
                f"{path} has {size} bytes; a model's JSON file has at most {_MAX_JSON_BYTES}"
            )
        text = path.read_bytes().decode("utf-8-sig")
        fields = json.loads(text, object_pairs_hook=_unique)
    except ModelConfigError as e:
        raise ModelConfigError(f"{path}: {e}") from e
    except UnicodeDecodeError as e:
        raise ModelConfigError(f"{path} is not valid JSON: it is not UTF-8 text ({e})") from e
    except RecursionError as e:
        raise ModelConfigError(f"{path} is not valid JSON: it is nested too deeply") from e
    except ValueError as e:  # bad JSON, or an integer of thousands of digits
        raise ModelConfigError(f"{path} is not valid JSON: {e}") from e
    except PermissionError as e:
        raise ModelConfigError(f"{path} cannot be read: {e.strerror}") from e
    if not isinstance(fields, dict):
        raise ModelConfigError(f"{path} must hold a JSON object, not a {type(fields).__name__}")
    return fields


def typed(field: str, value: Any, kind: type) -> Any:
    """The value as a `kind`, or an error: JSON's "32" is not 32, nor its true 1.

    Args:
      field: what the message calls it.
      value: as JSON gave it.
      kind: bool, int (that fits 32 bits), float (finite as a float32), str, list or dict.
    """
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
        raise ModelConfigError(f"{field}={shown(value)} must be of type {kind.__name__}")
    if kind is int and abs(value) > _INT32_MAX:
        raise ModelConfigError(f"{field}={shown(value)} must be at most {_INT32_MAX}: 32 bits")
    if kind is float and not abs(value) <= _FLOAT32_MAX:
        raise ModelConfigError(f"{field}={shown(value)} must be finite and at most {_FLOAT32_MAX}")
    return kind(value)


def shown(value: Any) -> str:
    """A value as messages show it: on one line, and short however long it is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxdict, short.maxlist = 3, 12, _MAX_LISTED
    short.maxstring, short.maxlong, short.maxother = 200, 60, 200
    return short.repr(value)


def listed(fields: Mapping[str, Any]) -> str:
    """Fields and values as messages list them."""
    pairs = [
        f"{field if field.isprintable() and len(field) < 80 else shown(field)}={shown(value)}"
        for field, value in fields.items()
    ]
    more = [f"and {len(pairs) - _MAX_LISTED} more"] if len(pairs) > _MAX_LISTED else []
    return ", ".join(pairs[:_MAX_LISTED] + more)


def _is_neutral(value: Any, neutral: tuple) -> bool:
    if value is None or (isinstance(value, str | list | dict) and not value):
        return True
    # JSON's true is not 1.
    return any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields and fields[name] != value:
            raise ModelConfigError(
                f"{shown(name)} stands there twice, as {shown(fields[name])} and {shown(value)}; "
                "keep one of them"
            )
        fields[name] = value
    return fields
