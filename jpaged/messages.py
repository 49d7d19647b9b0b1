# SPDX-License-Identifier: Apache-2.0
"""Conversations as callers give them, checked: plain data, whatever they were made of."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jpaged.host.checks import lone_surrogate, shown

# A message of a conversation, in the form of OpenAI: {"role": "user", "content": "Hello"}.
Message = Mapping[str, Any]
Conversation = Sequence[Message]

# Names that a message's reasoning goes by; templates read the first, that of gpt-oss the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# With one of these, a message needs no content.
_INSTEAD = ("tool_calls", "function_call", *_REASONING)
_MAX_DEPTH = 64


def is_conversation(value: object) -> bool:
    """Whether this may be one conversation, and not a list of them."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return True  # which is told what is wrong with it
    return not isinstance(value[0], list | tuple)


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """A conversation as data of one's own, which templates can be given.

    As transformers does, fields that are None are left out, and reasoning goes by all its names.

    Args:
      messages: of each a role, and as content text or a list of parts that are text, as OpenAI's
        interface takes them; other fields (tool_calls, name) are passed on.

    Raises:
      ValueError: naming the message, from 0, and the field that is wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ValueError(
            f"messages={shown(messages)} must be a list of messages, such as "
            '{"role": "user", "content": "Hello"}'
        )
    if not messages:
        raise ValueError("messages is empty; give at least one message")
    return [_message(message, f"message {index}") for index, message in enumerate(messages)]


def checked_dicts(name: str, values: Any) -> list[dict[str, Any]] | None:
    """A list of objects as data of one's own; None stays None. Raises: ValueError, naming it."""
    if values is None:
        return None
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise ValueError(f"{name}={shown(values)} must be a list of dicts")
    for index, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}[{index}]={shown(value)} must be a dict")
    return [plain(value, f"{name}[{index}]") for index, value in enumerate(values)]


def joined_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with lists of parts as one text, a part a line, for templates without parts."""
    return [
        message | {"content": "\n".join(part["text"] for part in message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def plain(value: Any, path: str, depth: int = 0) -> Any:
    """The value as JSON has it: no object comes through that has methods of its own.

    Raises:
      ValueError: if it is no such data; the message begins with the path to what is wrong.
    """
    if value is None or isinstance(value, bool | np.bool_):
        return None if value is None else bool(value)
    if isinstance(value, str):
        text = str.__str__(value)
        if (position := lone_surrogate(text)) is not None:
            raise ValueError(
                f"{path}={shown(text)} must be Unicode text: character {position} is half of a "
                "surrogate pair"
            )
        return text
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if depth >= _MAX_DEPTH:
        raise ValueError(f"{path[:80]}... is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{path} has the key {shown(key)}, which must be a string")
        return {
            plain(key, f"{path}: key"): plain(item, f"{path}.{key}", depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise ValueError(
        f"{path}={shown(value)} is of type {type(value).__name__}; it must be data as JSON has it: "
        "strings, numbers, lists and dicts of these"
    )


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(
            f"{where}={shown(message)} must be a dict, such as "
            '{"role": "user", "content": "Hello"}'
        )
    if message.get("role") is None:
        raise ValueError(f"{where}: role is missing; give one, such as 'user'")
    role, content = message["role"], message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where}: role={shown(role)} must be a string, such as 'user'")
    if content is None and not any(message.get(field) for field in _INSTEAD):
        raise ValueError(f"{where}: content is missing; give text")
    if isinstance(content, list | tuple):
        _check_parts(content, where)
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"{where}: content={shown(content)} must be text, or a list of text parts")
    fields: dict[str, Any] = {}
    for key, value in message.items():
        if not isinstance(key, str):
            raise ValueError(f"{where} has the key {shown(key)}, which must be a string")
        if value is not None:
            fields[plain(key, f"{where}: key")] = plain(value, f"{where}: {key}")
    reasoning = next((fields[name] for name in _REASONING if name in fields), None)
    if reasoning is not None:
        fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
    return fields


def _check_parts(content: Sequence[Any], where: str) -> None:
    if not content:
        raise ValueError(f"{where}: content has no parts; give at least one")
    for index, part in enumerate(content):
        what = f"{where}: content[{index}]"
        if not isinstance(part, Mapping):
            raise ValueError(
                f'{what}={shown(part)} must be a dict, such as {{"type": "text", "text": "Hello"}}'
            )
        if part.get("type") != "text":
            raise ValueError(f"{what}: type={shown(part.get('type'))} must be 'text', the only one")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{what}: text={shown(part.get('text'))} must be a string")
