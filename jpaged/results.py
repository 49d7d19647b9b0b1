# SPDX-License-Identifier: Apache-2.0
"""Reads what steps have sampled: tokens and text, who has ended, and what is to be reported."""

import itertools
import time
from collections.abc import Collection, Mapping, Sequence

import tokenizers

from jpaged.outputs import RequestOutput, output_of
from jpaged.runner import StepResult
from jpaged.scheduler import Scheduler
from jpaged.sequence import Request, Status
from jpaged.sequence import Sequence as Sample
from jpaged.stats import Counters
from jpaged.step import ScheduledStep
from jpaged.text import TextStream


class ResultReader:
    """Appends sampled tokens to sequences, and ends those that they end.

    Attributes:
      totals: brought up to date with each step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: tokenizers.Tokenizer | None,
        eos_token_ids: Collection[int],
        totals: Counters,
    ):
        """Remembers whose sequences they are, and how their text is made."""
        self.totals = totals
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._texts: dict[Sample, TextStream] = {}
        self._last_step_end_s = 0.0

    def start_clock(self) -> None:
        """The next step starts now, as none was running."""
        self._last_step_end_s = time.perf_counter()

    def skip(self, compile_s: float) -> None:
        """Counts time as compilation, which is no part of what a step takes."""
        self.totals.compile_s += compile_s
        self._last_step_end_s += compile_s

    def fork(self, parent: Sample, child: Sample) -> None:
        """Has the text of a sequence go on from that of another."""
        if parent in self._texts:
            self._texts[child] = self._texts[parent].copy(child.request.params.stop)

    def read(self, step: ScheduledStep, result: StepResult) -> list[RequestOutput]:
        """Reads a step's samples, ends the sequences that they end, and reports."""
        tokens, logprobs, top = result.read()
        now = time.perf_counter()
        took, self._last_step_end_s = now - self._last_step_end_s, now
        if step.num_prefill_tokens:
            self.totals.prefill_s += took
        else:
            self.totals.decode_s += took
        grown: dict[str, Request] = {}
        for (request, slot), candidates in zip(step.beams, result.read_beams(), strict=True):
            if request.sequences[0].status is not Status.FINISHED:
                self._advance_beams(request, candidates, top[slot:] if top else None, now)
                self.totals.num_decode_tokens += not step.num_prefill_tokens
                if request.stream or request.finished:
                    grown[request.request_id] = request
        for slot, (sample, token) in enumerate(zip(step.samples, tokens, strict=True)):
            if sample.status is Status.FINISHED or sample.request.beam_search is not None:
                continue  # ended by the step before, when this one was on its way already
            request = sample.request
            if request.first_token_s is None:
                request.first_token_s = now
            sample.receive(token, logprobs[slot])
            if (wanted := request.params.logprobs) is not None:
                likeliest = itertools.islice(top[slot].items(), wanted) if top else ()
                sample.logprobs.append({token: logprobs[slot], **dict(likeliest)})
            self.totals.num_generated_tokens += 1
            self.totals.num_decode_tokens += not step.num_prefill_tokens
            if reason := self._stop_reason(sample):
                self.finish(sample, reason)
            if request.stream or request.finished:
                grown[request.request_id] = request
        return [self.output(request, finished=request.finished) for request in grown.values()]

    def _advance_beams(
        self,
        request: Request,
        candidates: list[tuple[float, int, int]],
        top: Sequence[Mapping[int, float]] | None,
        now: float,
    ) -> None:
        search, wanted = request.beam_search, request.params.logprobs
        assert search is not None
        if request.first_token_s is None:
            request.first_token_s = now
        logprobs = None
        if wanted is not None:
            rows = top[: len(search.nodes)] if top else [{}] * len(search.nodes)
            logprobs = [dict(itertools.islice(row.items(), wanted)) for row in rows]
        self._scheduler.advance_beams(request, search.advance(candidates, logprobs))
        self.totals.num_generated_tokens += 1

    def output(self, request: Request, *, finished: bool) -> RequestOutput:
        """Freezes a request as far as it has come; see `outputs.output_of`."""

        def decode(token_ids: list[int]) -> str:
            if self._tokenizer is None:
                return ""
            text = TextStream(self._tokenizer, (), request.prompt_token_ids)
            for token in token_ids:
                text.add(token)
            text.flush()
            return text.text

        return output_of(request, decode, finished=finished)

    def _stop_reason(self, sample: Sample) -> str | None:
        reason = sample.stop_reason(self._eos_token_ids)
        if reason == "stop" or self._tokenizer is None:
            return reason
        if sample not in self._texts:
            self._texts[sample] = TextStream(
                self._tokenizer, sample.request.params.stop, sample.request.prompt_token_ids
            )
        text = self._texts[sample]
        text.add(sample.token_ids[-1])
        sample.text = text.text
        return "stop" if text.stopped else reason

    def finish(self, sample: Sample, reason: str) -> None:
        """Ends a sequence, with what its text has held back."""
        text = self._texts.pop(sample, None)
        if text is not None:
            # What was held back may complete a stop string of which the length cut the end.
            text.flush()
            sample.text = text.text
            if text.stopped and reason == "length":
                reason = "stop"
        self._scheduler.finish(sample, reason)
