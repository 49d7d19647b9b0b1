# SPDX-License-Identifier: Apache-2.0
"""Checks what callers give, once, where it enters: types by annotation, values by rules.

What passes is a plain Python value: NumPy's and jax's scalars are the numbers that they are, and
nothing else becomes another type. What does not is a ValueError of one line, with the name, the
value and the rule.
"""

import dataclasses
import functools
import numbers
import operator
import os
import pathlib
import re
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

INT32_MAX = 2**31 - 1

# What belongs to tokens, and to sequences of them; checked values are the tuples.
TokenBias = Mapping[int, float] | tuple[tuple[int, float], ...]
SequenceBias = Mapping[tuple[int, ...], float] | tuple[tuple[tuple[int, ...], float], ...]

_INTEGER = re.compile(r"-?[0-9]{1,10}")

_KINDS = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    tuple[int, ...]: "a list of integers",
    tuple[str, ...]: "a list of strings",
    **dict.fromkeys(
        typing.get_args(TokenBias), "a dictionary from token ids to numbers, each token once"
    ),
    **dict.fromkeys(typing.get_args(SequenceBias), "a list of [token ids, number]"),
    tuple[tuple[int, ...], ...]: "a list of lists of token ids",
}


class Rule(typing.NamedTuple):
    """What a value must be, beside its type.

    Attributes:
      says: how it goes on after "must be".
      holds: whether a value of the right type is so.
    """

    says: str
    holds: Callable[[Any], bool]


def at_least(least: int, note: str = "") -> tuple[Rule, ...]:
    """Rules of a count: no less than `least`, and what 32 bits hold."""
    return (
        Rule(f"at least {least}{note}", lambda value: value >= least),
        Rule("below 2**31", lambda value: value <= INT32_MAX),
    )


def one_of(*choices: str) -> tuple[Rule, ...]:
    """The rule of a text that is a choice."""
    listed = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
    return (Rule(listed, lambda value: value in choices),)


def check_fields(instance: Any, rules: Mapping[str, Sequence[Rule]]) -> None:
    """Checks the fields of a frozen dataclass, in their order, and makes their values plain.

    None stands for the default of a field whose annotation does not name it.

    Args:
      instance: whose fields have annotations made of int, float, bool, str, None and tuples.
      rules: by name of the field, what its value must be; None is free of them.

    Raises:
      ValueError: naming the first field that breaks one.
    """
    for name, kinds, default in _fields(type(instance)):
        given = getattr(instance, name)
        value = default if given is None and types.NoneType not in kinds else given
        if value is not None:
            value = _converted(name, value, kinds)
            check(name, value, rules.get(name, ()), optional=types.NoneType in kinds)
        if value is not given:
            object.__setattr__(instance, name, value)


def check(name: str, value: Any, rules: Sequence[Rule], *, optional: bool = False) -> None:
    """Raises ValueError where a value of the right type breaks a rule."""
    for rule in rules:
        if not rule.holds(value):
            none = ", or None" if optional else ""
            raise ValueError(f"{name}={shown(value)} must be {rule.says}{none}")


def checked(name: str, value: Any, kind: Any, rules: Sequence[Rule] = ()) -> Any:
    """An argument as a plain value of a kind, such as int or `str | None`.

    Raises:
      ValueError: if it is none, or breaks a rule.
    """
    kinds = _members(kind)
    if value is None and types.NoneType in kinds:
        return None
    value = _converted(name, value, kinds)
    check(name, value, rules, optional=types.NoneType in kinds)
    return value


def instance_of(name: str, value: Any, cls: type) -> Any:
    """The value, which must be an instance of a class of ours.

    Raises:
      ValueError: if it is not.
    """
    if not isinstance(value, cls):
        raise ValueError(f"{name}={shown(value)} must be {_article(cls.__name__)}")
    return value


def function(name: str, value: Any) -> None:
    """Raises ValueError if the value cannot be called."""
    if not callable(value):
        raise ValueError(f"{name}={shown(value)} must be a function")


def directory(name: str, value: Any) -> pathlib.Path:
    """The value as a path, with its "~" expanded; whether it is there is not looked at.

    Raises:
      ValueError: if it is none.
    """
    try:
        if not isinstance(value, str | os.PathLike):
            raise TypeError
        # What can be looked at stays what it is: the path may be of a bucket (`models.find`).
        usable = isinstance(value, pathlib.PurePath) and hasattr(value, "exists")
        path = cast(pathlib.Path, value) if usable else pathlib.Path(value)
        return path.expanduser()
    except (TypeError, RuntimeError):
        raise ValueError(f"{name}={shown(value)} must be the path of a directory") from None


def integer(value: Any) -> int:
    """The value as an int. Raises: TypeError, if it is none; a bool or a float is none."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or _dtype_kind(value) == "b":
        raise TypeError("a bool is no integer")
    if getattr(value, "shape", ()) != ():
        raise TypeError("an array is no integer")
    return int(operator.index(value))


def integers(values: Any, most: int = 2**24) -> list[int]:
    """A sequence of integers as a list: of Python's, of NumPy's, or an array of one dimension.

    Args:
      values: what may be one.
      most: how many it has at most.

    Raises:
      TypeError: if it is something else; the message goes on after "must be".
    """
    try:
        return _integers(values, most)
    except TypeError:
        raise
    except Exception as e:  # of an array of jax that was deleted, or whatever a stranger raises
        raise TypeError(f"a list of integers that can be read: {e}") from None


def _integers(values: Any, most: int) -> list[int]:
    is_array = getattr(values, "ndim", None) == 1 and _dtype_kind(values) in ("i", "u")
    is_text = isinstance(values, str | bytes | bytearray | memoryview)
    if not is_array and (is_text or not isinstance(values, Sequence)):
        raise TypeError(f"a list of integers, not {_article(type(values).__name__)}")
    if len(values) > most:
        raise TypeError(f"a list of at most {most} integers, not of {len(values)}")
    found: list[Any] = np.asarray(values).tolist() if is_array else list(values)
    if all(type(value) is int for value in found):
        return found
    plain: list[int] = []
    for place, value in enumerate(found):
        try:
            plain.append(integer(value))
        except Exception:  # whatever a stranger's object raises
            kind = type(value).__name__
            raise TypeError(
                f"a list of integers, but place {place} has {_article(kind)}, {shown(value)}"
            ) from None
    return plain


def shown(value: Any) -> str:
    """The value for a message: one line, not long, whatever it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = 80
    try:
        text = " ".join(short.repr(value).split())
    except Exception:  # a repr that fails, or an int with more digits than Python prints
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 100 else f"{text[:97]}..."


def lone_surrogate(text: str) -> int | None:
    """Where a text has half of a surrogate pair, which no encoding has; None if nowhere."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        return e.start
    return None


@functools.cache
def _fields(cls: type) -> tuple[tuple[str, tuple[Any, ...], Any], ...]:
    hints = typing.get_type_hints(cls)
    return tuple((f.name, _members(hints[f.name]), f.default) for f in dataclasses.fields(cls))


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _converted(name: str, value: Any, kinds: Sequence[Any]) -> Any:
    for kind in kinds:
        if kind is types.NoneType:
            continue
        try:
            converted = _CONVERTERS[kind](value)
        except Exception:  # whatever a stranger's object raises: it is none of this kind
            continue
        for text in [converted] if kind is str else converted if kind == tuple[str, ...] else []:
            if (position := lone_surrogate(text)) is not None:
                raise ValueError(
                    f"{name}={shown(value)} must be Unicode text: character {position} of "
                    f"{shown(text)} is half of a surrogate pair"
                )
        return converted
    wanted = list(dict.fromkeys(_KINDS[kind] for kind in kinds if kind is not types.NoneType))
    wanted += ["None"] * (types.NoneType in kinds)
    says = ", ".join(wanted[:-1]) + " or " * (len(wanted) > 1) + wanted[-1]
    raise ValueError(f"{name}={shown(value)} must be {says}")


def _float(value: Any) -> float:
    if isinstance(value, bool | complex) or _dtype_kind(value) not in (None, *"iufV"):
        raise TypeError("no number")
    if not isinstance(value, numbers.Real) and getattr(value, "shape", None) != ():
        raise TypeError("no number")
    return float(value)


def _bool(value: Any) -> bool:
    if isinstance(value, bool) or (_dtype_kind(value) == "b" and value.shape == ()):
        return bool(value)
    raise TypeError("no bool")


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no string")
    return str.__str__(value)


def _strings(values: Any) -> tuple[str, ...]:
    if isinstance(values, set | frozenset):
        values = sorted(values)
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError("no list")
    return tuple(map(_str, values))


def _int_tuple(values: Any) -> tuple[int, ...]:
    return tuple(integers(sorted(values) if isinstance(values, set | frozenset) else values))


def _token_lists(values: Any) -> tuple[tuple[int, ...], ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError("no list")
    return tuple(map(_int_tuple, values))


def _token_bias(values: Any) -> tuple[tuple[int, float], ...]:
    """Pairs, by token; keys of a dictionary may be integers as text, as JSON has them."""
    found: dict[int, float] = {}
    for key, value in _pairs(values):
        token = int(key) if isinstance(key, str) and _INTEGER.fullmatch(key) else integer(key)
        if token in found:
            raise ValueError(f"token {token} is there twice")
        found[token] = _float(value)
    return tuple(sorted(found.items()))


def _sequence_bias(values: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Pairs, in their order; of equal sequences the last counts, as in transformers."""
    return tuple({_int_tuple(ids): _float(value) for ids, value in _pairs(values)}.items())


def _pairs(values: Any) -> Any:
    if isinstance(values, Mapping):
        return values.items()
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError("no list")
    return values


_CONVERTERS: Mapping[Any, Callable[[Any], Any]] = {
    int: integer,
    float: _float,
    bool: _bool,
    str: _str,
    tuple[int, ...]: _int_tuple,
    tuple[str, ...]: _strings,
    **dict.fromkeys(typing.get_args(TokenBias), _token_bias),
    **dict.fromkeys(typing.get_args(SequenceBias), _sequence_bias),
    tuple[tuple[int, ...], ...]: _token_lists,
}


def _dtype_kind(value: Any) -> str | None:
    """The kind of an array's or a scalar's numbers, as NumPy's letters; None for anything else.

    Raises:
      TypeError: for a masked array: what is behind its mask is not what it shows.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            "a list of integers, not a masked array: give its .compressed() or .filled(token)"
        )
    dtype = getattr(value, "dtype", None)
    # Of dtypes that are not NumPy's a name says it: torch.bool.
    return getattr(dtype, "kind", "b" if "bool" in str(dtype) else None)


def _article(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"
