# SPDX-License-Identifier: Apache-2.0
"""The model of lm-evaluation-harness: prompts, windows and answers as those of its own `hf`.

On the same weights, results are the same but for rounding.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    postprocess_generated_text,
)
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

import jpaged
from jpaged.engine import Engine
from jpaged.host.checks import at_least, checked, shown
from jpaged.host.config import EngineConfig
from jpaged.host.outputs import RequestOutput
from jpaged.host.params import SamplingParams
from jpaged.integrations.lm_harness.encoder import Encoder
from jpaged.integrations.lm_harness.generation_kwargs import KwargsReader
from jpaged.models.decoder import Decoder
from jpaged.placement import ModelPath
from jpaged.scoring import Score

logger = logging.getLogger(__name__)

# What others call an argument that there is under another name.
_OTHER_NAMES = {"pretrained": "model", "max_length": "max_model_len"}
_SETTINGS = tuple(field.name for field in dataclasses.fields(EngineConfig))


@register_model("jpaged")
class JpagedLM(TemplateLM):
    """A model for lm-evaluation-harness.

    All requests of a kind are given to the engine at once, which has as many run together as fit,
    and shares the pages of what they begin with.

    Attributes:
      engine: what answers.
      tokenizer: the engine's.
      max_length: the engine's max_model_len: most tokens that the model sees.
    """

    def __init__(
        self,
        model: ModelPath | Engine = "demo",
        *,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        seed: int = 1234,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ):
        """Loads a model, or takes an engine that there is.

        Args:
          model: as `Engine.load` takes it, or an engine.
          max_gen_toks: most tokens of an answer whose task does not say.
          prefix_token_id: what a text without a context is scored after; None takes the tokenizer's
            first token of a text, or else its last one, as the harness does.
          add_bos_token: whether prompts begin with the tokenizer's first token of a text; None does
            what the tokenizer does. What begins with it as text gets no second one.
          chat_template: the name of one of the model's templates, or the text of another.
          chat_template_kwargs: more variables for the template.
          enable_thinking: one of them, of that name.
          think_end_token: text that ends what an answer begins with and is not looked at; `until`
            of a task does not end an answer before it.
          seed: of samples; each draws what belongs to it, to its prompt, and to how often that came
            before.
          batch_size: not looked at, though the harness always gives it: see max_num_seqs.
          max_batch_size: likewise.
          device: likewise: jax chooses.
          **settings: of `EngineConfig`, where the model is no engine.

        Raises:
          ValueError: if an argument is none of these, or cannot be met.
        """
        super().__init__()
        for name in settings:
            if name not in _SETTINGS:
                raise ValueError(_unknown(name, settings[name]))
        if isinstance(model, Engine):
            if settings:
                name, value = next(iter(settings.items()))
                raise ValueError(
                    f"{name}={shown(value)} is for an engine that is made here: model is one "
                    "already, so give it to its EngineConfig"
                )
            self.engine = model
        else:
            self.engine = Engine.load(model, EngineConfig(**settings))
            if self.engine.config.strict_shapes:
                self.engine.warm_up(params=[SamplingParams(prompt_logprobs=1)])  # as scores need
        self._model = "an engine" if isinstance(model, Engine) else str(model)
        if self.engine.tokenizer is None:
            raise ValueError(
                f"model={shown(self._model)} has no tokenizer.json, and tasks are text: add the "
                "one that it was trained with"
            )
        self.tokenizer = self.engine.tokenizer
        longest = self.engine.model_config.max_position_embeddings
        self.max_length = self.engine.config.max_model_len or longest
        self.max_gen_toks = checked("max_gen_toks", max_gen_toks, int, at_least(1))
        self._think_end_token = checked("think_end_token", think_end_token, str | None)
        self._seed = checked("seed", seed, int)
        self._encoder = Encoder(self.tokenizer, self.engine, prefix_token_id, add_bos_token)
        if not isinstance(chat_template_kwargs, Mapping | None):
            raise ValueError(f"chat_template_kwargs={shown(chat_template_kwargs)} must be a dict")
        variables = dict(chat_template_kwargs or {})
        if checked("enable_thinking", enable_thinking, bool | None) is not None:
            variables["enable_thinking"] = enable_thinking
        self._chat = {"chat_template": chat_template, "chat_template_kwargs": variables}

    @property
    def eot_token_id(self) -> int | None:
        """What ends a text; None where the model does not say."""
        return self._encoder.eot

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is scored after."""
        return self._encoder.prefix

    @functools.cached_property
    def tokenizer_name(self) -> str:
        """For the harness's caches: names what texts of requests, and their tokens, depend on."""
        template = self.engine.chat_template
        parts = self.tokenizer.to_str(), template.templates, template.special_tokens, self._chat
        text = json.dumps(parts, sort_keys=True, default=repr)
        return f"jpaged-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model."""
        return {
            "model_num_parameters": Decoder(self.engine.model_config).num_params,
            "jpaged_model": self._model,
            "jpaged_version": jpaged.__version__,
            "jpaged_config": dataclasses.asdict(self.engine.config),
            "jax_version": jax.__version__,
            "jax_backend": jax.default_backend(),
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns a text's token ids; see `Encoder.encode`."""
        return self._encoder.encode(string, add_special_tokens)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Scores tokens: of each its texts, or None, then context and continuation."""
        pairs = [self._fitting(*request) for request in requests]

        def on_score(index: int, score: Score) -> None:
            if (texts := requests[index][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", texts, _answer_of(score))

        scores = self.engine.score_all(pairs, progress=not disable_tqdm, on_score=on_score)
        return [_answer_of(score) for score in scores]

    def _fitting(
        self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]
    ) -> tuple[list[int], list[int]]:
        """Context and continuation, of which the former loses its beginning if both are too long.

        The last token is predicted, and not seen.
        """
        if not continuation:
            assert texts is not None
            raise ValueError(
                f"the continuation {shown(texts[1])} adds no token to the context "
                f"{shown(texts[0])}: change doc_to_choice or target_delimiter of the task"
            )
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens exceeds max_model_len="
                f"{self.max_length}; raise it, or shorten the task's texts"
            )
        return self._end_of(context, room), continuation

    def _end_of(self, tokens: list[int], room: int) -> list[int]:
        if len(tokens) <= room:
            return tokens
        logger.warning(
            "a context of %d tokens loses its first %d: with what follows it must fit "
            "max_model_len=%d",
            *(len(tokens), len(tokens) - room, self.max_length),
        )
        return tokens[-room:]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts, each in windows as long as the model sees.

        Args:
          requests: instances of the harness, whose argument is a text.
          disable_tqdm: whether to show no progress bar.

        Returns:
          Of each text the log-probability, in nats.
        """
        owners, windows = [], []
        for owner, request in enumerate(requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(window)) for window in found]
            owners += [owner] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (logprob, _) in zip(owners, answers, strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answers prompts.

        Args:
          requests: instances of the harness, whose arguments are a text and generation_kwargs.
          disable_tqdm: whether to show no progress bar.

        Returns:
          The answers, cut before what ends them.

        Raises:
          ValueError: if generation_kwargs has what is not known, or cannot be met.
          RuntimeError: if the model gives what is no number; the message says where to look.
        """
        eot = self._encoder.eot
        eos = None if eot is None else self._encoder.text_of(eot)
        thinks = self._think_end_token is not None
        reader = KwargsReader(self.max_gen_toks, self._seed, eos, thinks)
        counts: collections.Counter[str] = collections.Counter()
        prompts, asked = [], []
        for request in requests:
            context, generation_kwargs = request.args
            own = reader.read(context, generation_kwargs, counts[context])
            counts[context] += 1
            assert own.params.max_tokens is not None
            room = self.max_length - own.params.max_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={own.params.max_tokens} leaves no room for a prompt in "
                    f"max_model_len={self.max_length}; lower it (--gen_kwargs max_gen_toks=...), "
                    "or raise max_model_len"
                )
            prompts.append(self._end_of(self.tok_encode(context) or [self.prefix_token_id], room))
            asked.append(own)
        answers: dict[int, str] = {}

        def on_output(index: int, output: RequestOutput) -> None:
            (completion,) = output.outputs
            if completion.error is not None:
                raise RuntimeError(f"request {output.request_id!r}: {completion.error}")
            # As the harness has them: of the answer's tokens alone, without what a tokenizer makes
            # of the same behind a prompt.
            text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            text = postprocess_generated_text(text, asked[index].until, self._think_end_token)
            answers[index] = text
            self.cache_hook.add_partial("generate_until", requests[index].args, text)

        params = [own.params for own in asked]
        self.engine.generate(prompts, params, progress=not disable_tqdm, on_output=on_output)
        return [answers[index] for index in range(len(prompts))]

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Returns the text that a conversation is for the model.

        Args:
          chat_history: the messages.
          add_generation_prompt: whether an answer begins behind them; else the last one goes on.

        Raises:
          ValueError: if the model has no template, or it refuses the conversation, also without
            messages of the system.
        """
        render = functools.partial(
            self.engine.chat_template.render,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._chat,
        )
        try:
            return render(chat_history)
        except ValueError as e:
            rest = [message for message in chat_history if message.get("role") != "system"]
            if len(rest) == len(chat_history):
                raise
            logger.warning("messages of the system are left out, as the template fails: %s", e)
            return render(rest)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template in use, which the harness notes; None where none is applied.

        Raises:
          ValueError: if another one is named: the harness does not tell `apply_chat_template`.
        """
        if not chat_template:
            return None
        own, templates = self._chat["chat_template"], self.engine.chat_template.templates
        if isinstance(chat_template, str) and chat_template != own:
            raise ValueError(
                f"apply_chat_template={shown(chat_template)} names a template, and "
                f"chat_template={shown(own)} is in use: give model_args chat_template="
                f"{chat_template}, one of {shown(sorted(templates))}, and --apply_chat_template "
                "the same or nothing"
            )
        return templates.get(own or "default", own)


def _answer_of(score: Score) -> tuple[float, bool]:
    return score.logprob, score.is_greedy


def _unknown(name: str, value: Any) -> str:
    if name in _OTHER_NAMES:
        return f"{name}={shown(value)}: give it as {_OTHER_NAMES[name]}={shown(value)}"
    return (
        f"{name}={shown(value)} is no argument of the model 'jpaged'; beside its own there are "
        f"those of EngineConfig: {', '.join(_SETTINGS)}"
    )
