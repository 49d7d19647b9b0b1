# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, text out; the one owner of the host's state."""

import copy
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

import pallas_kernels
from jpaged.batch import ShapeBuckets, StepShape, build_batch
from jpaged.config import EngineConfig
from jpaged.memory import choose_pool_size
from jpaged.outputs import Completion, GenerationInterrupted, RequestOutput
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
        device = jax.devices()[0]
        max_model_len = config.max_model_len or model_config.max_position_embeddings
        if max_model_len > model_config.max_position_embeddings:
            raise ValueError(
                f"max_model_len={max_model_len} exceeds the model's max_position_embeddings="
                f"{model_config.max_position_embeddings}"
            )
        dtype = jnp.dtype(config.dtype or default_dtype())
        pages_per_seq = -(-max_model_len // config.page_size)
        page_shape = pallas_kernels.kv_pages_shape(
            model_config.num_layers,
            1,
            model_config.num_kv_heads,
            config.page_size,
            model_config.head_dim,
            backend=backend,
        )
        page_bytes = dtype.itemsize
        for size in page_shape:
            page_bytes *= size
        pool_size = choose_pool_size(config, max_model_len, page_bytes, device)
        logger.info("page pool: %s", pool_size)
        table = PageTable(PagePool(pool_size.num_pages), config.page_size, pages_per_seq)
        scan_layers = config.scan_layers
        if scan_layers is None:
            scan_layers = device.platform != "cpu"

        self.model_config = model_config
        self.config = config
        self.tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._page_bytes = page_bytes
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_num_seqs=config.max_num_seqs,
                max_model_len=max_model_len,
                reservation=config.reservation,
            ),
            table,
        )
        self._table = table
        self._buckets = ShapeBuckets(
            config.max_num_batched_tokens, config.max_num_seqs, single=config.deterministic
        )
        self._runner = ModelRunner(
            Decoder(model_config, scan_layers, backend).apply,
            stack_layers(params) if scan_layers else params,
            (page_shape[0], pool_size.num_pages, *page_shape[2:]),
            dtype,
            max_num_samples=config.max_num_seqs,
            pages_per_seq=pages_per_seq,
            vocab_size=model_config.vocab_size,
            backend=backend,
        )
        self._requests: dict[str, Request] = {}
        self._texts: dict[Sample, TextStream] = {}
        self._request_counter = itertools.count()
        self._inflight: tuple[ScheduledStep, StepResult] | None = None
        self._totals = Counters()
        self._preemptions_before_reset = 0
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
        dtype = jnp.dtype(config.dtype or default_dtype())
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
        return bool(self._requests) or self._inflight is not None

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
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of prompts, not one string; wrap it in [ ]")
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
        bar = tqdm.tqdm(total=len(requests), unit="request", disable=not progress)
        try:
            with bar:
                while len(done) < len(requests):
                    for output in self.step():
                        done[output.request_id] = output
                        bar.update()
                    bar.set_postfix_str(self._progress_line(), refresh=False)
        except KeyboardInterrupt:
            for request in requests:
                if request.request_id not in done:
                    done[request.request_id] = self.abort(request.request_id)
            raise GenerationInterrupted([done[r.request_id] for r in requests]) from None
        return [done[request.request_id] for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[RequestOutput]:
        """Answers one prompt, yielding its output each time it has grown.

        Closing the iterator, or an exception in its body, aborts the request.
        """
        request_id = self.add_request(prompt, params, stream=True)
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
        """
        previous, self._inflight = self._inflight, None
        if previous is None:
            self._last_step_end_s = time.perf_counter()
        if self._scheduler.has_work:
            step = self._scheduler.schedule()
            if step.seqs:
                self._totals.record_step(step, self._table)
                batch = build_batch(step, self._table, self._buckets)
                self._inflight = step, self._runner.run(batch, step.copies)
            elif previous is None:
                raise AssertionError("the scheduler has work but schedules none of it")
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
        request = self._requests.pop(request_id)
        for sample in request.sequences:
            if sample.status is not Status.FINISHED:
                self._finish(sample, "abort")
        return self._output(request)

    def warm_up(self, shapes: Sequence[StepShape] | None = None) -> None:
        """Compiles steps ahead of need; compilations after it are logged with their shape.

        Args:
          shapes: the steps to compile; None takes all that this engine can ever run.
        """
        self._runner.warm_up(self._buckets.all_shapes() if shapes is None else shapes)

    def stats(self) -> EngineStats:
        """Returns a reading of the pool, the queues and the totals; it does not change later."""
        pool, table = self._table.pool, self._table
        totals = copy.copy(self._totals)
        totals.num_preemptions = self._scheduler.num_preemptions - self._preemptions_before_reset
        cells = table.num_allocated_cells
        return EngineStats(
            page_size=table.page_size,
            page_bytes=self._page_bytes,
            num_usable_pages=pool.num_usable_pages,
            num_free_pages=pool.num_free_pages,
            num_used_pages=pool.num_used_pages,
            num_shared_pages=pool.num_shared_pages,
            utilisation=table.num_live_cells / cells if cells else 1.0,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_compilations=self._runner.num_compilations,
            num_unplanned_compilations=self._runner.num_unplanned_compilations,
            max_model_len=self._max_model_len,
            totals=totals,
        )

    def reset_stats(self) -> None:
        """Starts the totals of `stats` again, for instance after a warm-up run."""
        self._totals = Counters()
        self._preemptions_before_reset = self._scheduler.num_preemptions

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
            max_model_len=self._max_model_len,
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
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise ValueError(
                f"request {request_id!r}: the model has no tokenizer.json, so its prompts must be "
                "lists of token ids"
            )
        return self.tokenizer.encode(prompt).ids

    def _add(self, request: Request) -> None:
        self._scheduler.add(request)
        self._requests[request.request_id] = request

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
            sample.num_inflight_tokens -= 1
            sample.token_ids.append(token)
            sample.cumulative_logprob += logprobs[slot]
            if (wanted := request.params.logprobs) is not None:
                likeliest = itertools.islice(top[slot].items(), wanted) if top else ()
                sample.logprobs.append({token: logprobs[slot], **dict(likeliest)})
            self._totals.num_generated_tokens += 1
            self._totals.num_decode_tokens += not step.num_prefill_tokens
            if reason := self._stop_reason(sample, token):
                self._finish(sample, reason)
            if request.stream or request.finished:
                grown[request.request_id] = request
        for request_id, request in grown.items():
            if request.finished:
                del self._requests[request_id]
        return [self._output(request) for request in grown.values()]

    def _stop_reason(self, sample: Sample, token: int) -> str | None:
        params = sample.request.params
        if token in params.stop_token_ids:
            return "stop"
        if not params.ignore_eos and token in self.model_config.eos_token_ids:
            return "stop"
        if self.tokenizer is not None:
            if sample not in self._texts:
                self._texts[sample] = TextStream(self.tokenizer, params.stop)
            if self._texts[sample].add(token):
                return "stop"
        return "length" if len(sample.token_ids) >= sample.max_total_tokens else None

    def _finish(self, sample: Sample, reason: str) -> None:
        text = self._texts.pop(sample, None)
        if text is not None:
            # What was held back may complete a stop string of which the length cut the end.
            if not text.stopped and text.flush() and reason == "length":
                reason = "stop"
            sample.text = text.text
        self._scheduler.finish(sample, reason)

    def _output(self, request: Request) -> RequestOutput:
        finished = request.finished or request.request_id not in self._requests
        first = request.first_token_s
        return RequestOutput(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[self._completion(sample) for sample in request.sequences],
            finished=finished,
            time_to_first_token_s=None if first is None else first - request.arrival_s,
            latency_s=time.perf_counter() - request.arrival_s,
        )

    def _completion(self, sample: Sample) -> Completion:
        live = self._texts.get(sample)
        return Completion(
            text=live.text if live is not None else sample.text,
            token_ids=sample.generated_token_ids,
            cumulative_logprob=sample.cumulative_logprob,
            logprobs=None if sample.request.params.logprobs is None else list(sample.logprobs),
            finish_reason=sample.finish_reason,
        )

    def _progress_line(self) -> str:
        stats = self.stats()
        total_s = stats.totals.prefill_s + stats.totals.decode_s
        speed = stats.totals.num_generated_tokens / total_s if total_s else 0.0
        return (
            f"{speed:.0f} tokens/s, {stats.num_running} running, "
            f"{stats.num_used_pages}/{stats.num_usable_pages} pages"
        )


def default_dtype() -> str:
    """The dtype of weights and pages where none is asked for: float32 on CPU, else bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
