# SPDX-License-Identifier: Apache-2.0
"""Takes what steps have found: who grows by which tokens, and who has ended."""

import itertools
import math
import time
from collections.abc import Collection, Mapping
from collections.abc import Sequence as SequenceOf

from jpaged.host.growth.base import Candidate, Outcome
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import Request, Sequence, Status
from jpaged.host.stats import Counters
from jpaged.host.step import Search
from jpaged.host.step_builder import ScheduledStep


class StepReader:
    """Gives sequences their tokens, and ends those that they end.

    What goes wrong with the data of one request ends it, or one sequence of it, with an error, and
    no other. `refuse` and `not_finite` say what the error is, `stop_reason` and `finish` may do
    more than here: see `jpaged.results.ResultReader`.

    Attributes:
      totals: brought up to date with each step.
      eos_token_ids: tokens that end a sequence.
    """

    def __init__(self, scheduler: Scheduler, eos_token_ids: Collection[int], totals: Counters):
        """Remembers whose sequences they are, and which tokens end them."""
        self.totals = totals
        self._scheduler = scheduler
        self.eos_token_ids = eos_token_ids

    def take(self, step: ScheduledStep, outcome: Outcome) -> list[Request]:
        """Takes what a step has found.

        Returns:
          The requests that have grown, those first whose sequences are chosen together.
        """
        now = time.perf_counter()
        grown: dict[str, Request] = {}
        for (request, position), (logprob, likeliest) in zip(
            step.scored, outcome.scores, strict=True
        ):
            assert request.scored is not None
            request.scored.take(position, logprob, likeliest)
        for request, search, candidates in zip(
            step.searchers, step.plan.searches, outcome.candidates, strict=True
        ):
            # An abort may have ended it meanwhile.
            if request.sequences[0].status is not Status.FINISHED:
                self._count(step, self._choose(request, search, candidates, outcome))
                grown[request.request_id] = request
        searched = {
            slot
            for search in step.plan.searches
            for slot in range(search.first_sample, search.first_sample + len(search.scores))
        }
        num_taken, ended = 0, Status.FINISHED
        drawn = zip(step.samples, outcome.tokens, outcome.logprobs, strict=True)
        for slot, (sample, token, logprob) in enumerate(drawn):
            # The step before may have ended it, when this one was on its way already.
            if sample.status is ended or slot in searched:
                continue
            request = sample.request
            grown[request.request_id] = request
            if _is_sound(request, logprob):
                likeliest = outcome.likeliest[slot] if outcome.likeliest else {}
                reported = outcome.reported.get(slot, logprob)
                self._take_token(sample, token, logprob, reported, likeliest)
                num_taken += 1
            else:
                self._fail(sample, self.not_finite([sample]))
        self._count(step, num_taken)
        for request in grown.values():
            if request.first_token_s is None:
                request.first_token_s = now
        return list(grown.values())

    def stop_reason(self, sample: Sequence) -> str | None:
        """Why the newest token ends a sequence; None if it does not."""
        return sample.stop_reason(self.eos_token_ids)

    def finish(self, sample: Sequence, reason: str) -> None:
        """Ends a sequence."""
        self._scheduler.finish(sample, reason)

    def refuse(self, error: BaseException) -> str:
        """What to say of an exception that ends a request. Raises: it, if it must not."""
        raise error

    def not_finite(self, samples: SequenceOf[Sequence]) -> str:
        """What to say of sequences whose logits are NaN or infinite."""
        return "NaN or infinite logits"

    def fail_request(self, request: Request, error: str) -> None:
        """Ends a request whose sequences are chosen together."""
        chooser = request.growth.chooser
        assert chooser is not None
        chooser.fail(error)
        if request.sequences[0].status is not Status.FINISHED:
            self._scheduler.continue_from(request, [])

    def _count(self, step: ScheduledStep, num_tokens: int) -> None:
        self.totals.num_generated_tokens += num_tokens
        if not step.plan.num_prefill_tokens:
            self.totals.num_decode_tokens += num_tokens

    def _choose(
        self,
        request: Request,
        search: Search,
        candidates: SequenceOf[Candidate],
        outcome: Outcome,
    ) -> bool:
        """Has a request go on with the best of what was found. Returns: whether it could."""
        chooser = request.growth.chooser
        assert chooser is not None
        own = slice(search.first_sample, search.first_sample + len(search.scores))
        if not all(_is_sound(request, logprob) for logprob in outcome.logprobs[own]):
            self.fail_request(request, self.not_finite(request.sequences))
            return False
        try:
            likeliest = outcome.likeliest
            parents = chooser.accept(candidates, likeliest[own] if likeliest else None)
        except BaseException as e:
            self.fail_request(request, self.refuse(e))
            return False
        self._scheduler.continue_from(request, parents)
        return True

    def _take_token(
        self,
        sample: Sequence,
        token: int,
        logprob: float,
        reported: float,
        likeliest: Mapping[int, float],
    ) -> None:
        try:
            if (wanted := sample.request.params.logprobs) is not None:
                kept = itertools.islice(likeliest.items(), wanted)
                sample.logprobs.append({token: reported, **dict(kept)})
            sample.receive(token, logprob)
            reason = self.stop_reason(sample)
        except BaseException as e:
            self._fail(sample, self.refuse(e))
            return
        if reason:
            self.finish(sample, reason)

    def _fail(self, sample: Sequence, error: str) -> None:
        sample.error = error
        self.finish(sample, "error")


def _is_sound(request: Request, logprob: float) -> bool:
    """Whether a token was drawn from logits, and its prompt scored with some, that are finite."""
    return math.isfinite(logprob) and (request.scored is None or request.scored.is_finite)
