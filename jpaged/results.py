# SPDX-License-Identifier: Apache-2.0
"""Reads what steps have sampled: tokens and text, who has ended, and what is to be reported."""

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import tokenizers

from jpaged.detokenizer import Detokenizer
from jpaged.device.step_result import BurstResult, StepResult
from jpaged.host.outputs import Completion, RequestOutput
from jpaged.host.reader import StepReader
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import Request, Status
from jpaged.host.sequence import Sequence as Sample
from jpaged.host.stats import Counters
from jpaged.host.step_builder import ScheduledStep
from jpaged.profiling import phase
from jpaged.text import TextStream, is_fault

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class ResultReader(StepReader):
    """Reads what the device found, makes text of it, and reports."""

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: tokenizers.Tokenizer | None,
        eos_token_ids: Collection[int],
        totals: Counters,
        dtype: str,
    ):
        """Remembers whose sequences they are, how their text is made, and the dtype of weights."""
        super().__init__(scheduler, eos_token_ids, totals)
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._dtype = dtype
        self._texts: dict[Sample, TextStream] = {}
        self._last_step_end_s = 0.0

    def start_clock(self) -> None:
        """The next step starts now, as none was running."""
        self._last_step_end_s = time.perf_counter()

    def skip(self, compile_s: float, *, overlapped: bool) -> None:
        """Counts time as compilation, which is no part of what a step takes.

        Args:
          compile_s: seconds.
          overlapped: whether a step was running on the device meanwhile, so that they passed for it
            too.
        """
        self.totals.compile_s += compile_s
        if not overlapped:
            self._last_step_end_s += compile_s

    def forked_text(self, parent: Sample, child: Sample) -> TextStream | None:
        """The text of a sequence that goes on from another, for `add_text`.

        Raises:
          ValueError: if it cannot be made.
        """
        if parent not in self._texts:
            return None
        text, error = _attempt(lambda: self._continued(self._texts[parent], parent, child))
        if text is None:
            raise ValueError(f"request {parent.request.request_id!r} cannot be forked: {error}")
        return text

    def resumed_text(self, sample: Sample) -> TextStream | None:
        """The text of a sequence that goes on from tokens, for `add_text`; None if it has none yet.

        Raises:
          ValueError: if it cannot be made, or has ended.
        """
        tokens, request = sample.generated_token_ids, sample.request
        if self._detokenizer is None or not tokens or sample.status is Status.FINISHED:
            return None

        def made() -> TextStream:
            text = self._new_text(request, request.params.stop)
            for token in tokens:
                text.add(token)
            return text

        text, error = _attempt(made)
        if text is None or text.stopped:
            error = error or f"a stop string has ended sample {sample.sample_index} already"
            raise ValueError(f"request {request.request_id!r} cannot be resumed: {error}")
        return text

    def add_text(self, sample: Sample, text: TextStream | None) -> None:
        """Has the text of a sequence that was just forked, or resumed, go on."""
        if text is not None:
            self._texts[sample], sample.text = text, text.text

    def _continued(self, text: TextStream, parent: Sample, child: Sample) -> TextStream:
        params = child.request.params
        if params.skip_special_tokens != parent.request.params.skip_special_tokens:
            text = self._new_text(child.request, stop=())
            for token in child.generated_token_ids:
                text.add(token)
        return text.copy(params.stop)

    def read(
        self, steps: Sequence[ScheduledStep], result: StepResult | BurstResult
    ) -> list[RequestOutput]:
        """Reads the samples of a dispatch, ends the sequences that they end, and reports."""
        with phase("read"):
            outcomes = result.outcomes()
        now = time.perf_counter()
        took, self._last_step_end_s = now - self._last_step_end_s, now
        if steps[0].plan.num_prefill_tokens:
            self.totals.prefill_s += took
        else:
            self.totals.decode_s += took
            self.totals.num_decode_steps += len(steps)
        with phase("detokenize"):
            grown: dict[str, Request] = {}
            for step, outcome in zip(steps, outcomes, strict=True):
                for request in self.take(step, outcome):
                    grown.pop(request.request_id, None)  # those that end first are told of first
                    grown[request.request_id] = request
            return [
                self.output(request, finished=request.finished)
                for request in grown.values()
                if request.stream or request.finished
            ]

    def output(self, request: Request, *, finished: bool) -> RequestOutput:
        """Freezes a request as far as it has come; see `outputs.output_of`."""

        def decode(token_ids: list[int]) -> str:
            if self._detokenizer is None:
                return ""
            text = self._new_text(request, stop=())
            for token in token_ids:
                text.add(token)
            text.flush()
            return text.text

        output, error = _attempt(lambda: output_of(request, decode, finished=finished))
        if output is None:  # of a search: the text of samples is there already
            self.fail_request(request, error)
            output = output_of(request, lambda _: "", finished=True)
        return output

    def partial(self, request: Request) -> RequestOutput:
        """What a request has come to that is aborted; not `finished`, as it is no answer."""
        output = self.output(request, finished=True)
        whole = all(completion.finish_reason != "abort" for completion in output.outputs)
        return dataclasses.replace(output, finished=whole)

    def abort(self, request: Request) -> None:
        """Ends what is left of a request."""
        for sample in list(request.sequences):
            self.finish(sample, "abort")

    def mark_aborted(self, request: Request) -> RequestOutput:
        """Likewise where the scheduler's books may be broken. Returns: what there is."""
        for sample in request.sequences:
            if sample.status is not Status.FINISHED:
                sample.status, sample.finish_reason = Status.FINISHED, "abort"
        return self.output(request, finished=True)

    def stop_reason(self, sample: Sample) -> str | None:
        """Why the newest token, or the text that it makes, ends a sample; None if it does not."""
        reason = super().stop_reason(sample)
        if reason == "stop" or self._detokenizer is None:
            return reason
        if sample not in self._texts:
            self._texts[sample] = self._new_text(sample.request, sample.request.params.stop)
        text = self._texts[sample]
        text.add(sample.token_ids[-1])
        sample.text = text.text
        return "stop" if text.stopped else reason

    def _new_text(self, request: Request, stop: Sequence[str]) -> TextStream:
        assert self._detokenizer is not None, "a model without a tokenizer has no text"
        return TextStream(
            self._detokenizer,
            stop,
            request.prompt_token_ids,
            skip_special_tokens=request.params.skip_special_tokens,
        )

    def finish(self, sample: Sample, reason: str) -> None:
        """Ends a sequence, with what its text has held back."""
        text = self._texts.pop(sample, None)
        if text is not None:
            # What was held back may complete a stop string of which the length cut the end.
            _, error = _attempt(text.flush)
            sample.text = text.text
            if error and reason != "abort":
                reason, sample.error = "error", sample.error or error
            elif text.stopped and reason == "length":
                reason = "stop"
        self._scheduler.finish(sample, reason)

    def refuse(self, error: BaseException) -> str:
        """What went wrong with a request's data. Raises: what is an interrupt."""
        return _refused(error)

    def not_finite(self, samples: Sequence[Sample]) -> str:
        """Says why sequences end whose logits are not finite, and has nobody use their pages."""
        cache, size = self._scheduler.cache, self._scheduler.table.page_size
        for sample in samples:
            if (root := sample.request.cache_root) is not None:
                cache.quarantine(root, sample.token_ids[:size], size)
        if self._dtype == "float16":
            where = (
                "float16 overflows above 65504: load the model with dtype='bfloat16' or 'float32'"
            )
        else:
            where = (
                f"the weights are damaged, or do not fit config.json (dtype={self._dtype!r}): look "
                "for NaN in them, compare the files with their source, and check config.json"
            )
        position = samples[0].num_known_tokens
        return f"NaN or infinite logits for the token at position {position}: {where}"


def _attempt(function: Callable[[], _T]) -> tuple[_T | None, str]:
    """Does what only concerns one request. Returns: the result, or None and what went wrong."""
    try:
        return function(), ""
    except BaseException as e:
        return None, _refused(e)


def _refused(error: BaseException) -> str:
    """What went wrong with a request's data. Raises: what is an interrupt."""
    if not is_fault(error):
        raise error
    logger.debug("an error that ends a request", exc_info=error)
    return f"its tokens could not be processed: {type(error).__name__}: {error}"


def output_of(
    request: Request, decode: Callable[[list[int]], str], *, finished: bool
) -> RequestOutput:
    """Freezes a request as far as it has come.

    Args:
      request: what to report.
      decode: gives the text of tokens.
      finished: whether nothing more will come; before, all samples are reported, or those answers
        of a search that have ended.
    """
    first, params = request.first_token_s, request.params
    outputs = request.growth.best(params.n, finished=finished)
    if outputs is None:
        samples = request.sequences
        if finished and params.num_samples > params.n:
            samples = sorted(samples, key=_rank, reverse=True)[: params.n]
        outputs = [_sample_completion(sample) for sample in samples]
    else:
        outputs = [dataclasses.replace(o, text=decode(o.token_ids)) for o in outputs]
    return RequestOutput(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        outputs=outputs,
        finished=finished,
        time_to_first_token_s=None if first is None else first - request.arrival_s,
        latency_s=time.perf_counter() - request.arrival_s,
        prompt_logprobs=None if request.scored is None else list(request.scored.found),
    )


def _sample_completion(sample: Sample) -> Completion:
    wants_logprobs = sample.request.params.logprobs is not None
    token_ids = sample.generated_token_ids
    return Completion(
        text=sample.text,
        token_ids=token_ids,
        cumulative_logprob=sample.cumulative_logprob,
        # Where a step was interrupted, there may be those of one token more.
        logprobs=sample.logprobs[: len(token_ids)] if wants_logprobs else None,
        finish_reason=sample.finish_reason,
        error=sample.error,
    )


def _rank(sample: Sample) -> tuple[bool, float]:
    """What the best samples are chosen by: no error, then the mean log-probability."""
    mean = sample.cumulative_logprob / max(len(sample.generated_token_ids), 1)
    return sample.error is None, mean
