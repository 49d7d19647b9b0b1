# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, text out; the one owner of the host's state."""

import collections
import contextlib
import itertools
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import tokenizers

from jpaged.chat import ChatOptions, ChatTemplate
from jpaged.defaults import model_defaults
from jpaged.device.costs import scheduler_config_of
from jpaged.device.memory import default_dtype, plan_pool
from jpaged.device.runner import StepResult
from jpaged.host.batch import Batch, ShapeBuckets, StepShape, build_batch, warm_up_plan
from jpaged.host.checks import instance_of, shown
from jpaged.host.config import EngineConfig, engine_config
from jpaged.host.outputs import GenerationInterrupted, Mailbox, RequestOutput
from jpaged.host.page_pool import PagePool
from jpaged.host.page_table import PageTable
from jpaged.host.params import SamplingParams
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import Request
from jpaged.host.stats import Counters, EngineStats
from jpaged.host.step import StepPlan
from jpaged.host.step_builder import ScheduledStep
from jpaged.host.viewer import PoolSnapshot
from jpaged.messages import Conversation
from jpaged.models.checkpoint import check_params
from jpaged.models.config import ModelConfig
from jpaged.models.generation_config import GenerationConfig
from jpaged.pallas_kernels.dispatch import resolve_backend
from jpaged.placement import read_model, runner_of
from jpaged.recovery import Change
from jpaged.requests import Prompt, RequestMaker
from jpaged.results import ResultReader
from jpaged.streams import Generation, Owner, RequestStream

logger = logging.getLogger(__name__)


class Engine:
    """Generates for many requests at once over one page pool.

    `step` keeps the device one step ahead: it schedules and dispatches the next step before it
    reads the samples of the one before. A sequence that a sample ends may therefore compute one
    token too many, which is dropped.

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
    ):
        """Allocates the page pool around a model that is in memory; see `load` for one on disk.

        Args:
          model_config: the model's shape.
          params: the unstacked parameter tree of `models.decoder.Decoder(model_config)`.
          config: the engine's settings.
          tokenizer: None serves prompts given as token ids.
          generation_config: defaults of `SamplingParams`; None has none.
          chat_template: for `chat`; None has none.

        Raises:
          ValueError: if a setting cannot be met, or the parameters are not this model's; the
            message has the value and the limit.
        """
        config = engine_config(config)
        instance_of("model_config", model_config, ModelConfig)
        check_params(model_config, params)
        if tokenizer is not None:
            instance_of("tokenizer", tokenizer, tokenizers.Tokenizer)
        chat_template = chat_template or ChatTemplate({})
        self.chat_template = instance_of("chat_template", chat_template, ChatTemplate)
        backend = resolve_backend(config.backend)
        self.defaults = model_defaults(generation_config, model_config.vocab_size)
        plan = plan_pool(config, model_config, backend)
        logger.info("page pool: %s", plan)
        self.model_config = model_config
        self.config = config
        self.tokenizer = tokenizer
        self._plan = plan
        self._scheduler_config = scheduler_config_of(config, model_config, plan)
        self._buckets = ShapeBuckets(
            config.max_num_batched_tokens, config.max_num_seqs, single=config.deterministic
        )
        num_host_pages = self._scheduler_config.num_host_pages
        self._runner = runner_of(
            config, model_config, params, plan, backend=backend, num_host_pages=num_host_pages
        )
        self._requests: dict[str, Request] = {}
        self._request_counter = itertools.count()
        self._totals = Counters()
        self._change = Change()
        # What `step` is to return.
        self._outbox: Mailbox = {}
        # Of consumers that went; what is live of their requests is still to be aborted.
        self._abandoned: collections.deque[Owner] = collections.deque()
        self._make_host_state()

    def _make_host_state(self) -> None:
        """Makes an empty pool, page table and queues, and forgets the steps before."""
        # A step that is scheduled but not dispatched, and one that is dispatched but not read.
        self._planned: tuple[ScheduledStep, Batch] | None = None
        self._inflight: tuple[ScheduledStep, StepResult] | None = None
        plan, config, tokenizer = self._plan, self._scheduler_config, self.tokenizer
        self._table = PageTable(PagePool(plan.num_pages), self.config.page_size, plan.pages_per_seq)
        self._scheduler = Scheduler(config, self._table)
        self._maker = RequestMaker(self.model_config, tokenizer, config, self._table, self.defaults)
        self._results = ResultReader(
            self._scheduler,
            tokenizer,
            self.model_config.eos_token_ids,
            self._totals,
            default_dtype(self.config).name,
        )

    @classmethod
    def load(cls, model_path: str | pathlib.Path, config: EngineConfig | None = None) -> "Engine":
        """Makes an engine for a model directory, Hugging Face's or our own.

        Args:
          model_path: holds config.json, weights (safetensors or Orbax) and maybe tokenizer.json;
            or a model's name on the Hugging Face hub, "org/name", where no such path exists; "demo"
            is the shipped checkpoint.
          config: the engine's settings.

        Returns:
          An engine; its tokenizer is None where the directory has none.

        Raises:
          FileNotFoundError: if the directory or something in it is missing, or cannot be had.
          ValueError: if the model is not supported, damaged, or does not fit the settings.
        """
        config = engine_config(config)
        model_config, params, tokenizer, defaults, template = read_model(model_path, config)
        return cls(model_config, params, config, tokenizer, defaults, template)

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do, or outputs to return."""
        self._enter(reads=True)
        return bool(self._requests or self._outbox)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
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
        self._enter()
        requests = self._maker.make_all(prompts, params, iter(self._next_request_id, None))
        generation = Generation(requests, self._abandoned, progress, on_step, on_output)
        try:
            with self._change.held():
                self._add(requests, generation.mailbox)
                return generation.run(self._drive, self.stats)
        except BaseException as e:
            done = generation.close()
            if not isinstance(e, KeyboardInterrupt):
                raise
            self._repair()
            outputs = [done.get(r.request_id) or self._results.partial(r) for r in requests]
            raise GenerationInterrupted(outputs) from None

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams],
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

    def stream(self, prompt: Prompt, params: SamplingParams) -> RequestStream:
        """Answers one prompt; the stream yields its output each time it has grown.

        The request is checked and queued at once. Closing or forgetting the stream aborts it.

        Raises:
          ValueError: if the prompt or the parameters cannot be served; nothing has changed then.
        """
        self._enter()
        request = self._maker.make(prompt, params, self._next_request_id(), stream=True)
        stream = RequestStream(request, self._abandoned, self._drive)
        self._add([request], stream.mailbox)
        return stream

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        stream: bool = False,
        cache_salt: str | None = None,
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

        Returns:
          The request's id.

        Raises:
          ValueError: if the prompt or the parameters cannot be served; nothing has changed then.
        """
        self._enter()
        if request_id is None:
            request_id = self._next_request_id()
        request = self._maker.make(prompt, params, request_id, stream=stream, cache_salt=cache_salt)
        if request.request_id in self._requests or request.request_id in self._outbox:
            raise ValueError(f"request_id={request_id!r} is in use by a live request")
        self._add([request], None)
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
        the tokens that `step` has read so far; its own are drawn with other random bits.

        Args:
          request_id: a live request with one sample.
          k: how many.
          params: for the forks; None takes those of the request. `max_tokens` counts from the end
            of the prompt, and a seed is varied from fork to fork.
          stream: as in `add_request`.

        Returns:
          The ids of the forks: requests like others, with the same prompt, which report the tokens
          from before the fork too.

        Raises:
          KeyError: if no live request has this id.
          ValueError: if the request cannot be forked; nothing has changed then.
        """
        self._enter()
        parent = self._live(request_id)
        ids = iter(self._next_request_id, None)
        forks = self._maker.fork(parent, k, ids, params, stream=stream)
        source = parent.sequences[0]
        texts = [self._results.forked_text(source, child.sequences[0]) for child in forks]
        with self._change:
            # Each is put right behind the parent.
            for child, text in zip(reversed(forks), reversed(texts), strict=True):
                self._results.add_text(child.sequences[0], text)
                self._scheduler.fork(parent, child)
                self._requests[child.request_id] = child
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
        self._enter()
        self._drive()
        outputs = list(self._outbox.values())
        self._outbox = {}  # no call: no interrupt comes between, and loses them
        return outputs

    def _step(self) -> list[RequestOutput]:
        previous, self._inflight = self._inflight, None
        if previous is None:
            self._results.start_clock()
        planned, self._planned = self._planned or self._plan_step(), None
        assert planned or previous, "requests are live, but nothing is scheduled"
        if planned and previous and not self._runner.is_compiled(planned[1]):
            # Samples that are there already do not wait for a compilation.
            self._planned = planned
        elif planned:
            step, batch = planned
            self._swap(step.plan)
            self._inflight = step, self._runner.run(batch, step.plan.copies)
            self._results.skip(self._inflight[1].compile_s, overlapped=previous is not None)
        return self._results.read(*previous) if previous else []

    def abort(self, request_id: str) -> RequestOutput:
        """Ends a live request now.

        Returns:
          What it has produced, which its stream yields too; if it has ended and `step` did not say
          so yet, its last output.

        Raises:
          KeyError: if no live request has this id.
        """
        self._enter()
        if isinstance(request_id, str) and request_id in self._outbox:
            request = self._requests.get(request_id)
        else:
            request = self._live(request_id)
        if request is not None:
            self._abort(request)
            if request.mailbox is not None:
                return request.mailbox[request_id]
        output = self._outbox[request_id]
        del self._outbox[request_id]
        return output

    def reset_prefix_cache(self) -> None:
        """Forgets all pages that are kept for their content, for instance after new weights.

        Raises:
          RuntimeError: if requests are live that use such pages.
        """
        self._enter()
        self._scheduler.cache.check_unused()
        with self._change:
            self._scheduler.cache.clear()

    def warm_up(
        self,
        shapes: Sequence[StepShape] | None = None,
        num_logprobs: int = 0,
        searches: Sequence[SamplingParams] = (),
    ) -> None:
        """Compiles steps ahead of need; compilations after it are logged with their shape.

        Args:
          shapes: the steps to compile; None takes all that this engine can run.
          num_logprobs: also compile the report of this many likeliest tokens, for requests that set
            `SamplingParams.logprobs`.
          searches: also compile the choice of beams for parameters like these. What changes logits
            (a repetition penalty, for instance) is compiled if the model or one of these asks.

        Raises:
          ValueError: if an argument is none of these; nothing has changed then.
        """
        self._enter()
        model = self.model_config.vocab_size, self.model_config.eos_token_ids
        asked = self.defaults.params, shapes, num_logprobs, searches
        plan = warm_up_plan(self._buckets, *model, *asked)
        with self._change:
            self._runner.warm_up(**plan)

    def stats(self) -> EngineStats:
        """Returns a reading of the pool, the queues and the totals; it does not change later."""
        self._enter(reads=True)
        return EngineStats.read(
            self._scheduler,
            self._totals,
            page_bytes=self._plan.page_bytes,
            num_compilations=self._runner.num_compilations,
            num_unplanned_compilations=self._runner.num_unplanned_compilations,
        )

    def pool_snapshot(self) -> PoolSnapshot:
        """Returns for each page its owners ("request_id#sample") and fill. Cost: every page."""
        self._enter()
        return PoolSnapshot.of_requests(self._table, self._requests.values())

    def reset_stats(self) -> None:
        """Starts the totals of `stats` again, for instance after a warm-up run."""
        self._enter()
        self._totals = self._results.totals = Counters()

    def check_invariants(self) -> None:
        """Raises AssertionError if pages are lost or held twice. Cost: every page; for tests."""
        self._enter()
        self._scheduler.check_invariants()
        self._scheduler.cache.check_roots(r.cache_root for r in self._requests.values())
        if not self._requests:
            assert self._table.pool.num_used_pages == 0, "an idle engine holds pages"

    def _next_request_id(self) -> str:
        known = self._requests, self._outbox
        return next(i for i in map(str, self._request_counter) if not any(i in k for k in known))

    def _live(self, request_id: str) -> Request:
        request = self._requests.get(request_id) if isinstance(request_id, str) else None
        if request is None:
            raise KeyError(f"no live request {shown(request_id)}")
        return request

    def _add(self, requests: Sequence[Request], mailbox: Mailbox | None) -> None:
        with self._change:
            for request in requests:
                request.mailbox = mailbox
                self._scheduler.add(request, request.cache_salt)
                self._requests[request.request_id] = request

    def _enter(self, *, reads: bool = False) -> None:
        """Begins a call from outside: the state is whole from here on, but for one that reads."""
        if reads and self._change.is_below():
            return
        self._repair()
        self._change.check_alive()

    def _repair(self) -> None:
        """Makes the state anew if a change was cut short; ends what nobody waits for any more."""
        self._change.check_caller()
        if self._change.was_cut_short():
            self._recover()
        for owner in list(self._abandoned):
            for request in owner.requests:
                self._abort(request)
            with contextlib.suppress(ValueError):  # a signal handler's call may have done it
                self._abandoned.remove(owner)

    def _recover(self) -> None:
        """Aborts all requests and empties host and device; may be cut short itself, and repeated.

        Nothing is taken up again: whatever keeps the books may have been interrupted itself.
        """
        self._change.begin_repair()
        self._make_host_state()
        for request in list(self._requests.values()):
            self._deliver(request, self._results.mark_aborted(request))
        self._change.settle(self._runner.recover)

    def _drive(self, request: Request | None = None) -> bool:
        """Runs a step if a request is live, this one or any; outputs go to their owners.

        Returns:
          Whether it was.
        """
        self._repair()
        with self._change:
            live = bool(self._requests)
            if request is not None:
                live = self._requests.get(request.request_id) is request
            for output in self._step() if live else ():
                self._deliver(self._requests[output.request_id], output)
        return live

    def _abort(self, request: Request) -> None:
        with self._change:
            if self._requests.get(request.request_id) is request:
                self._results.abort(request)
                self._deliver(request, self._results.output(request, finished=True))

    def _deliver(self, request: Request, output: RequestOutput) -> None:
        mailbox = self._outbox if request.mailbox is None else request.mailbox
        mailbox[request.request_id] = output
        if not output.finished:
            return
        del self._requests[request.request_id]
        self._scheduler.cache.release_root(request.cache_root)
        request.processors = None  # its bitmaps are as large as the vocabulary
        if not self._requests:
            # What runs ahead computes tokens of ended sequences only: nobody waits for them.
            if self._planned is not None:
                # Pages have addresses whose content is never computed.
                self._scheduler.cache.clear()
            self._planned = self._inflight = None

    def _swap(self, step: StepPlan) -> None:
        compile_s = self._runner.swap(step.swap_outs, step.swap_ins)
        self._results.skip(compile_s, overlapped=False)

    def _plan_step(self) -> tuple[ScheduledStep, Batch] | None:
        if not self._scheduler.has_work:
            return None
        step = self._scheduler.schedule()
        if not step.plan.num_rows:
            self._totals.record_swaps(step.plan)
            self._swap(step.plan)
            return None
        self._totals.record_step(step.plan, self._table)
        return step, build_batch(step.plan, self._table, self._buckets)
