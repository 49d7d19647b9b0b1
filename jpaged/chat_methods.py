# SPDX-License-Identifier: Apache-2.0
"""What an engine does with conversations: prompts made by a template, and then as any others."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import tokenizers

from jpaged.chat import ChatOptions, ChatTemplate
from jpaged.host.outputs import RequestOutput
from jpaged.host.params import DEFAULT_PARAMS, SamplingParams
from jpaged.messages import Conversation
from jpaged.requests import Prompt


class ChatMethods(abc.ABC):
    """Answers conversations, for who answers prompts.

    Attributes:
      tokenizer: None where prompts are token ids.
      chat_template: the model's.
    """

    tokenizer: tokenizers.Tokenizer | None
    chat_template: ChatTemplate

    @abc.abstractmethod
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT_PARAMS,
        *,
        progress: bool = False,
        on_step: Callable[[], object] = lambda: None,
        on_output: Callable[[int, RequestOutput], object] | None = None,
    ) -> list[RequestOutput]:
        """Answers prompts; see `Engine.generate`."""

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT_PARAMS,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        progress: bool = False,
        on_step: Callable[[], object] = lambda: None,
        on_output: Callable[[int, RequestOutput], object] | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """Answers a conversation, or several, by the model's chat template; see `generate`.

        Args:
          messages: a list of dicts with role and content, or a list of such lists.
          params: for all conversations, or one for each.
          tools: JSON schemas of functions that the answers may call; calls are text of the answers.
          progress: as in `generate`, like the next two.
          on_step: likewise.
          on_output: likewise.
          **options: see `chat.ChatOptions`.

        Returns:
          The outputs, one a conversation.

        Raises:
          ValueError: if a conversation, from 0, or one of its messages, from 0, cannot be served,
            or the template refuses it; then none has been started.
          GenerationInterrupted: on Ctrl-C; holds what was produced.
        """
        prompts = self.chat_template.prompts(self.tokenizer, messages, tools, options)
        return self.generate(
            prompts, params, progress=progress, on_step=on_step, on_output=on_output
        )

    def chat_prompt(
        self,
        messages: Conversation,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[int]:
        """Returns the token ids that a conversation is, for `stream` or `add_request`.

        The arguments are those of `chat`, and likewise what is raised.
        """
        return self.chat_template.prompt(self.tokenizer, messages, tools, options)
