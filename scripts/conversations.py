# SPDX-License-Identifier: Apache-2.0
"""Conversations as people give them: JSON, a line each, and what chat templates need beside."""

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags

from jpaged import gguf_text
from jpaged.chat import ChatOptions, ChatTemplate
from jpaged.host.checks import shown
from jpaged.host.params import SamplingParams
from jpaged.jobs.fields import own_params, parse_json
from jpaged.models.config_json import check_directory
from jpaged.models.gguf_file import GgufFile
from jpaged.models.paths import is_there
from jpaged.models.sources import opened
from jpaged.scripts.prompts import decode_flag

# The flags belong to the program that calls `define_chat_flags`, so that its --help shows them.
flags.disclaim_key_flags()

_FIELDS = ("messages", "tools", "documents")


def define_chat_flags() -> None:
    """Defines --chat_template and --chat_template_kwargs for the program that calls it."""
    flags.DEFINE_string(
        "chat_template",
        None,
        "File with a chat template, its text, or the name of one of the model's. None takes the "
        "model's default.",
    )
    flags.DEFINE_string(
        "chat_template_kwargs",
        None,
        "JSON object of more variables for the chat template, such as "
        "'{\"enable_thinking\": false}'.",
    )


def chat_options_from_flags() -> ChatOptions:
    """Returns what the flags of `define_chat_flags` say.

    Raises:
      ValueError: if a file cannot be read, or a value is no JSON object; one line.
    """
    options: ChatOptions = {}
    given = flags.FLAGS["chat_template"].value
    if given is not None:
        template = given
        try:
            if os.path.isfile(given):
                template = pathlib.Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
            raise ValueError(f"--chat_template={given}: {reason}") from e
        options["chat_template"] = template
    kwargs = flags.FLAGS["chat_template_kwargs"].value
    if kwargs is not None:
        value = parse_json(decode_flag("--chat_template_kwargs", kwargs), "--chat_template_kwargs")
        if not isinstance(value, dict):
            raise ValueError(f"--chat_template_kwargs={shown(value)} must be a JSON object")
        options["chat_template_kwargs"] = value
    return options


def chat_template_of(directory: pathlib.Path | GgufFile) -> ChatTemplate:
    """Returns the chat templates of a directory or GGUF file, before anything else of it is read.

    Raises:
      FileNotFoundError: if there is no such directory.
      ValueError: if they cannot be read, or there is no tokenizer.
    """
    if not isinstance(directory, GgufFile):
        directory = opened(directory)
    if isinstance(directory, GgufFile):
        return gguf_text.chat_template_of(directory)
    check_directory(directory)
    if not is_there(directory / "tokenizer.json"):
        raise ValueError(f"{str(directory)!r} has no tokenizer.json, so it cannot be talked to")
    return ChatTemplate.load(directory)


def read_conversations(
    prompts: Sequence[str], params: SamplingParams
) -> list[tuple[Mapping[str, Any], SamplingParams]]:
    """Returns conversations, each with its sampling parameters.

    Args:
      prompts: each a JSON list of messages, or an object with messages and maybe tools, documents
        and sampling parameters.
      params: what counts where an object has nothing else.

    Raises:
      ValueError: naming the prompt, from 1, and the field that is wrong.
    """
    found: list[tuple[Mapping[str, Any], SamplingParams]] = []
    for number, prompt in enumerate(prompts, 1):
        try:
            given = _conversation(prompt)
            own = own_params(given, _FIELDS, params)
            found.append(({name: given[name] for name in _FIELDS if name in given}, own))
        except ValueError as e:
            raise ValueError(f"prompt {number}: {e}") from e
    return found


def render_conversations(
    conversations: Iterable[Mapping[str, Any]], template: ChatTemplate, options: ChatOptions
) -> list[str]:
    """Returns the texts that conversations are for a model.

    Args:
      conversations: of `read_conversations`.
      template: the model's.
      options: for all.

    Raises:
      ValueError: naming the prompt, from 1, its message, from 0, and the field that is wrong.
    """
    texts: list[str] = []
    for number, given in enumerate(conversations, 1):
        try:
            texts.append(template.render(**given, **options, add_generation_prompt=True))
        except ValueError as e:
            raise ValueError(f"prompt {number}: {e}") from e
    return texts


def _conversation(prompt: str) -> Mapping[str, Any]:
    value = parse_json(prompt, "the conversation")
    if isinstance(value, list):
        return {"messages": value}
    if not isinstance(value, dict) or "messages" not in value:
        raise ValueError(
            f"{shown(value)} must be a JSON list of messages, or an object with messages, such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    return value
