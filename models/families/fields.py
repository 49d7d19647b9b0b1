# SPDX-License-Identifier: Apache-2.0
"""Reads the fields of a config.json for a family, and remembers which were read."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jpaged.models.json_fields import ModelConfigError, shown, typed

logger = logging.getLogger(__name__)

_Kind = TypeVar("_Kind")
# Layers whose kinds follow no short pattern are kept one by one.
_MAX_IRREGULAR_LAYERS = 10_000
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


class Fields:
    """The fields of one config.json.

    Attributes:
      family: the architecture's name, for messages.
      read: names of the fields that were asked for.
    """

    def __init__(self, family: str, fields: Mapping[str, Any], defaults: Mapping[str, Any]):
        """Reads nothing yet.

        Args:
          family: the architecture's name.
          fields: the parsed JSON object.
          defaults: what stands for fields that are left out, or null.
        """
        self.family = family
        self.read: set[str] = set()
        self._fields = fields
        self._defaults = defaults

    def optional(self, name: str, kind: type[_Kind]) -> _Kind | None:
        """The value of a field, or its default; None where it has neither, or is null."""
        self.read.add(name)
        value = self._fields.get(name)
        if value is None and name not in self._fields:
            value = self._defaults.get(name)
        return None if value is None else typed(name, value, kind)

    def __call__(self, name: str, kind: type[_Kind]) -> _Kind:
        """The value of a field, or its default, also for null."""
        self.read.add(name)
        value = self._fields.get(name)
        return typed(name, self._defaults[name] if value is None else value, kind)

    def has(self, name: str) -> bool:
        """Whether a field says something."""
        self.read.add(name)
        return self._fields.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Whether a field is there and null."""
        return name in self._fields and self._fields[name] is None

    def choice(self, name: str, choices: Mapping[str, str]) -> str:
        """What a field's value stands for.

        Raises:
          ModelConfigError: if it is none of the choices.
        """
        value = self(name, str)
        if value not in choices:
            raise self.unsupported(name, " or ".join(map(repr, choices)))
        return choices[value]

    def unsupported(self, name: str, supported: str) -> ModelConfigError:
        """The error of a value that is not computed here."""
        return ModelConfigError(
            f"{name}={shown(self._fields.get(name))} is not supported for {self.family}; "
            f"supported: {supported}"
        )

    def activation(self, name: str = "hidden_act") -> str:
        """Of the MLP, as `MlpSpec` calls it."""
        return self.choice(name, _ACTIVATIONS)

    def heads(self) -> dict[str, Any]:
        """num_q_heads, num_kv_heads and head_dim, for an `AttentionSpec`."""
        num_heads, hidden_size = self("num_attention_heads", int), self("hidden_size", int)
        # A null is not a missing field here: transformers gives each query head its own then.
        kv_heads = self.optional("num_key_value_heads", int)
        head_dim = self.optional("head_dim", int)
        if head_dim is None:
            head_dim = self._defaults.get("head_dim")
        if head_dim is not None and (head_dim < 2 or head_dim % 2):
            raise ModelConfigError(
                f"head_dim={head_dim} must be even and at least 2: rotary embeddings turn pairs of "
                "lanes"
            )
        # Of no heads at all, the spec complains.
        if head_dim is None and num_heads > 0 and hidden_size % num_heads:
            raise ModelConfigError(
                f"hidden_size={hidden_size} must be a multiple of num_attention_heads={num_heads} "
                "where config.json has no head_dim"
            )
        return {
            "num_q_heads": num_heads,
            "num_kv_heads": num_heads if kv_heads is None else kv_heads,
            "head_dim": hidden_size // max(num_heads, 1) if head_dim is None else head_dim,
        }

    def kinds(
        self, window: int | None, default: Callable[[int], str], period: int | None
    ) -> list[str]:
        """The layers' attention, "full_attention" or "sliding_attention": one period of it.

        Args:
          window: of the layers that have one; None supports none.
          default: of each layer, where layer_types does not say.
          period: with which it repeats; None with none that is known.

        Raises:
          ModelConfigError: if layer_types has another kind, or not one for each layer.
        """
        num_layers = self("num_hidden_layers", int)
        given = self.optional("layer_types", list)
        if given:
            known = {
                "full_attention": "full_attention",
                "attention": "full_attention",
                "sliding_attention": "sliding_attention",
            }
            if window is None:
                del known["sliding_attention"]
            if not all(isinstance(kind, str) and kind in known for kind in given):
                names = " or ".join(repr(kind) for kind in known if kind != "attention")
                raise self.unsupported("layer_types", f"{names} in every layer")
            if len(given) != num_layers:
                raise ModelConfigError(
                    f"layer_types has {len(given)} entries for num_hidden_layers={num_layers}: "
                    "they contradict each other"
                )
            return shortest_period([known[kind] for kind in given])
        if period is not None:
            return [default(i) for i in range(min(period, max(num_layers, 1)))]
        if num_layers > _MAX_IRREGULAR_LAYERS:
            raise ModelConfigError(
                f"num_hidden_layers={num_layers} must be at most {_MAX_IRREGULAR_LAYERS} where "
                "layers differ"
            )
        return shortest_period([default(i) for i in range(max(num_layers, 1))])

    def shared(self) -> dict[str, Any]:
        """What every family has: the attributes of `ModelConfig` beside layers and norms."""
        vocab_size = self("vocab_size", int)
        bos: tuple[int, ...] = ()
        if self.has("bos_token_id"):
            bos = token_ids("bos_token_id", self("bos_token_id", int), vocab_size)
        self.read.add("eos_token_id")
        return {
            "family": self.family,
            "vocab_size": vocab_size,
            "hidden_size": self("hidden_size", int),
            "num_layers": self("num_hidden_layers", int),
            "tie_word_embeddings": self("tie_word_embeddings", bool),
            "max_position_embeddings": self("max_position_embeddings", int),
            "bos_token_id": bos[0] if bos else None,
            "eos_token_ids": token_ids(
                "eos_token_id", self._fields.get("eos_token_id"), vocab_size
            ),
        }

    def raw(self, name: str) -> Any:
        """A field's value as it is, which counts as read."""
        self.read.add(name)
        return self._fields.get(name)

    def default(self, name: str, otherwise: Any = None) -> Any:
        """What stands for a field that is left out, if anything does."""
        return self._defaults.get(name, otherwise)


def shortest_period(values: Sequence[_Kind]) -> list[_Kind]:
    """The first few values, of which all the others are repetitions."""
    for period in range(1, len(values)):
        if all(values[i] == values[i % period] for i in range(period, len(values))):
            return list(values[:period])
    return list(values)


def token_ids(field: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """Those that can be chosen; others change nothing, as -1, which some files have for none."""
    if value is None:
        return ()
    ids = [typed(field, i, int) for i in (value if isinstance(value, list) else [value])]
    known = tuple(token_id for token_id in ids if 0 <= token_id < vocab_size)
    if any(token_id >= vocab_size for token_id in ids):
        logger.warning(
            "%s=%s: what is not below vocab_size=%d is no token, and is ignored",
            field,
            shown(value),
            vocab_size,
        )
    return known
