# SPDX-License-Identifier: Apache-2.0
"""Reads what steps have sampled: tokens and text, who has ended, and what is to be reported."""

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import tokenizers

from jpaged.detokenizer import Detokenizer
from jpaged.device.runner import StepResult
from jpaged.host.beam import Candidate
from jpaged.host.outputs import RequestOutput, output_of
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import Request, Status
from jpaged.host.sequence import Sequence as Sample
from jpaged.host.stats import Counters
from jpaged.host.step import ScheduledStep
from jpaged.text import TextStream, is_fault

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class ResultReader:
    """Appends sampled tokens to sequences, and ends those that they end.

    What goes wrong with the data of one sequence ends it with an error, and no other.

    Attributes:
      totals: brought up to date with each step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: tokenizers.Tokenizer | None,
        eos_token_ids: Collection[int],
        totals: Counters,
        dtype: str,
    ):
        """Remembers whose sequences they are, how their text is made, and the dtype of weights."""
        self.totals = totals
        self._scheduler = scheduler
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._eos_token_ids = eos_token_ids
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

    def add_text(self, sample: Sample, text: TextStream | None) -> None:
        """Has the text of a sequence that was just forked go on."""
        if text is not None:
            self._texts[sample], sample.text = text, text.text

    def _continued(self, text: TextStream, parent: Sample, child: Sample) -> TextStream:
        params = child.request.params
        if params.skip_special_tokens != parent.request.params.skip_special_tokens:
            text = self._new_text(child.request, stop=())
            for token in child.generated_token_ids:
                text.add(token)
        return text.copy(params.stop)

    def read(self, step: ScheduledStep, result: StepResult) -> list[RequestOutput]:
        """Reads a step's samples, ends the sequences that they end, and reports."""
        tokens, logprobs, top = result.read()
        searched = result.read_beams()
        now = time.perf_counter()
        took, self._last_step_end_s = now - self._last_step_end_s, now
        if step.num_prefill_tokens:
            self.totals.prefill_s += took
        else:
            self.totals.decode_s += took
        grown: dict[str, Request] = {}
        for (request, slot), candidates in zip(step.beams, searched, strict=True):
            if request.sequences[0].status is not Status.FINISHED:
                assert request.beam_search is not None
                own = slice(slot, slot + len(request.beam_search.nodes))
                self._read_beams(request, candidates, logprobs[own], top[own] if top else None, now)
                self.totals.num_decode_tokens += not step.num_prefill_tokens
                if request.stream or request.finished:
                    grown[request.request_id] = request
        for slot, (sample, token) in enumerate(zip(step.samples, tokens, strict=True)):
            if sample.status is Status.FINISHED or sample.request.beam_search is not None:
                continue  # ended by the step before, when this one was on its way already
            request = sample.request
            if request.first_token_s is None:
                request.first_token_s = now
            if math.isfinite(logprobs[slot]):
                self._read_sample(sample, token, logprobs[slot], top[slot] if top else {})
                self.totals.num_decode_tokens += not step.num_prefill_tokens
            else:
                self._fail(sample, self._not_finite(sample))
            if request.stream or request.finished:
                grown[request.request_id] = request
        return [self.output(request, finished=request.finished) for request in grown.values()]

    def _read_sample(
        self, sample: Sample, token: int, logprob: float, top: Mapping[int, float]
    ) -> None:
        self.totals.num_generated_tokens += 1
        try:
            if (wanted := sample.request.params.logprobs) is not None:
                likeliest = itertools.islice(top.items(), wanted)
                sample.logprobs.append({token: logprob, **dict(likeliest)})
            sample.receive(token, logprob)
            reason = self._stop_reason(sample)
        except BaseException as e:
            self._fail(sample, _refused(e))
            return
        if reason:
            self.finish(sample, reason)

    def _read_beams(
        self,
        request: Request,
        candidates: list[Candidate],
        logprobs: Sequence[float],
        top: Sequence[Mapping[int, float]] | None,
        now: float,
    ) -> None:
        search, wanted = request.beam_search, request.params.logprobs
        assert search is not None
        if request.first_token_s is None:
            request.first_token_s = now

        def advance() -> list[int]:
            likeliest = None
            if wanted is not None:
                rows = top or [{}] * len(search.nodes)
                likeliest = [dict(itertools.islice(row.items(), wanted)) for row in rows]
            return search.advance(candidates, likeliest)

        if not all(map(math.isfinite, logprobs)):
            return self._fail_search(request, self._not_finite(*request.sequences))
        parents, error = _attempt(advance)
        if parents is None:
            return self._fail_search(request, error)
        self._scheduler.advance_beams(request, parents)
        self.totals.num_generated_tokens += 1

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
        if output is None:  # beams: the text of samples is there already
            self._fail_search(request, error)
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

    def _stop_reason(self, sample: Sample) -> str | None:
        reason = sample.stop_reason(self._eos_token_ids)
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

    def _fail(self, sample: Sample, error: str) -> None:
        sample.error = error
        self.finish(sample, "error")

    def _fail_search(self, request: Request, error: str) -> None:
        assert request.beam_search is not None
        request.beam_search.fail(error)
        if request.sequences[0].status is not Status.FINISHED:
            self._scheduler.advance_beams(request, [])

    def _not_finite(self, *samples: Sample) -> str:
        """Says why sequences end whose logits are not finite, and has nobody use their pages."""
        cache, size = self._scheduler.cache, self._scheduler.table.page_size
        for sample in samples:
            if (root := sample.request.cache_root) is not None:
                cache.quarantine(root, sample.tokens(0, min(size, sample.num_known_tokens)), size)
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
