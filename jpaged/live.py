# SPDX-License-Identifier: Apache-2.0
"""The requests that are live: how they come, run and end, and what becomes of them otherwise."""

import collections
import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jpaged import profiling
from jpaged.host.checks import shown
from jpaged.host.outputs import Completion, GenerationInterrupted, RequestOutput
from jpaged.host.sequence import Request
from jpaged.host.stats import EngineStats
from jpaged.pipeline import Pipeline
from jpaged.recovery import Change
from jpaged.streams import Generation, Mailbox, Owner


class LiveRequests:
    """Runs requests, and hands their outputs to their owners, whoever asks for the step.

    What they run on is whole, or the next call from outside makes it anew: see `enter`.

    Attributes:
      by_id: the requests.
      owners: to whom their outputs go. An owner must outlive its consumer, to say that it went.
      outbox: of requests that have none, the newest outputs that `Engine.step` did not return yet.
      abandoned: of consumers that went; what is live of their requests is still to be aborted.
      change: surrounds what changes any of this.
      pipeline: what they run on.
    """

    def __init__(self, new_pipeline: Callable[[], Pipeline], recover: Callable[[], None]):
        """Has no requests.

        Args:
          new_pipeline: makes one with empty queues and an empty pool.
          recover: makes what the device holds anew, after an interrupt or a failure.
        """
        self.by_id: dict[str, Request] = {}
        self.owners: dict[str, Owner] = {}
        self.outbox: Mailbox = {}
        self.abandoned: collections.deque[Owner] = collections.deque()
        self.change = Change()
        self.pipeline = new_pipeline()
        self._new_pipeline = new_pipeline
        self._recover_device = recover
        self._counter = itertools.count()

    def enter(self, *, reads: bool = False) -> None:
        """Begins a call from outside: the state is whole from here on, but for one that reads.

        Raises:
          RuntimeError: if another call is running.
          EngineDeadError: if the device serves no more.
        """
        if reads and self.change.is_below():
            return
        self.repair()
        self.change.check_alive()

    def repair(self) -> None:
        """Makes the state anew if a change was cut short; ends what nobody waits for any more."""
        self.change.check_caller()
        if self.change.was_cut_short():
            self._recover()
        for owner in list(self.abandoned):
            for request in owner.requests:
                self.abort(request)
            with contextlib.suppress(ValueError):  # a signal handler's call may have done it
                self.abandoned.remove(owner)

    def next_id(self) -> str:
        """An id that no request has, and no output that waits."""
        known = self.by_id, self.outbox
        return next(i for i in map(str, self._counter) if not any(i in k for k in known))

    def get(self, request_id: str) -> Request:
        """The request of an id. Raises: KeyError if it is not live."""
        request = self.by_id.get(request_id) if isinstance(request_id, str) else None
        if request is None:
            raise KeyError(f"no live request {shown(request_id)}")
        return request

    def add(self, requests: Sequence[Request], owner: Owner | None) -> None:
        """Queues requests; their outputs go to an owner, or to the outbox.

        Raises:
          ValueError: if the text of one that resumes cannot be made; nothing has changed then.
        """
        results = self.pipeline.results
        texts = [(seq, results.resumed_text(seq)) for r in requests for seq in r.sequences]
        with self.change:
            for seq, text in texts:
                results.add_text(seq, text)
            for request in requests:
                if owner is not None:
                    self.owners[request.request_id] = owner
                self.pipeline.scheduler.add(request, request.cache_salt)
                self.by_id[request.request_id] = request

    def fork(self, parent: Request, children: Sequence[Request]) -> None:
        """Starts requests where another is, which share its pages.

        Args:
          parent: live, with one sequence.
          children: with its tokens; `Engine.step` reports them.

        Raises:
          ValueError: if the text of one cannot be made; nothing has changed then.
        """
        (source,), scheduler = parent.sequences, self.pipeline.scheduler
        results = self.pipeline.results
        texts = [results.forked_text(source, child.sequences[0]) for child in children]
        with self.change:
            for child, text in zip(children, texts, strict=True):
                results.add_text(child.sequences[0], text)
                scheduler.fork(parent, child)
                self.by_id[child.request_id] = child

    def progress(self, request_id: str) -> list[Completion]:
        """What the samples of a live request have come to; see `Engine.progress`."""
        request = self.get(request_id)
        if request.growth.chooser is not None:
            return []
        return self.pipeline.results.output(request, finished=False).outputs

    def drive(self, request: Request | None = None) -> bool:
        """Runs a step if a request is live, this one or any; outputs go to their owners.

        Returns:
          Whether it was.
        """
        self.repair()
        with self.change:
            live = bool(self.by_id)
            if request is not None:
                live = self.by_id.get(request.request_id) is request
            outputs: Sequence[RequestOutput] = ()
            if live:
                with profiling.step(self.pipeline.results.totals.num_steps):
                    outputs = self.pipeline.step()
            for output in outputs:
                self._deliver(self.by_id[output.request_id], output)
        return live

    def run(
        self, requests: Sequence[Request], stats: Callable[[], EngineStats], *watched: Any
    ) -> list[RequestOutput]:
        """Runs requests until all have ended; see `Engine.generate`.

        Args:
          requests: not queued yet.
          stats: what the progress bar tells.
          *watched: the other arguments of `Generation`.
        """
        generation = Generation(requests, self.abandoned, *watched)
        try:
            with self.change.held():
                self.add(requests, generation.owner)
                return generation.run(self.drive, stats)
        except BaseException as e:
            done = generation.close()
            if not isinstance(e, KeyboardInterrupt):
                raise
            self.repair()
            results = self.pipeline.results
            outputs = [done.get(r.request_id) or results.partial(r) for r in requests]
            raise GenerationInterrupted(outputs) from None

    def abort(self, request: Request) -> None:
        """Ends a request now, if it is live, and delivers what it has produced."""
        with self.change:
            if self.by_id.get(request.request_id) is request:
                results = self.pipeline.results
                results.abort(request)
                self._deliver(request, results.output(request, finished=True))

    def check_invariants(self) -> None:
        """Raises AssertionError if pages are lost or held twice. Cost: every page; for tests."""
        scheduler = self.pipeline.scheduler
        scheduler.check_invariants()
        scheduler.cache.check_roots(r.cache_root for r in self.by_id.values())
        if not self.by_id:
            assert scheduler.table.pool.num_used_pages == 0, "an idle engine holds pages"

    def _recover(self) -> None:
        """Aborts all requests and empties host and device; may be cut short itself, and repeated.

        Nothing is taken up again: whatever keeps the books may have been interrupted itself.
        """
        self.change.begin_repair()
        self.pipeline = self._new_pipeline()
        for request in list(self.by_id.values()):
            self._deliver(request, self.pipeline.results.mark_aborted(request))
        self.owners = {}  # of requests that had not come, or had gone, when it was cut short
        self.change.settle(self._recover_device)

    def _deliver(self, request: Request, output: RequestOutput) -> None:
        owner = self.owners.get(request.request_id)
        mailbox = self.outbox if owner is None else owner.mailbox
        mailbox[request.request_id] = output
        if not output.finished:
            return
        del self.by_id[request.request_id]
        self.owners.pop(request.request_id, None)
        self.pipeline.scheduler.cache.release_root(request.cache_root)
        request.processors = None  # its bitmaps are as large as the vocabulary
        if not self.by_id:
            # What runs ahead computes tokens of ended sequences only: nobody waits for them.
            self.pipeline.drop()
