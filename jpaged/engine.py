# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, text out; the one owner of the host's state."""

import itertools
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers
import tqdm

from jpaged.admission import SchedulerConfig
from jpaged.batch import Batch, ShapeBuckets, StepShape, build_batch, idle_beams
from jpaged.config import EngineConfig
from jpaged.costs import preemption_costs
from jpaged.memory import default_dtype, plan_pool
from jpaged.outputs import GenerationInterrupted, RequestOutput
from jpaged.page_pool import PagePool
from jpaged.page_table import PageTable
from jpaged.params import SamplingParams
from jpaged.requests import Prompt, RequestMaker
from jpaged.results import ResultReader
from jpaged.runner import ModelRunner, StepResult
from jpaged.scheduler import Scheduler
from jpaged.sequence import Request, Status
from jpaged.stats import Counters, EngineStats
from jpaged.step import ScheduledStep
from jpaged.swap import NO_COSTS
from jpaged.text import load_tokenizer
from jpaged.viewer import PoolSnapshot
from models import checkpoint
from models.config import ModelConfig
from models.decoder import Decoder, stack_layers
from pallas_kernels.dispatch import resolve_backend

logger = logging.getLogger(__name__)


class Engine:
    """Generates for many requests at once over one page pool.

    `step` keeps the device one step ahead: it schedules and dispatches the next step before it
    reads the samples of the one before. A sequence that a sample ends may therefore compute one
    token too many, which is dropped.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        params: Any,
        config: EngineConfig | None = None,
        tokenizer: tokenizers.Tokenizer | None = None,
    ):
        """Allocates the page pool around a model that is in memory; see `load` for one on disk.

        Args:
          model_config: the model's shape.
          params: the unstacked parameter tree of `models.decoder.Decoder(model_config)`.
          config: the engine's settings.
          tokenizer: None serves prompts given as token ids.

        Raises:
          ValueError: if a setting cannot be met; the message has the value and the limit.
        """
        config = config or EngineConfig()
        backend = resolve_backend(config.backend)
        plan = plan_pool(config, model_config, backend)
        logger.info("page pool: %s", plan)
        scan_layers = config.scan_layers
        if scan_layers is None:
            scan_layers = jax.default_backend() != "cpu"

        self.model_config = model_config
        self.config = config
        self.tokenizer = tokenizer
        self._plan = plan
        num_host_pages, costs = plan.num_host_pages(config), NO_COSTS
        if num_host_pages:
            costs = preemption_costs(config, model_config, plan.page_bytes)
        self._scheduler_config = SchedulerConfig(
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=plan.max_model_len,
            reservation=config.reservation,
            prefix_cache=config.prefix_cache,
            preemption=config.preemption,
            num_host_pages=num_host_pages,
            costs=costs,
        )
        self._buckets = ShapeBuckets(
            config.max_num_batched_tokens, config.max_num_seqs, single=config.deterministic
        )
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, default_dtype(config)), params)
        self._runner = ModelRunner(
            Decoder(model_config, scan_layers, backend).apply,
            stack_layers(params) if scan_layers else params,
            plan,
            max_num_samples=config.max_num_seqs,
            vocab_size=model_config.vocab_size,
            backend=backend,
            num_host_pages=num_host_pages,
        )
        self._requests: dict[str, Request] = {}
        self._request_counter = itertools.count()
        # A step that is scheduled but not dispatched, and one that is dispatched but not read.
        self._planned: tuple[ScheduledStep, Batch] | None = None
        self._inflight: tuple[ScheduledStep, StepResult] | None = None
        self._totals = Counters()
        self._make_host_state()

    def _make_host_state(self) -> None:
        """Makes an empty pool, page table and queues."""
        plan, tokenizer = self._plan, self.tokenizer
        self._table = PageTable(PagePool(plan.num_pages), self.config.page_size, plan.pages_per_seq)
        self._scheduler = Scheduler(self._scheduler_config, self._table)
        self._maker = RequestMaker(
            self.model_config, tokenizer, self._scheduler_config, self._table
        )
        self._results = ResultReader(
            self._scheduler, tokenizer, self.model_config.eos_token_ids, self._totals
        )

    @classmethod
    def load(cls, model_path: str | pathlib.Path, config: EngineConfig | None = None) -> "Engine":
        """Makes an engine for a model directory, Hugging Face's or our own.

        Args:
          model_path: holds config.json, weights (safetensors or Orbax) and maybe tokenizer.json.
          config: the engine's settings.

        Returns:
          An engine; its tokenizer is None where the directory has none.

        Raises:
          FileNotFoundError: if the directory or something in it is missing.
          ValueError: if the model is not supported, damaged, or does not fit the settings.
        """
        config = config or EngineConfig()
        dtype = default_dtype(config)
        start = time.perf_counter()
        model_config, params = checkpoint.load(model_path, dtype)
        tokenizer = load_tokenizer(pathlib.Path(model_path).expanduser())
        logger.info(
            "loaded %s: %.1f M parameters as %s in %.2f s",
            model_path,
            model_config.num_params / 1e6,
            dtype.name,
            time.perf_counter() - start,
        )
        return cls(model_config, params, config, tokenizer)

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._requests)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        progress: bool = False,
        on_step: Callable[[], object] = lambda: None,
    ) -> list[RequestOutput]:
        """Answers all prompts, as many at once as fit.

        Args:
          prompts: texts, or lists of token ids.
          params: for all, or one for each prompt.
          progress: whether to show a progress bar on standard error.
          on_step: called after each step, for instance to look at `stats` or `pool_snapshot`.

        Returns:
          The outputs, in the order of the prompts.

        Raises:
          ValueError: if a prompt cannot be served; then none has been started.
          RuntimeError: if requests of `add_request` are live.
          GenerationInterrupted: on Ctrl-C; holds what was produced.
        """
        if self.has_unfinished_requests:
            raise RuntimeError(
                f"{len(self._requests)} requests are live: finish them with step(), or abort them, "
                "before generate()"
            )
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
            raise ValueError("prompts must be a list of prompts, not one prompt; wrap it in [ ]")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} SamplingParams do not pair with {len(prompts)} prompts")
        requests = [
            self._maker.make(prompt, own, self._next_request_id(), stream=False)
            for prompt, own in zip(prompts, each, strict=True)
        ]
        for request in requests:
            self._add(request)
        done: dict[str, RequestOutput] = {}
        # miniters=0 redraws the bar with time, also while no request ends.
        bar = tqdm.tqdm(total=len(requests), unit="request", miniters=0, disable=not progress)
        try:
            with bar:
                while self.has_unfinished_requests:
                    outputs = self.step()
                    done |= {output.request_id: output for output in outputs}
                    on_step()
                    if progress:
                        bar.set_postfix_str(self.stats().progress_line(), refresh=False)
                    bar.update(len(outputs))
        except BaseException as e:
            for request_id in list(self._requests):
                self.abort(request_id)
            if isinstance(e, KeyboardInterrupt):
                raise GenerationInterrupted(self._outputs(requests, done)) from None
            raise
        return self._outputs(requests, done)

    def _outputs(
        self, requests: Sequence[Request], done: dict[str, RequestOutput]
    ) -> list[RequestOutput]:
        """One for each request; what was aborted, or lost on its way, is as far as it came."""
        return [
            done.get(request.request_id) or self._results.output(request, finished=True)
            for request in requests
        ]

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[RequestOutput]:
        """Answers one prompt, yielding its output each time it has grown.

        The request is checked and queued at once. Closing the iterator before its end aborts it.

        Raises:
          ValueError: if the prompt or the parameters cannot be served; nothing has changed then.
        """
        return self._stream(self.add_request(prompt, params, stream=True))

    def _stream(self, request_id: str) -> Iterator[RequestOutput]:
        try:
            while request_id in self._requests:
                for output in self.step():
                    if output.request_id == request_id:
                        yield output
        finally:
            if request_id in self._requests:
                self.abort(request_id)

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        stream: bool = False,
        cache_salt: str | None = None,
    ) -> str:
        """Queues a request for the coming steps.

        Args:
          prompt: text, or token ids.
          params: how to sample and when to stop.
          request_id: a name of the caller's, unique among live requests; None makes one.
          stream: whether `step` reports the request each time it has grown, not only at its end.
          cache_salt: requests with equal salts use each other's pages where their prompts begin
            alike; others do not.

        Returns:
          The request's id.

        Raises:
          ValueError: if the prompt or the parameters cannot be served; nothing has changed then.
        """
        if request_id is None:
            request_id = self._next_request_id()
        if request_id in self._requests:
            raise ValueError(f"request_id={request_id!r} is in use by a live request")
        request = self._maker.make(prompt, params, request_id, stream=stream)
        self._add(request, cache_salt)
        return request_id

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
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        parent = self._requests.get(request_id)
        if parent is None:
            raise KeyError(f"no live request {request_id!r}")
        ids = [self._next_request_id() for _ in range(k)]
        forks = self._maker.fork(parent, ids, params, stream=stream)
        # Each is put right behind the parent.
        for child in reversed(forks):
            self._results.fork(parent.sequences[0], child.sequences[0])
            self._scheduler.fork(parent, child)
            self._requests[child.request_id] = child
        return ids

    def step(self) -> list[RequestOutput]:
        """Runs one step: dispatches the next, then reads the samples of the one before.

        Returns:
          The requests that ended, and those added with `stream=True` that have grown.

        Raises:
          BaseException: whatever interrupts it, Ctrl-C too; every live request has been aborted
            then.
        """
        try:
            return self._step()
        except BaseException:
            # A step that was planned, dispatched or read by half cannot be taken up again, and what
            # keeps the books may have been interrupted itself.
            for request in self._requests.values():
                for sample in request.sequences:
                    if sample.status is not Status.FINISHED:
                        sample.status, sample.finish_reason = Status.FINISHED, "abort"
            self._requests.clear()
            self._planned = self._inflight = None
            self._make_host_state()
            raise

    def _step(self) -> list[RequestOutput]:
        previous, self._inflight = self._inflight, None
        if previous is None:
            self._results.start_clock()
        planned, self._planned = self._planned or self._plan_step(), None
        assert planned or previous or not self._scheduler.has_work, "work, but none is scheduled"
        if planned and previous and not self._runner.is_compiled(planned[1]):
            # Samples that are there already do not wait for a compilation.
            self._planned = planned
        elif planned:
            step, batch = planned
            compile_s = self._runner.compile_s
            self._runner.swap(step.swap_outs, step.swap_ins)
            self._inflight = step, self._runner.run(batch, step.copies)
            # Compiling is no part of what a step takes.
            compile_s = self._runner.compile_s - compile_s
            self._results.skip(compile_s)
        if not previous:
            return []
        outputs = self._results.read(*previous)
        for output in outputs:
            if output.finished:
                self._forget(self._requests[output.request_id])
        return outputs

    def abort(self, request_id: str) -> RequestOutput:
        """Ends a live request now.

        Returns:
          What it has produced.

        Raises:
          KeyError: if no live request has this id.
        """
        if request_id not in self._requests:
            raise KeyError(f"no live request {request_id!r}")
        request = self._requests[request_id]
        for sample in request.sequences:
            if sample.status is not Status.FINISHED:
                self._results.finish(sample, "abort")
        self._forget(request)
        return self._results.output(request, finished=True)

    def reset_prefix_cache(self) -> None:
        """Forgets all pages that are kept for their content, for instance after new weights.

        Raises:
          RuntimeError: if requests are live that use such pages.
        """
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
          searches: also compile the choice of beams for parameters like these.
        """
        planned = self._buckets.all_shapes() if shapes is None else shapes
        beams = [idle_beams(params, self.model_config.eos_token_ids) for params in searches]
        self._runner.warm_up(planned, num_logprobs, beams)

    def stats(self) -> EngineStats:
        """Returns a reading of the pool, the queues and the totals; it does not change later."""
        return EngineStats.read(
            self._scheduler,
            self._totals,
            page_bytes=self._plan.page_bytes,
            num_compilations=self._runner.num_compilations,
            num_unplanned_compilations=self._runner.num_unplanned_compilations,
        )

    def pool_snapshot(self) -> PoolSnapshot:
        """Returns for each page its owners ("request_id#sample") and fill. Cost: every page."""
        return PoolSnapshot.of_requests(self._table, self._requests.values())

    def reset_stats(self) -> None:
        """Starts the totals of `stats` again, for instance after a warm-up run."""
        self._totals = self._results.totals = Counters()

    def check_invariants(self) -> None:
        """Raises AssertionError if pages are lost or held twice. Cost: every page; for tests."""
        self._scheduler.check_invariants()
        if not self.has_unfinished_requests:
            assert self._table.pool.num_used_pages == 0, "an idle engine holds pages"

    def _next_request_id(self) -> str:
        return next(i for i in map(str, self._request_counter) if i not in self._requests)

    def _add(self, request: Request, cache_salt: str | None = None) -> None:
        self._scheduler.add(request, cache_salt)
        self._requests[request.request_id] = request

    def _plan_step(self) -> tuple[ScheduledStep, Batch] | None:
        if not self._scheduler.has_work:
            return None
        step = self._scheduler.schedule()
        if not step.seqs:
            self._totals.record_swaps(step)
            self._runner.swap(step.swap_outs, step.swap_ins)
            return None
        self._totals.record_step(step, self._table)
        return step, build_batch(step, self._table, self._buckets)

    def _forget(self, request: Request) -> None:
        del self._requests[request.request_id]
        if not self._requests:
            # What runs ahead computes tokens of ended sequences only: nobody waits for them.
            if self._planned is not None:
                # Pages have addresses whose content is never computed.
                self._scheduler.cache.clear()
            self._planned = self._inflight = None
