# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, text out; the one owner of the host's state."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import tokenizers

from jpaged.chat import ChatTemplate
from jpaged.chat_methods import ChatMethods
from jpaged.defaults import model_defaults
from jpaged.device.compilation_cache import keep_programs
from jpaged.device.compile_threads import CompileThreads
from jpaged.device.costs import scheduler_config_of
from jpaged.device.memory import default_dtype
from jpaged.host.batch import ShapeBuckets, StepShape
from jpaged.host.checks import instance_of
from jpaged.host.config import EngineConfig, engine_config
from jpaged.host.outputs import Completion, RequestOutput
from jpaged.host.page_pool import PagePool
from jpaged.host.page_table import PageTable
from jpaged.host.params import DEFAULT_PARAMS, SamplingParams
from jpaged.host.scheduler import Scheduler
from jpaged.host.stats import Counters, EngineStats
from jpaged.host.viewer import PoolSnapshot
from jpaged.host.warm_up import WarmUpPlan, asked_by, warm_up_plan
from jpaged.live import LiveRequests
from jpaged.logs import open_logs
from jpaged.models.checkpoint import check_params
from jpaged.models.config import ModelConfig
from jpaged.models.generation_config import GenerationConfig
from jpaged.pallas_kernels.dispatch import resolve_backend
from jpaged.pipeline import Pipeline
from jpaged.placement import ModelPath, pool_of, read_model, runner_of
from jpaged.prefix_methods import PrefixMethods, open_prompt_cache
from jpaged.requests import Prompt, RequestMaker
from jpaged.results import ResultReader
from jpaged.scoring import MakeRequests, ScoreMethods
from jpaged.streams import RequestStream

logger = logging.getLogger(__name__)


class Engine(ChatMethods, ScoreMethods, PrefixMethods):
    """Generates for many requests at once over one page pool.

    Outputs go to whom their request belongs, whoever runs the step: `stream` and `generate` have
    their own, `step` returns those of `add_request` and `fork`, in any interleaving.

    Whatever interrupts a call, Ctrl-C or an error of the device, the next one finds an engine that
    serves: live requests were aborted, which their owners are told. If the device serves no more,
    every call says so (`recovery.EngineDeadError`). An engine serves one call at a time: threads
    may share one behind a lock of theirs, and a second call meanwhile raises RuntimeError.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        params: Any,
        config: EngineConfig | None = None,
        tokenizer: tokenizers.Tokenizer | None = None,
        generation_config: GenerationConfig | None = None,
        chat_template: ChatTemplate | None = None,
        ahead: CompileThreads | None = None,
    ):
        """Allocates the page pool around a model that is in memory; see `load` for one on disk.

        Args:
          model_config: the model's shape.
          params: the parameter tree of `models.decoder.Decoder(model_config)`, stacked or not. Of
            one that is not stacked, projections are merged on CPUs and GPUs, which are copies.
          config: the engine's settings.
          tokenizer: None serves prompts given as token ids.
          generation_config: defaults of `SamplingParams`; None has none.
          chat_template: for `chat`; None has none.
          ahead: what compiles its first steps, as `load` has it.

        Raises:
          ValueError: if a setting cannot be met, or the parameters are not this model's; the
            message has the value and the limit.
        """
        config = engine_config(config)
        keep_programs(config.compilation_cache_dir)
        instance_of("model_config", model_config, ModelConfig)
        check_params(model_config, params)
        if tokenizer is not None:
            instance_of("tokenizer", tokenizer, tokenizers.Tokenizer)
        chat_template = chat_template or ChatTemplate({})
        self.chat_template = instance_of("chat_template", chat_template, ChatTemplate)
        backend = resolve_backend(config.backend)
        self.defaults = model_defaults(generation_config, model_config.vocab_size)
        plan = ahead.plan if ahead is not None else pool_of(config, model_config, backend)
        logger.info("page pool: %s", plan)
        self.model_config = model_config
        self.config = config
        self.tokenizer = tokenizer
        self._plan = plan
        self._scheduler_config = scheduler_config_of(config, model_config, plan)
        self._buckets = ShapeBuckets.of(config)
        self._log, self._recorder = open_logs(config, self._scheduler_config, plan)
        self._runner = runner_of(
            config, model_config, params, plan, tokenizer,
            backend=backend, num_host_pages=self._scheduler_config.num_host_pages, ahead=ahead,
        )  # fmt: skip
        self._prompts = open_prompt_cache(config, model_config, plan, self._runner, backend)
        self._totals, self._warm = Counters(), WarmUpPlan()
        self._live = LiveRequests(self._new_pipeline, self._runner.recover)
        if config.strict_shapes:
            self.warm_up()

    def _new_pipeline(self) -> Pipeline:
        """Makes an empty pool, page table and queues, and what holds requests against them."""
        plan, config, tokenizer = self._plan, self._scheduler_config, self.tokenizer
        pool, page_size = PagePool(plan.num_pages), self.config.page_size
        table = PageTable(pool, page_size, plan.pages_per_seq, plan.kinds)
        scheduler = Scheduler(config, table, self._prompts)
        model = self.model_config, tokenizer, config, table, self.defaults
        self._maker = RequestMaker(*model, self._check_planned)
        dtype, eos = default_dtype(self.config).name, self.model_config.eos_token_ids
        results = ResultReader(scheduler, tokenizer, eos, self._totals, dtype)
        logs = self._log, self._recorder
        return Pipeline(scheduler, results, self._runner, self._buckets, *logs, self._prompts)

    @classmethod
    def load(
        cls,
        model_path: ModelPath,
        config: EngineConfig | None = None,
        compile_first: Callable[[], CompileThreads] | None = None,
    ) -> "Engine":
        """Makes an engine for a model directory, Hugging Face's or our own, or a GGUF file.

        Args:
          model_path: holds config.json, weights (safetensors or Orbax) and maybe tokenizer.json;
            or a GGUF file, or its path; or a model's name on the Hugging Face hub, "org/name",
            where no such path exists; or the address of an Orbax checkpoint in a bucket, as
            gs://bucket/model; "demo" is the shipped checkpoint. Or a `placement.ModelFiles`.
          config: the engine's settings.
          compile_first: begins to compile steps; see `placement.compile_ahead`.

        Returns:
          An engine; its tokenizer is None where the model has none.

        Raises:
          FileNotFoundError: if the directory or something in it is missing, or cannot be had.
          ValueError: if the model is not supported, damaged, or does not fit the settings.
        """
        read = read_model(model_path, engine_config(config), compile_first)
        model_config, params, tokenizer, defaults, template, ahead = read
        return cls(model_config, params, config, tokenizer, defaults, template, ahead)

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do, or outputs to return."""
        self._live.enter(reads=True)
        return bool(self._live.by_id or self._live.outbox)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT_PARAMS,
        *,
        progress: bool = False,
        on_step: Callable[[], object] = lambda: None,
        on_output: Callable[[int, RequestOutput], object] | None = None,
    ) -> list[RequestOutput]:
        """Answers all prompts, as many at once as fit, beside other requests that are live.

        Args:
          prompts: texts, or lists of token ids.
          params: for all, or one for each prompt.
          progress: whether to show a progress bar on standard error.
          on_step: called after each step, for instance to look at `stats` or `pool_snapshot`.
          on_output: called with a prompt's index and its output, once, when it has ended.

        Returns:
          The outputs, in the order of the prompts.

        Raises:
          ValueError: if a prompt cannot be served; then none has been started.
          GenerationInterrupted: on Ctrl-C; holds what was produced.
        """
        return self._answer(
            lambda maker, ids: maker.make_all(prompts, params, ids), progress, on_step, on_output
        )

    def _answer(self, make: MakeRequests, *watched: Any) -> list[RequestOutput]:
        """Makes requests and runs them; `watched` are the other arguments of `Generation`."""
        self._live.enter()
        requests = make(self._maker, iter(self._live.next_id, None))
        return self._live.run(requests, self.stats, *watched)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        on_step: Callable[[], object] = lambda: None,
    ) -> RequestStream:
        """Answers one prompt; the stream yields its output each time it has grown.

        The request is checked and queued at once. Closing or forgetting the stream aborts it.

        Args:
          prompt: text, or token ids.
          params: how to sample and when to stop.
          on_step: called after each step that the stream runs, as in `generate`.

        Raises:
          ValueError: if the prompt or the parameters cannot be served; nothing has changed then.
        """
        self._live.enter()
        request = self._maker.make(prompt, params, self._live.next_id(), stream=True)
        stream = RequestStream(request, self._live.abandoned, self._live.drive, on_step)
        self._live.add([request], stream.owner)
        return stream

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        stream: bool = False,
        cache_salt: str | None = None,
        resume: Sequence[Completion] = (),
    ) -> str:
        """Queues a request for the coming steps, which `step` reports.

        Args:
          prompt: text, or token ids.
          params: how to sample and when to stop.
          request_id: a name of the caller's, unique among requests that are live or whose last
            output `step` has not returned; None makes one.
          stream: whether `step` reports the request each time it has grown, not only at its end.
          cache_salt: requests with equal salts use each other's pages where their prompts begin
            alike; others do not.
          resume: what `progress` said of an equal request with an equal seed, of this engine or one
            like it: its tokens are computed together, and then it goes on as that one would have.

        Returns:
          The request's id.

        Raises:
          ValueError: if the prompt or the parameters cannot be served; nothing has changed then.
        """
        self._live.enter()
        if request_id is None:
            request_id = self._live.next_id()
        options: Any = {"stream": stream, "cache_salt": cache_salt, "resume": resume}
        request = self._maker.make(prompt, params, request_id, **options)
        if request.request_id in self._live.by_id or request.request_id in self._live.outbox:
            raise ValueError(f"request_id={request_id!r} is in use by a live request")
        self._live.add([request], None)
        return request.request_id

    def fork(
        self,
        request_id: str,
        k: int = 1,
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
    ) -> list[str]:
        """Starts `k` requests that go on from where a live one is, on the same pages.

        Nothing is copied until one of them writes to a page that others use too. The fork knows
        the tokens that `step` has read so far; its own are drawn with other random bits. It is as
        old as the request, and overtakes nobody: if a request waits that comes before it, by
        priority and then by age, or places or pages lack, it waits too, and finds what it knows in
        the prefix cache, or computes it. Its tokens are the same.

        Args:
          request_id: a live request with one sample.
          k: how many.
          params: for the forks, priority and all; None takes those of the request. `max_tokens`
            counts from the end of the prompt, and a seed is varied from fork to fork.
          stream: as in `add_request`.

        Returns:
          The ids of the forks: requests like others, with the same prompt, which report the tokens
          from before the fork too.

        Raises:
          KeyError: if no live request has this id.
          ValueError: if the request cannot be forked; nothing has changed then.
        """
        self._live.enter()
        parent = self._live.get(request_id)
        ids = iter(self._live.next_id, None)
        forks = self._maker.fork(parent, k, ids, params, stream=stream)
        self._live.fork(parent, forks)
        return [child.request_id for child in forks]

    def step(self) -> list[RequestOutput]:
        """Runs one step: dispatches the next, then reads the samples of the one before.

        Returns:
          Of the requests of `add_request` and `fork`, those that ended and those with `stream=True`
          that have grown, in steps that others ran too; none if there is nothing to do.

        Raises:
          BaseException: whatever interrupts it, Ctrl-C too; every live request has been aborted
            then, and the next call reports so.
        """
        self._live.enter()
        self._live.drive()
        outputs = list(self._live.outbox.values())
        self._live.outbox = {}  # no call: no interrupt comes between, and loses them
        return outputs

    def abort(self, request_id: str) -> RequestOutput:
        """Ends a live request now.

        Returns:
          What it has produced, which its stream yields too; if it has ended and `step` did not say
          so yet, its last output.

        Raises:
          KeyError: if no live request has this id.
        """
        self._live.enter()
        if isinstance(request_id, str) and request_id in self._live.outbox:
            request = self._live.by_id.get(request_id)
        else:
            request = self._live.get(request_id)
        if request is not None:
            owner = self._live.owners.get(request_id)
            self._live.abort(request)
            if owner is not None:
                return owner.mailbox[request_id]
        output = self._live.outbox[request_id]
        del self._live.outbox[request_id]
        return output

    def progress(self, request_id: str) -> list[Completion]:
        """What a live request's samples have come to, for `add_request(resume=...)`; no beams."""
        self._live.enter()
        return self._live.progress(request_id)

    def warm_up(
        self,
        shapes: Sequence[StepShape] | None = None,
        num_logprobs: int = 0,
        params: Sequence[SamplingParams] = (),
    ) -> None:
        """Compiles steps ahead of need; compilations after it are logged with their shape.

        Args:
          shapes: the steps to compile; None takes all that this engine can run.
          num_logprobs: also compile the reports of up to this many likeliest tokens.
          params: also compile what such requests need beside tokens, whichever of them share a
            step: log-probabilities, the choice of beams, what changes logits (penalties, biases,
            forbidden tokens). With `EngineConfig.strict_shapes` others are refused. What calls
            before named is compiled for all shapes so far, and what the model asks for itself.

        Raises:
          ValueError: if an argument is none of these; nothing has changed then.
        """
        self._live.enter()
        model = self.model_config.vocab_size, self.model_config.eos_token_ids, self.defaults.params
        asked = self._plan.max_model_len, shapes, num_logprobs, params
        plan = self._warm | warm_up_plan(self._buckets, *model, *asked)
        with self._live.change:
            self._runner.warm_up(plan)
            self._warm = plan

    def _check_planned(self, params: SamplingParams) -> None:
        """Raises ValueError if strict_shapes has nothing compiled for parameters that can be."""
        if self.config.strict_shapes and (params.beam_width or 1) <= self._buckets.max_beams:
            model = self.model_config.vocab_size, self.model_config.eos_token_ids
            self._warm.check(params, asked_by([params], *model, self._plan.max_model_len))

    def stats(self) -> EngineStats:
        """Returns a reading of the pool, the queues and the totals; it does not change later."""
        self._live.enter(reads=True)
        return EngineStats.read(
            self._live.pipeline.scheduler,
            self._totals,
            page_bytes=self._plan.page_bytes,
            num_compilations=self._runner.programs.num_compilations,
            num_unplanned_compilations=self._runner.num_unplanned_compilations,
        )

    def pool_snapshot(self) -> PoolSnapshot:
        """Returns for each page its owners ("request_id#sample") and fill. Cost: every page."""
        self._live.enter()
        return PoolSnapshot.of_requests(self._live.pipeline.table, self._live.by_id.values())

    def reset_stats(self) -> None:
        """Starts the totals of `stats` again, for instance after a warm-up run."""
        self._live.enter()
        self._totals.reset()

    def check_invariants(self) -> None:
        """Raises AssertionError if pages are lost or held twice. Cost: every page; for tests."""
        self._live.enter()
        self._live.check_invariants()
