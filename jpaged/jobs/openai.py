# SPDX-License-Identifier: Apache-2.0
"""Rows and records in the form of OpenAI's batches; plain prompts beside them.

A record depends on its row, the model, the parameters and the job's seed alone: its ids are hashes
of the custom_id, and `created` is 0.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers

from jpaged.chat import ChatOptions, ChatTemplate
from jpaged.host.checks import Rule, at_least, checked, shown
from jpaged.host.outputs import Completion, RequestOutput
from jpaged.host.params import SamplingParams
from jpaged.jobs.fields import PARAMETERS, checked_prompt, own_params
from jpaged.jobs.inputs import Line
from jpaged.jobs.rows import Result, Row
from jpaged.models.json_fields import FieldPolicy

_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_FIELDS = ("custom_id", "method", "url", "body")
_CONVERSATION = ("messages", "tools", "documents", "chat_template_kwargs", "continue_final_message")
_MARK = "\N{REPLACEMENT CHARACTER}"
# JSON has no infinity; others write this for a token that cannot come.
_LEAST = -9999.0
_COUNT = at_least(1)
_TOP = (Rule("between 0 and 20", lambda count: 0 <= count <= 20),)

# Who asks, and where it is kept, changes no answer.
_INERT = (
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "stream_options",
)
_POLICIES = {
    _TEXT: FieldPolicy(
        read=("prompt", *PARAMETERS),
        neutral={"stream": (False,), "echo": (False,), "suffix": ()},
        inert=_INERT,
    ),
    _CHAT: FieldPolicy(
        read=(*_CONVERSATION, "max_completion_tokens", "top_logprobs", *PARAMETERS),
        neutral={
            "stream": (False,),
            "tool_choice": ("auto",),
            "parallel_tool_calls": (True,),
            "response_format": ({"type": "text"},),
            "modalities": (["text"],),
            "functions": (),
            "function_call": (),
            "audio": (),
            "prediction": (),
            "add_generation_prompt": (True,),
        },
        inert=_INERT,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowReader:
    """Makes rows of lines.

    Attributes:
      params: what counts where a row has nothing else.
      tokenizer: the model's.
      template: the model's, for conversations.
      options: for the template, where a row has nothing else.
      complete: adds to a row's parameters what neither it nor the model says.
    """

    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    tokenizer: tokenizers.Tokenizer | None = None
    template: ChatTemplate = dataclasses.field(default_factory=lambda: ChatTemplate({}))
    options: ChatOptions = dataclasses.field(default_factory=lambda: ChatOptions())
    complete: Callable[[SamplingParams], SamplingParams] = lambda params: params

    def row(self, line: Line) -> Row:
        """The row that a line is; one with an error where something is wrong with it."""
        row = Row(row_id=line.row_id, where=line.where)
        try:
            if line.error is not None:
                raise ValueError(line.error)
            value: Mapping[str, Any] = line.value
            read = self._request if "body" in value or "url" in value else self._plain
            return read(row, value)
        except ValueError as e:
            return dataclasses.replace(row, error=str(e))

    def _plain(self, row: Row, value: Mapping[str, Any]) -> Row:
        if ("prompt" in value) == ("messages" in value):
            raise ValueError(
                f"{shown(value)} must have either a prompt or messages, such as "
                '{"prompt": "Hello"}, or be a request with method, url and body'
            )
        if "messages" in value:
            own = own_params(value, ("custom_id", *_CONVERSATION), self.params)
            return self._chat(row, value, own)
        own = own_params(value, ("custom_id", "prompt"), self.params)
        return self._text(row, value["prompt"], own)

    def _request(self, row: Row, value: Mapping[str, Any]) -> Row:
        if unknown := [name for name in value if name not in _FIELDS]:
            raise ValueError(
                f"unknown field {shown(unknown[0])}; a request has {', '.join(_FIELDS)}"
            )
        if value.get("method") not in (None, "POST"):
            raise ValueError(f"method={shown(value['method'])} must be 'POST'")
        url, body = value.get("url"), value.get("body")
        if not isinstance(url, str) or url not in _POLICIES:
            raise ValueError(f"url={shown(url)} must be {_CHAT!r} or {_TEXT!r}")
        if not isinstance(body, dict):
            raise ValueError(f"body={shown(body)} must be a JSON object")
        model = checked("model", body.get("model"), str | None)
        row = dataclasses.replace(row, model=model or "")
        policy = _POLICIES[url]
        if refused := policy.refused(body):
            name, supported = next(iter(refused.items()))
            raise ValueError(f"{name}={shown(body[name])} is not supported, only {supported}")
        for name in body:
            if name not in (*policy.read, *policy.neutral, *policy.inert):
                raise ValueError(f"unknown field {shown(name)} of the body for {url}")
        fields = {name: body[name] for name in PARAMETERS if name in body}
        if url == _CHAT:
            fields |= _chat_parameters(body)
        own = own_params(fields, (), self.params)
        if url == _CHAT:
            return self._chat(row, body, own)
        if "prompt" not in body:
            raise ValueError("prompt is missing; give text or token ids")
        return self._text(row, body["prompt"], own)

    def _text(self, row: Row, prompt: Any, params: SamplingParams) -> Row:
        prompt = checked_prompt(prompt)
        return dataclasses.replace(row, prompt=prompt, params=self.complete(params))

    def _chat(self, row: Row, value: Mapping[str, Any], params: SamplingParams) -> Row:
        if "messages" not in value:
            raise ValueError("messages is missing; give a list of messages")
        options: Any = {
            **self.options,
            **{name: value[name] for name in _CONVERSATION[2:] if value.get(name) is not None},
        }
        ids = self.template.prompt(self.tokenizer, value["messages"], value.get("tools"), options)
        return dataclasses.replace(row, prompt=ids, params=self.complete(params), kind="chat")


def _chat_parameters(body: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that conversations have other names, or other values, for."""
    most = checked("max_completion_tokens", body.get("max_completion_tokens"), int | None, _COUNT)
    found: dict[str, Any] = {} if most is None else {"max_tokens": most}
    wanted = checked("logprobs", body.get("logprobs"), bool | None)
    top = checked("top_logprobs", body.get("top_logprobs"), int | None, _TOP)
    if top is not None and not wanted:
        raise ValueError(f"top_logprobs={top} needs logprobs=true")
    if "logprobs" in body:
        found["logprobs"] = (top or 0) if wanted else None
    return found


@dataclasses.dataclass(frozen=True)
class RecordMaker:
    """Makes records of results.

    Attributes:
      tokenizer: the model's; without one, records have token ids beside the text, which is empty.
      model: the name of the model for rows that give none.
    """

    tokenizer: tokenizers.Tokenizer | None
    model: str

    def record(self, result: Result) -> dict[str, Any]:
        """The record of a row, as JSON has it.

        Returns:
          Of a row that was served, a response as that of OpenAI's batches with status 200; of one
          that was not, an error with the code "invalid_row" where the row is wrong, or
          "generation_failed", and a message that names line and field.
        """
        row, output, error = result
        code = hashlib.blake2b(row.row_id.encode(), digest_size=12).hexdigest()
        record: dict[str, Any] = {"id": f"batch_req_{code}", "custom_id": row.row_id}
        if error is not None or output is None:
            kind = "invalid_row" if output is None else "generation_failed"
            where = f"{row.where}: " if row.where else ""
            message = " ".join(f"{where}{error}".split())
            return record | {"response": None, "error": {"code": kind, "message": message}}
        body = self._chat(row, output) if row.kind == "chat" else self._text(row, output)
        prefix = "chatcmpl" if row.kind == "chat" else "cmpl"
        num_prompt = len(output.prompt_token_ids)
        num_generated = sum(len(completion.token_ids) for completion in output.outputs)
        usage = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
        }
        head = {"id": f"{prefix}-{code}", "created": 0, "model": row.model or self.model}
        if output.prompt_logprobs is not None:  # as vLLM has it, which OpenAI has not
            body |= {"prompt_logprobs": output.prompt_logprobs}
        response = {
            "status_code": 200,
            "request_id": f"req_{code}",
            "body": head | body | {"usage": usage},
        }
        return record | {"response": response, "error": None}

    def _chat(self, row: Row, output: RequestOutput) -> dict[str, Any]:
        choices = [
            self._choice(index, completion)
            | {
                "message": {"role": "assistant", "content": completion.text},
                "logprobs": self._chat_logprobs(completion, row.params.logprobs or 0),
            }
            for index, completion in enumerate(output.outputs)
        ]
        return {"object": "chat.completion", "choices": choices}

    def _text(self, row: Row, output: RequestOutput) -> dict[str, Any]:
        choices = [
            self._choice(index, completion)
            | {"text": completion.text, "logprobs": self._text_logprobs(completion)}
            for index, completion in enumerate(output.outputs)
        ]
        return {"object": "text_completion", "choices": choices}

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        choice = {"index": index, "finish_reason": completion.finish_reason}
        if self.tokenizer is None:
            choice["token_ids"] = completion.token_ids
        return choice

    def _chat_logprobs(self, completion: Completion, top: int) -> dict[str, Any] | None:
        """Of each token its own, and the `top` likeliest, among which it need not be."""
        if completion.logprobs is None:
            return None
        content: list[dict[str, Any]] = []
        for token, values in zip(completion.token_ids, completion.logprobs, strict=True):
            chosen = self._entry(token, values.get(token, math.nan))
            likeliest = sorted(values.items(), key=lambda pair: -pair[1])[:top]
            content.append(chosen | {"top_logprobs": [self._entry(*pair) for pair in likeliest]})
        return {"content": content}

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        text = self._name(token)
        return {"token": text, "logprob": _finite(value), "bytes": list(text.encode())}

    def _text_logprobs(self, completion: Completion) -> dict[str, Any] | None:
        if completion.logprobs is None:
            return None
        names = [self._name(token) for token in completion.token_ids]
        pairs = list(zip(completion.token_ids, completion.logprobs, strict=True))
        offsets = [0]
        for name in names:
            offsets.append(offsets[-1] + len(name))
        return {
            "tokens": names,
            "token_logprobs": [_finite(values.get(token, math.nan)) for token, values in pairs],
            "top_logprobs": [
                {self._name(i): _finite(value) for i, value in values.items()}
                for _, values in pairs
            ],
            "text_offset": offsets[:-1],
        }

    def _name(self, token: int) -> str:
        """A token as text; of what is a part of a character, the tokenizer's name."""
        if self.tokenizer is None:
            return str(token)
        text = self.tokenizer.decode([token], skip_special_tokens=False)
        if not text or _MARK in text:
            text = self.tokenizer.id_to_token(token) or str(token)
        return text


def encode_record(record: Mapping[str, Any]) -> bytes:
    """A record as a line."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode() + b"\n"


def _finite(value: float) -> float:
    return max(value, _LEAST) if value == value else _LEAST
