# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, text out; the one owner of the host's state."""

import itertools
import logging
import pathlib
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers
import tqdm

from jpaged.batch import Batch, ShapeBuckets, StepShape, build_batch
from jpaged.config import EngineConfig
from jpaged.memory import default_dtype, plan_pool
from jpaged.outputs import GenerationInterrupted, RequestOutput, output_of
from jpaged.page_pool import PagePool
from jpaged.page_table import PageTable
from jpaged.params import SamplingParams
from jpaged.runner import ModelRunner, StepResult
from jpaged.scheduler import ScheduledStep, Scheduler, SchedulerConfig
from jpaged.sequence import Request, Status
from jpaged.sequence import Sequence as Sample
from jpaged.stats import Counters, EngineStats
from jpaged.text import TextStream, load_tokenizer
from models import checkpoint
from models.config import ModelConfig
from models.decoder import Decoder, stack_layers
from pallas_kernels.dispatch import resolve_backend

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]


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
        self._table = PageTable(PagePool(plan.num_pages), config.page_size, plan.pages_per_seq)
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_num_seqs=config.max_num_seqs,
                max_model_len=plan.max_model_len,
                reservation=config.reservation,
            ),
            self._table,
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
        )
        self._requests: dict[str, Request] = {}
        self._texts: dict[Sample, TextStream] = {}
        self._request_counter = itertools.count()
        # A step that is scheduled but not dispatched, and one that is dispatched but not read.
        self._planned: tuple[ScheduledStep, Batch] | None = None
        self._inflight: tuple[ScheduledStep, StepResult] | None = None
        self._totals = Counters()
        self._last_step_end_s = 0.0

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
    ) -> list[RequestOutput]:
        """Answers all prompts, as many at once as fit.

        Args:
          prompts: texts, or lists of token ids.
          params: for all, or one for each prompt.
          progress: whether to show a progress bar on standard error.

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
            self._make_request(prompt, own, self._next_request_id(), stream=False)
            for prompt, own in zip(prompts, each, strict=True)
        ]
        for request in requests:
            self._add(request)
        done: dict[str, RequestOutput] = {}
        # miniters=0 redraws the bar with time, also while no request ends.
        bar = tqdm.tqdm(total=len(requests), unit="request", miniters=0, disable=not progress)
        try:
            with bar:
                while len(done) < len(requests):
                    outputs = self.step()
                    done |= {output.request_id: output for output in outputs}
                    if progress:
                        bar.set_postfix_str(self.stats().progress_line(), refresh=False)
                    bar.update(len(outputs))
        except KeyboardInterrupt:
            for request in requests:
                if request.request_id in self._requests:
                    self.abort(request.request_id)
                # An output may have been lost on its way here.
                done.setdefault(request.request_id, output_of(request, finished=True))
            raise GenerationInterrupted([done[r.request_id] for r in requests]) from None
        return [done[request.request_id] for request in requests]

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
    ) -> str:
        """Queues a request for the coming steps.

        Args:
          prompt: text, or token ids.
          params: how to sample and when to stop.
          request_id: a name of the caller's, unique among live requests; None makes one.
          stream: whether `step` reports the request each time it has grown, not only at its end.

        Returns:
          The request's id.

        Raises:
          ValueError: if the prompt or the parameters cannot be served; nothing has changed then.
        """
        if request_id is None:
            request_id = self._next_request_id()
        request = self._make_request(prompt, params, request_id, stream=stream)
        self._add(request)
        return request_id

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
            # A step that was planned, dispatched or read by half cannot be taken up again.
            for request_id in list(self._requests):
                self.abort(request_id)
            raise

    def _step(self) -> list[RequestOutput]:
        previous, self._inflight = self._inflight, None
        if previous is None:
            self._last_step_end_s = time.perf_counter()
        planned, self._planned = self._planned or self._plan_step(), None
        assert planned or previous or not self._scheduler.has_work, "work, but none is scheduled"
        if planned and previous and not self._runner.is_compiled(planned[1]):
            # Samples that are there already do not wait for a compilation.
            self._planned = planned
        elif planned:
            step, batch = planned
            compile_s = self._runner.compile_s
            self._inflight = step, self._runner.run(batch, step.copies)
            # Compiling is no part of what a step takes.
            compile_s = self._runner.compile_s - compile_s
            self._totals.compile_s += compile_s
            self._last_step_end_s += compile_s
        return self._process(*previous) if previous else []

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
                self._finish(sample, "abort")
        self._forget(request)
        return output_of(request, finished=True)

    def warm_up(self, shapes: Sequence[StepShape] | None = None, num_logprobs: int = 0) -> None:
        """Compiles steps ahead of need; compilations after it are logged with their shape.

        Args:
          shapes: the steps to compile; None takes all that this engine can run.
          num_logprobs: also compile the report of this many likeliest tokens, for requests that set
            `SamplingParams.logprobs`.
        """
        planned = self._buckets.all_shapes() if shapes is None else shapes
        self._runner.warm_up(planned, num_logprobs)

    def stats(self) -> EngineStats:
        """Returns a reading of the pool, the queues and the totals; it does not change later."""
        return EngineStats.read(
            self._scheduler,
            self._totals,
            page_bytes=self._plan.page_bytes,
            num_compilations=self._runner.num_compilations,
            num_unplanned_compilations=self._runner.num_unplanned_compilations,
        )

    def reset_stats(self) -> None:
        """Starts the totals of `stats` again, for instance after a warm-up run."""
        self._totals = Counters()

    def check_invariants(self) -> None:
        """Raises AssertionError if pages are lost or held twice. Cost: every page; for tests."""
        self._table.check_invariants()
        if not self.has_unfinished_requests:
            assert self._table.pool.num_used_pages == 0, "an idle engine holds pages"

    def _next_request_id(self) -> str:
        return next(i for i in map(str, self._request_counter) if i not in self._requests)

    def _make_request(
        self, prompt: Prompt, params: SamplingParams, request_id: str, *, stream: bool
    ) -> Request:
        """Checks all that can be checked without changing anything."""
        if request_id in self._requests:
            raise ValueError(f"request_id={request_id!r} is in use by a live request")
        token_ids = self._encode(prompt, request_id)
        vocab_size = self.model_config.vocab_size
        if outside := [t for t in token_ids if not 0 <= t < vocab_size]:
            raise ValueError(
                f"request {request_id!r}: token id {outside[0]} is outside the vocabulary, "
                f"[0, {vocab_size})"
            )
        if params.stop and self.tokenizer is None:
            raise ValueError(
                f"request {request_id!r}: stop={params.stop!r} needs a tokenizer, which this model "
                "has not; use stop_token_ids"
            )
        if params.logprobs is not None and params.logprobs > vocab_size:
            raise ValueError(
                f"request {request_id!r}: logprobs={params.logprobs} exceeds the vocabulary of "
                f"{vocab_size}"
            )
        seed = params.seed if params.seed is not None else secrets.randbits(32)
        request = Request(
            request_id,
            token_ids,
            params,
            seed=seed,
            max_model_len=self._plan.max_model_len,
            stream=stream,
        )
        self._scheduler.check(request)
        return request

    def _encode(self, prompt: Prompt, request_id: str) -> list[int]:
        if not len(prompt):
            raise ValueError(
                f"request {request_id!r}: the prompt is empty; give at least one character or token"
            )
        if not isinstance(prompt, str):
            try:
                return [int(token) for token in prompt]
            except (TypeError, ValueError):
                raise ValueError(
                    f"request {request_id!r}: a prompt must be text or a list of token ids, not "
                    f"{prompt!r:.80}"
                ) from None
        if self.tokenizer is None:
            raise ValueError(
                f"request {request_id!r}: the model has no tokenizer.json, so its prompts must be "
                "lists of token ids"
            )
        token_ids = self.tokenizer.encode(prompt).ids
        if not token_ids:
            raise ValueError(f"request {request_id!r}: the prompt {prompt!r:.80} has no tokens")
        return token_ids

    def _add(self, request: Request) -> None:
        self._scheduler.add(request)
        self._requests[request.request_id] = request

    def _plan_step(self) -> tuple[ScheduledStep, Batch] | None:
        if not self._scheduler.has_work:
            return None
        step = self._scheduler.schedule()
        if not step.seqs:
            return None
        self._totals.record_step(step, self._table)
        return step, build_batch(step, self._table, self._buckets)

    def _process(self, step: ScheduledStep, result: StepResult) -> list[RequestOutput]:
        """Reads a step's samples, ends the sequences that they end, and reports."""
        tokens, logprobs, top = result.read()
        now = time.perf_counter()
        took, self._last_step_end_s = now - self._last_step_end_s, now
        if step.num_prefill_tokens:
            self._totals.prefill_s += took
        else:
            self._totals.decode_s += took
        grown: dict[str, Request] = {}
        for slot, (sample, token) in enumerate(zip(step.samples, tokens, strict=True)):
            if sample.status is Status.FINISHED:
                continue  # ended by the step before, when this one was on its way already
            request = sample.request
            if request.first_token_s is None:
                request.first_token_s = now
            sample.receive(token, logprobs[slot])
            if (wanted := request.params.logprobs) is not None:
                likeliest = itertools.islice(top[slot].items(), wanted) if top else ()
                sample.logprobs.append({token: logprobs[slot], **dict(likeliest)})
            self._totals.num_generated_tokens += 1
            self._totals.num_decode_tokens += not step.num_prefill_tokens
            if reason := self._stop_reason(sample):
                self._finish(sample, reason)
            if request.stream or request.finished:
                grown[request.request_id] = request
        for request in grown.values():
            if request.finished:
                self._forget(request)
        return [output_of(request, finished=request.finished) for request in grown.values()]

    def _forget(self, request: Request) -> None:
        del self._requests[request.request_id]
        if not self._requests:
            # What runs ahead computes tokens of ended sequences only: nobody waits for them.
            self._planned = self._inflight = None

    def _stop_reason(self, sample: Sample) -> str | None:
        reason = sample.stop_reason(self.model_config.eos_token_ids)
        if reason == "stop" or self.tokenizer is None:
            return reason
        if sample not in self._texts:
            self._texts[sample] = TextStream(
                self.tokenizer, sample.request.params.stop, sample.request.prompt_token_ids
            )
        text = self._texts[sample]
        text.add(sample.token_ids[-1])
        sample.text = text.text
        return "stop" if text.stopped else reason

    def _finish(self, sample: Sample, reason: str) -> None:
        text = self._texts.pop(sample, None)
        if text is not None:
            # What was held back may complete a stop string of which the length cut the end.
            text.flush()
            sample.text = text.text
            if text.stopped and reason == "length":
                reason = "stop"
        self._scheduler.finish(sample, reason)
