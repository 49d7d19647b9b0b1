# SPDX-License-Identifier: Apache-2.0
"""Reads a layer's `Rope` from config.json: rope_parameters as transformers 5 writes them, or older.

transformers 5 keeps everything in rope_parameters, for some families once a kind of layer; 4 has
rope_theta, rope_scaling and partial_rotary_factor beside each other.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from jpaged.models.families.fields import Fields
from jpaged.models.json_fields import ModelConfigError, listed, shown, typed
from jpaged.models.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)

logger = logging.getLogger(__name__)

_ROPE_FIELDS = ("rope_parameters", "rope_scaling")
# What kinds of rope read, and the plain one does not.
_SCALED_FIELDS = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "high_freq_factor",
        "long_factor",
        "long_mscale",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "short_factor",
        "short_mscale",
        "truncate",
    }
)


def read_rope(
    fields: Fields, head_dim: int, kind: str | None = None, theta_field: str = "rope_theta"
) -> Rope:
    """Reads how layers turn their queries and keys.

    Args:
      fields: the config.json.
      head_dim: of the layers.
      kind: of the layers, where the family keeps parameters of several.
      theta_field: where an older config.json has their base; scaling is only for "rope_theta".

    Raises:
      ModelConfigError: naming the field, if it is missing, contradicts another, or is not
        supported.
    """
    places = []
    for field in _ROPE_FIELDS if theta_field == "rope_theta" else _ROPE_FIELDS[:1]:
        value = fields.raw(field)
        if not value:
            continue
        value = typed(field, value, dict)
        if kind is not None and any(isinstance(v, dict) for v in value.values()):
            value = typed(f"{field}: {kind}", value.get(kind) or {}, dict)
        if value:
            places.append({key: v for key, v in value.items() if v is not None})
    if not places and (usual := fields.default("rope_parameters", {})):
        places.append(dict(usual))
    fields.read |= set(_ROPE_FIELDS)
    original = fields.optional("original_max_position_embeddings", int)
    scaled_kinds = ("llama3", "yarn", "longrope", "su")
    for place in places:
        # Where transformers looks first.
        if original is not None and place.get("rope_type", place.get("type")) in scaled_kinds:
            place.setdefault("original_max_position_embeddings", original)
    longest = fields("max_position_embeddings", int)
    scalings = [_scaling(place, longest) for place in places]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise ModelConfigError(
            f"rope_parameters={shown(places[0])} and rope_scaling={shown(places[1])} contradict "
            "each other; keep one of them"
        )
    scaling = scalings[0] if scalings else None
    own_original = getattr(scaling, "original_max_position", None)
    if original is not None and own_original is not None and original != own_original:
        raise ModelConfigError(
            f"original_max_position_embeddings={original} in config.json and {own_original} in its "
            "rope parameters contradict each other; keep one of them"
        )
    theta = _one(fields, places, theta_field, "rope_theta")
    part = _one(fields, places, "partial_rotary_factor", "partial_rotary_factor")
    part = 1.0 if part is None else part
    if not 0 < part <= 1:
        raise ModelConfigError(f"partial_rotary_factor={part} must be above 0 and at most 1")
    return Rope(
        theta=fields.default(theta_field) if theta is None else theta,
        dim=int(head_dim * part),
        scaling=scaling,
    )


def _one(fields: Fields, places: list[dict[str, Any]], beside: str, inside: str) -> float | None:
    """A number that may stand in several places, and must be the same there."""
    given = [place.get(inside) for place in places] + [fields.raw(beside)]
    values = {typed(inside, value, float) for value in given if value is not None}
    if len(values) > 1:
        raise ModelConfigError(f"{inside} is given as {sorted(values)}; keep one of them")
    return values.pop() if values else None


def _scaling(rope: Mapping[str, Any], longest: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    read = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}

    def number(field: str, of_kind: type = float, default: Any = None) -> Any:
        read.add(field)
        if field not in rope and default is None:
            raise ModelConfigError(
                f"rope_type={kind!r} needs the field {field!r}, which is missing"
            )
        return typed(f"rope_type={kind!r}: {field}", rope.get(field, default), of_kind)

    if kind == "default":
        scaling = None
        if unread := {field: rope[field] for field in sorted(_SCALED_FIELDS & set(rope))}:
            logger.warning("ignored, for rope_type='default' has no use of it: %s", listed(unread))
    elif kind == "linear":
        scaling = LinearScaling(factor=number("factor"))
    elif kind == "dynamic":
        # The base grows with what is beyond max_position_embeddings, which no engine serves.
        number("factor")
        scaling = None
    elif kind == "llama3":
        scaling = Llama3Scaling(
            factor=number("factor"),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
            original_max_position=number("original_max_position_embeddings", int),
        )
    elif kind == "yarn":
        scaling = _yarn(rope, number, longest)
    elif kind in ("longrope", "su"):
        scaling = _longrope(rope, number, longest)
    else:
        raise ModelConfigError(
            f"rope_type={shown(kind)} is not supported; supported: 'default', 'linear', 'dynamic', "
            "'llama3', 'yarn', 'longrope'"
        )
    unused = _SCALED_FIELDS if kind == "default" else frozenset()
    if unknown := sorted(set(rope) - read - unused):
        raise ModelConfigError(
            f"rope parameters {shown(unknown)} are not supported with rope_type={kind!r}; "
            f"supported: {sorted(read)}"
        )
    return scaling


def _yarn(rope: Mapping[str, Any], number: Any, longest: int) -> YarnScaling:
    original = number("original_max_position_embeddings", int)
    factor = number("factor", float, longest / max(original, 1))

    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    # Zero stands for none of them.
    over, under = number("mscale", float, 0.0), number("mscale_all_dim", float, 0.0)
    default = scale(over) / scale(under) if over and under else scale(1.0)
    return YarnScaling(
        factor=factor,
        original_max_position=original,
        attention_factor=number("attention_factor", float, default),
        beta_fast=number("beta_fast", float, 32.0) or 32.0,
        beta_slow=number("beta_slow", float, 1.0) or 1.0,
        truncate=number("truncate", bool, True),
    )


def _longrope(rope: Mapping[str, Any], number: Any, longest: int) -> LongRopeScaling:
    def numbers(field: str) -> tuple[float, ...]:
        values = number(field, list)
        return tuple(typed(f"rope {field}", value, float) for value in values)

    original = number("original_max_position_embeddings", int)
    factor = number("factor", float, longest / max(original, 1))
    default = 1.0
    if factor > 1 and original > 1:
        default = math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        short_factor=numbers("short_factor"),
        long_factor=numbers("long_factor"),
        original_max_position=original,
        attention_factor=number("attention_factor", float, default),
    )
