# SPDX-License-Identifier: Apache-2.0
"""From conversations to prompts, by the template that comes with a model."""

import datetime
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import tokenizers

from jpaged.host.checks import checked, shown
from jpaged.messages import (
    Conversation,
    checked_dicts,
    checked_messages,
    is_conversation,
    joined_parts,
    plain,
)
from jpaged.models.json_fields import read_json
from jpaged.models.paths import is_there
from jpaged.text import encode

if TYPE_CHECKING:
    from jpaged.jinja import Program

_CONFIG, _FILE = "tokenizer_config.json", "chat_template.jinja"
_FOLDER = "additional_chat_templates"
_STANDARD_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
# Variables that a template has by itself.
_OWN = ("messages", "tools", "documents", "add_generation_prompt")
# Stands behind the message that goes on, to find its end in what the template makes of it.
_END = "CONTINUE_FINAL_MESSAGE_TAG "
_PROBE = "a probe"
_NONE = (
    "the model has no chat template, so nothing says how it was taught to be talked to: take a "
    "model that has one (often named -Instruct or -it), give the text of its template as "
    "chat_template (--chat_template=FILE), or generate from text"
)


class ChatOptions(TypedDict, total=False):
    """How a conversation becomes a prompt; each may be left out.

    Attributes:
      documents: dicts, such as {"title": ..., "text": ...}, for templates that know of them.
      continue_final_message: whether the last message is the beginning of the answer, which goes on
        where it ends; else an answer begins behind it.
      chat_template: the name of one of the model's templates, or the text of another. None takes
        "tool_use" where there is one and tools are given, and else "default".
      chat_template_kwargs: more variables for the template, such as {"enable_thinking": False}.
      date: the day that it is for a template that asks, as "2026-11-28"; None takes the clock's.
    """

    documents: Sequence[Mapping[str, Any]] | None
    continue_final_message: bool
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    date: str | None


class ChatTemplate:
    """A model's chat templates; renders as transformers' `apply_chat_template` does.

    Attributes:
      templates: Jinja templates by name; empty for a model that has none.
      special_tokens: variables of every template, such as "bos_token".
    """

    def __init__(
        self,
        templates: Mapping[str, str] | str,
        special_tokens: Mapping[str, str] | None = None,
    ):
        """Takes templates that were read.

        Args:
          templates: by name; a text is named "default".
          special_tokens: by the names that templates know them by.

        Raises:
          ValueError: if one is no text.
        """
        if isinstance(templates, str):
            templates = {"default": templates}
        self.templates = {checked("name", k, str): checked(k, v, str) for k, v in templates.items()}
        tokens = special_tokens or {}
        self.special_tokens = {name: checked(name, t, str) for name, t in tokens.items()}
        self._programs: dict[str, Program] = {}
        self._takes_parts: dict[str, bool] = {}

    @classmethod
    def load(cls, directory: pathlib.Path) -> "ChatTemplate":
        """Reads the chat templates of a model directory, as transformers does.

        Files, chat_template.jinja and those of additional_chat_templates/, count before what
        tokenizer_config.json has. Special tokens are those of tokenizer_config.json, and of
        special_tokens_map.json where the former does not list the added tokens; what transformers'
        classes set by themselves is not known here.

        Raises:
          ValueError: if a file cannot be read, or holds something else.
        """
        path = directory / _CONFIG
        config = read_json(path) if is_there(path) else {}
        tokens = dict(config)
        extra = directory / "special_tokens_map.json"
        if "added_tokens_decoder" not in config and is_there(extra):
            tokens |= read_json(extra)
        for more in (config, tokens):
            if isinstance(named := more.get("extra_special_tokens"), dict):
                tokens |= named
        files = {"default": directory / _FILE} if is_there(directory / _FILE) else {}
        files |= {file.stem: file for file in sorted((directory / _FOLDER).glob("*.jinja"))}
        if files:
            templates = {name: _read(file) for name, file in files.items()}
        else:
            templates = _templates_of(config.get("chat_template"), path)
        return cls(templates, _special_tokens(tokens, path))

    def render(
        self,
        messages: Conversation,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: str | None = None,
    ) -> str:
        """Returns the text that a conversation is for the model.

        Lists of text parts reach a template that knows of such lists as they are; another gets
        their texts, a part a line.

        Args:
          messages: see `messages.checked_messages`.
          tools: JSON schemas of functions, for templates that know of them.
          documents: see `ChatOptions`, like the rest.
          chat_template: likewise.
          add_generation_prompt: whether the text ends with the beginning of an answer.
          continue_final_message: likewise.
          chat_template_kwargs: likewise.
          date: likewise.

        Raises:
          ValueError: if an argument is wrong, the model has no such template, or the template
            fails or refuses the conversation.
        """
        data = checked_messages(messages)
        variables: dict[str, Any] = dict(self.special_tokens)
        if date is not None:
            variables["strftime_now"] = checked_date("date", date).strftime
        variables |= self._more_variables(chat_template_kwargs)
        variables |= {
            "tools": checked_dicts("tools", tools),
            "documents": checked_dicts("documents", documents),
            "add_generation_prompt": checked("add_generation_prompt", add_generation_prompt, bool),
        }
        source = self._choose(chat_template, tools is not None)
        program = self._program(source)
        has_parts = any(isinstance(message.get("content"), list) for message in data)
        if has_parts and not self._knows_parts(source, program):
            data = joined_parts(data)
        if not checked("continue_final_message", continue_final_message, bool):
            return program.run(variables | {"messages": data})
        if add_generation_prompt:
            raise ValueError(
                "continue_final_message and add_generation_prompt exclude each other: an answer "
                "goes on, or a new one begins"
            )
        data, end = _marked(data)
        return _cut(program.run(variables | {"messages": data}), end)

    def asks_for_date(self, options: ChatOptions) -> bool:
        """Whether what a template makes of conversations may depend on the day."""
        sources = [*self.templates.values(), options.get("chat_template") or ""]
        return any("strftime_now" in source for source in sources)

    def prompt(
        self,
        tokenizer: tokenizers.Tokenizer | None,
        messages: Conversation,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: ChatOptions | None = None,
    ) -> list[int]:
        """Returns the token ids that a conversation is for the model, up to the answer.

        Special tokens are those that the template writes: encoding adds none. As in transformers,
        what looks like one in a message becomes one.

        Args:
          tokenizer: the model's.
          messages: as in `render`.
          tools: likewise.
          options: likewise.

        Raises:
          ValueError: as `render`; or if the model has no tokenizer, or it cannot encode the text.
        """
        options = options or {}
        text = self.render(
            messages,
            tools,
            add_generation_prompt=not options.get("continue_final_message"),
            **options,
        )
        if tokenizer is None:
            raise ValueError("the model has no tokenizer.json, so it cannot be talked to")
        token_ids = encode(tokenizer, text, add_special_tokens=False)
        if not token_ids:
            raise ValueError("the chat template makes nothing of the conversation")
        return token_ids

    def prompts(
        self,
        tokenizer: tokenizers.Tokenizer | None,
        messages: Conversation | Sequence[Conversation],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: ChatOptions | None = None,
    ) -> list[list[int]]:
        """Likewise of one conversation, or of each of a list of them; errors say of which."""
        if is_conversation(messages):
            return [self.prompt(tokenizer, messages, tools, options)]  # pyright: ignore
        prompts: list[list[int]] = []
        for index, conversation in enumerate(messages):
            try:
                prompts.append(self.prompt(tokenizer, conversation, tools, options))  # pyright: ignore
            except ValueError as e:
                raise ValueError(f"conversation {index}: {e}") from e
        return prompts

    def _choose(self, name: str | None, has_tools: bool) -> str:
        """The template that is meant, as transformers chooses."""
        name = checked("chat_template", name, str | None)
        if name is not None:
            if name not in self.templates and not ("{{" in name or "{%" in name):
                raise ValueError(
                    f"chat_template={shown(name)} is neither a template nor the name of one; the "
                    f"model has {shown(sorted(self.templates)) if self.templates else 'none'}"
                )
            return self.templates.get(name, name)
        if has_tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" in self.templates:
            return self.templates["default"]
        if not self.templates:
            raise ValueError(_NONE)
        raise ValueError(
            f"the model has the chat templates {shown(sorted(self.templates))}, and no default: "
            "name one as chat_template"
        )

    def _program(self, source: str) -> "Program":
        if source not in self._programs:
            from jpaged.jinja import Program  # here, as most engines never chat

            names = [name for name, text in self.templates.items() if text == source]
            of = f" {shown(names[0])}" if names and len(self.templates) > 1 else ""
            self._programs[source] = Program(source, f"chat template{of}")
        return self._programs[source]

    def _knows_parts(self, source: str, program: "Program") -> bool:
        """Whether a template makes text of a list of parts, and not what Python prints of one."""
        if source not in self._takes_parts:
            message = {"role": "user", "content": [{"type": "text", "text": _PROBE}]}
            own = {"messages": [message], "tools": None, "documents": None}
            try:
                text = program.run(self.special_tokens | own | {"add_generation_prompt": False})
            except ValueError:
                text = ""
            self._takes_parts[source] = _PROBE in text and f"'{_PROBE}'" not in text
        return self._takes_parts[source]

    def _more_variables(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            raise ValueError(f"chat_template_kwargs={shown(given)} must be a dict")
        for name in _OWN:
            if name in given:
                raise ValueError(f"chat_template_kwargs has {name!r}, which is an argument itself")
        return plain(given, "chat_template_kwargs")


def checked_date(name: str, value: Any) -> datetime.datetime:
    """The midnight that a day, such as "2026-11-28", begins with. Raises: ValueError, naming it."""
    try:
        day = datetime.date.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={shown(value)} must be a day, such as 2026-11-28") from None
    return datetime.datetime.combine(day, datetime.time())


def _marked(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The messages with a mark behind the last one's text, and that text."""
    *before, last = messages
    content = last.get("content")
    if content is None:
        raise ValueError(
            f"continue_final_message: message {len(before)}, the last, has no content to go on from"
        )
    if isinstance(content, str):
        return [*before, last | {"content": content + _END}], content
    *parts, part = content
    marked = [*parts, part | {"text": part["text"] + _END}]
    return [*before, last | {"content": marked}], part["text"]


def _cut(text: str, end: str) -> str:
    """The text up to the mark, which a template may have stripped of its space."""
    mark = _END.strip()
    if end.strip() not in text or mark not in text:
        raise ValueError(
            "continue_final_message: the chat template does not write the last message as it is, "
            f"{shown(end)}, so there is no place to go on from"
        )
    before, _, after = text.rpartition(mark)
    return before if after.startswith(_END[len(mark) :]) else before.rstrip()


def _read(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise ValueError(f"{file} is no readable chat template: {reason}") from e


def _templates_of(value: Any, path: pathlib.Path) -> dict[str, str]:
    """The templates of tokenizer_config.json, in the forms that it has had."""
    if value is None or isinstance(value, str):
        return {"default": value} if value else {}
    pairs = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        pairs = [(item.get("name"), item.get("template")) for item in value]
    if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise ValueError(
            f"{path}: chat_template={shown(value)} must be a template, or a list of objects with a "
            "name and a template"
        )
    return dict(pairs)


def _special_tokens(fields: Mapping[str, Any], path: pathlib.Path) -> dict[str, str]:
    """The fields that are tokens: texts, or objects with one."""
    tokens: dict[str, str] = {}
    for name, value in fields.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
        elif name in _STANDARD_TOKENS and value is not None:
            raise ValueError(f"{path}: {name}={shown(value)} must be a token's text")
    return tokens
