# SPDX-License-Identifier: Apache-2.0
"""Which sequences run, wait and drain, in order of priority and age."""

import bisect
import collections
import itertools
import operator
from collections.abc import Iterator, MutableSequence
from collections.abc import Sequence as SequenceOf

from jpaged.host.sequence import Request, Sequence, Status


class Queues:
    """The sequences of a scheduler, and the places that they take.

    Attributes:
      running: hold pages and are scheduled, in their order.
      waiting: hold none, in their order; but first come those that others of their request wait
        for, which run.
      draining: scheduled for the last time in the step before.
      num_changes: how often other sequences ran than before.

    Invariants:
      - Running and waiting ones are in order (`Sequence.order`): by priority, of one priority
        oldest first. So the running sequences of a request stand side by side.
      - Running sequences number at most max_num_seqs.
    """

    def __init__(self, max_num_seqs: int):
        """Makes empty queues with so many places to run in."""
        self.max_num_seqs = max_num_seqs
        self.running: list[Sequence] = []
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.draining: list[Sequence] = []
        self.num_changes = 0

    def group(self, index: int) -> list[Sequence]:
        """The running sequences of a request, of which the first is at `index`."""
        running = self.running
        request = running[index].request
        if len(request.sequences) == 1:
            return running[index : index + 1]
        end = index + 1
        while end < len(running) and running[end].request is request:
            end += 1
        return running[index:end]

    def last(self) -> list[Sequence]:
        """The running sequences of the request that is last in order."""
        first = len(self.running) - 1
        while first and self.running[first - 1].request is self.running[first].request:
            first -= 1
        return self.running[first:]

    def num_free_places(self) -> int:
        """Sequences that can still start."""
        places, last = self.max_num_seqs, None
        for seq in self.running:
            reserved = seq.request.growth.reserved_places
            if not reserved:
                places -= 1
            elif seq.request is not last:
                last = seq.request
                places -= reserved
        return places

    def places_needed(self, request: Request, count: int) -> int:
        """Free places that `count` sequences of a request need to start."""
        reserved = request.growth.reserved_places
        if not reserved:
            return count
        return 0 if any(seq.request is request for seq in self.running) else reserved

    def has_turn(self, seq: Sequence) -> bool:
        """Whether a sequence may start: a place is free, and nobody waits who comes before it."""
        firsts = itertools.islice(self.waiting, self._num_awaited() + 1)
        return self.num_free_places() > 0 and all(seq.order < other.order for other in firsts)

    def queue(self, seq: Sequence) -> None:
        """Has a sequence wait where its order says."""
        _insert(self.waiting, seq, self._num_awaited())

    def start(self, seqs: SequenceOf[Sequence]) -> None:
        """Has sequences run that do not wait, where their order says."""
        self.num_changes += 1
        for seq in seqs:
            _insert(self.running, seq)
            seq.status = Status.RUNNING

    def stop(self, seqs: SequenceOf[Sequence]) -> None:
        """Has sequences of a request that run wait where their order says."""
        self.num_changes += 1
        for seq in seqs:
            self.running.remove(seq)
            seq.status = Status.WAITING
        again = list(seqs)
        while self.waiting and self.waiting[0].request is seqs[0].request:
            again.append(self.waiting.popleft())  # which nobody who runs waits for any more
        for seq in again:
            self.queue(seq)

    def drain(self, seq: Sequence) -> None:
        """Takes a sequence whose last step was scheduled off those that run."""
        self.num_changes += 1
        self.running.remove(seq)
        self.draining.append(seq)
        seq.status = Status.DRAINING

    def replace(self, before: SequenceOf[Sequence], after: SequenceOf[Sequence]) -> None:
        """Puts sequences where others of their request stand, with the status of the first."""
        self.num_changes += 1
        status = before[0].status
        if status is Status.RUNNING:
            at = self.running.index(before[0])
            self.running[at : at + len(before)] = after
        else:
            at = self.waiting.index(before[0])
            waiting = list(self.waiting)
            waiting[at : at + len(before)] = after
            self.waiting = collections.deque(waiting)
        for seq in before:
            seq.status = Status.FINISHED
        for seq in after:
            seq.status = status

    def remove(self, seq: Sequence) -> None:
        """Takes a sequence off the queue that it is in, if it is in one."""
        self.num_changes += 1
        queues = {Status.RUNNING: self.running, Status.WAITING: self.waiting}
        queue = queues.get(seq.status, self.draining)
        if queue is not self.draining or seq in queue:
            queue.remove(seq)

    def holders(self) -> Iterator[Sequence]:
        """Sequences that have pages."""
        yield from self.running
        yield from (seq for seq in self.draining if seq.table_id is not None)

    def check_invariants(self) -> None:
        """Raises AssertionError if a queue has what does not belong there; for tests."""
        assert len(self.running) <= self.max_num_seqs
        assert all(seq.status is Status.RUNNING for seq in self.running)
        assert all(seq.status is Status.WAITING for seq in self.waiting)
        assert all(seq.table_id is None for seq in self.waiting)
        behind = list(self.waiting)[self._num_awaited() :]
        for queue in (self.running, behind):
            orders = [seq.order for seq in queue]
            assert orders == sorted(set(orders)), "sequences are out of order"

    def _num_awaited(self) -> int:
        """How many wait, before all others, that sequences which run cannot go on without."""
        if not self.waiting or self.waiting[0].request.growth.num_rows == 1:
            return 0
        request = self.waiting[0].request
        if all(seq.status is not Status.RUNNING for seq in request.sequences):
            return 0
        return sum(seq.request is request for seq in self.waiting)


_order = operator.attrgetter("order")


def _insert(queue: MutableSequence[Sequence], seq: Sequence, start: int = 0) -> None:
    """Puts a sequence among others that are in order, from one on."""
    if len(queue) == start or queue[-1].order < seq.order:
        queue.append(seq)  # as most are who come
    else:
        bisect.insort(queue, seq, start, key=_order)
