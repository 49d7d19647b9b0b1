# SPDX-License-Identifier: Apache-2.0
"""Which sequences run, wait and drain, in order of age."""

import collections
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

from jpaged.host.sequence import Request, Sequence, Status


class Queues:
    """The sequences of a scheduler, and the places that they take.

    Attributes:
      running: hold pages and are scheduled, oldest request first.
      waiting: hold none, oldest first.
      draining: scheduled for the last time in the step before.

    Invariants:
      - Every running sequence is older than every waiting one.
      - The running sequences of a request stand side by side.
      - Running sequences number at most max_num_seqs.
    """

    def __init__(self, max_num_seqs: int):
        """Makes empty queues with so many places to run in."""
        self.max_num_seqs = max_num_seqs
        self.running: list[Sequence] = []
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.draining: list[Sequence] = []

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

    def youngest(self) -> list[Sequence]:
        """The running sequences of the youngest request."""
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

    def queue(self, seq: Sequence, behind: Sequence) -> None:
        """Has a sequence wait behind another that waits, or as the next if that one does not."""
        if behind.status is Status.WAITING:
            self.waiting.insert(self.waiting.index(behind) + 1, seq)
            return
        # Behind those that wait for others of their request, which run already.
        last = self.running[-1].request if self.running else None
        self.waiting.insert(sum(other.request is last for other in self.waiting), seq)

    def start(self, seqs: SequenceOf[Sequence], behind: Sequence | None = None) -> None:
        """Has sequences run, right behind another; None puts them at the end."""
        at = len(self.running) if behind is None else self.running.index(behind) + 1
        self.running[at:at] = seqs
        for seq in seqs:
            seq.status = Status.RUNNING

    def stop(self, seqs: SequenceOf[Sequence]) -> None:
        """Has running sequences wait before all others, in this order."""
        for seq in seqs:
            self.running.remove(seq)
            seq.status = Status.WAITING
        self.waiting.extendleft(reversed(seqs))

    def drain(self, seq: Sequence) -> None:
        """Takes a sequence whose last step was scheduled off those that run."""
        self.running.remove(seq)
        self.draining.append(seq)
        seq.status = Status.DRAINING

    def replace(self, before: SequenceOf[Sequence], after: SequenceOf[Sequence]) -> None:
        """Puts sequences where others of their request stand, with the status of the first."""
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
        assert all(seq.table_id is None for seq in self.waiting)
        seen: list[Request] = []
        for seq in self.running:
            if not seen or seen[-1] is not seq.request:
                assert seq.request not in seen, "sequences of a request stand apart"
                seen.append(seq.request)
