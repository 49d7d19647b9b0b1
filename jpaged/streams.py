# SPDX-License-Identifier: Apache-2.0
"""To whom outputs belong, whoever runs the step that they come from."""

import collections
import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TypeAlias

import tqdm

from jpaged.host.checks import checked, function
from jpaged.host.outputs import RequestOutput
from jpaged.host.sequence import Request
from jpaged.host.stats import EngineStats

# By request id, of each request the newest output that its owner did not take yet.
Mailbox: TypeAlias = dict[str, RequestOutput]


class Owner(weakref.ref["Consumer"]):
    """What an engine knows of a consumer: enough to reach it, not enough to keep it.

    Attributes:
      requests: the consumer's.
      mailbox: where their outputs go.
    """

    requests: Sequence[Request]
    mailbox: Mailbox


class Consumer:
    """Who gets the outputs of some requests; they are aborted when it goes before their end.

    It may be forgotten at any moment, in the middle of a step too. Its `Owner` is written down
    then, by nothing that an interrupt could strike, and the engine's next call does the rest.

    Attributes:
      owner: to be given to the requests.
      mailbox: of each request the newest output that was not taken yet. Outputs are cumulative, so
        nothing is lost by leaving one out, and nothing grows while nobody looks.
    """

    def __init__(self, requests: Sequence[Request], abandoned: collections.deque[Owner]):
        """Is to be made before the requests are queued.

        Args:
          requests: whose outputs it gets.
          abandoned: where its owner is written down when it goes.
        """
        self.mailbox: Mailbox = {}
        self.owner = Owner(self, abandoned.append)
        self.owner.requests, self.owner.mailbox = requests, self.mailbox
        self._abandoned = abandoned

    def close(self) -> Mailbox:
        """Has what is still live of its requests aborted; may be called at any time, and again.

        Returns:
          What was not taken until then; nothing comes any more.
        """
        self._abandoned.append(self.owner)
        rest, self.mailbox = dict(self.mailbox), {}  # the engine still fills the old one
        return rest


class RequestStream(Consumer, Iterator[RequestOutput]):
    """The outputs of one request, each time that it has grown; see `Engine.stream`.

    The next output runs steps if it is not there yet. Where others run steps meanwhile (another
    stream, `Engine.step`, `Engine.generate`), only the newest output waits; the last one always
    comes. A request that `Engine.abort` or an interrupted step ended yields what it has then.

    Closing it, leaving it as a context manager or forgetting it aborts the request.

    Attributes:
      request_id: for instance to `Engine.fork` it.
    """

    def __init__(
        self,
        request: Request,
        abandoned: collections.deque[Owner],
        drive: Callable[[Request], bool],
        on_step: Callable[[], object],
    ):
        """See `Consumer`.

        Args:
          request: not queued yet.
          abandoned: where it is left when the stream goes.
          drive: runs a step if the request is live, and returns whether it was.
          on_step: as in `Engine.stream`.

        Raises:
          ValueError: if the last is of a wrong type.
        """
        function("on_step", on_step)
        super().__init__([request], abandoned)
        self.request_id = request.request_id
        self._request = request
        self._drive, self._on_step = drive, on_step

    def __next__(self) -> RequestOutput:
        """Returns the next output.

        Raises:
          StopIteration: after the last one.
          BaseException: what interrupts the step, as in `Engine.step`.
        """
        while not self.mailbox and self._drive(self._request):
            self._on_step()
        if not self.mailbox:
            raise StopIteration
        output = self.mailbox[self.request_id]
        del self.mailbox[self.request_id]  # no call: no interrupt comes between, and loses it
        return output

    def __enter__(self) -> "RequestStream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Generation(Consumer):
    """Requests that are answered together; see `Engine.generate`."""

    def __init__(
        self,
        requests: Sequence[Request],
        abandoned: collections.deque[Owner],
        progress: bool,
        on_step: Callable[[], object],
        on_output: Callable[[int, RequestOutput], object] | None,
    ):
        """See `Consumer`.

        Args:
          requests: likewise.
          abandoned: likewise.
          progress: as in `Engine.generate`, like the rest.
          on_step: likewise.
          on_output: likewise.

        Raises:
          ValueError: if one of the last three is of a wrong type.
        """
        self._progress = checked("progress", progress, bool)
        function("on_step", on_step)
        if on_output is not None:
            function("on_output", on_output)
        self._on_step, self._on_output = on_step, on_output
        super().__init__(requests, abandoned)

    def run(
        self, drive: Callable[[], bool], stats: Callable[[], EngineStats]
    ) -> list[RequestOutput]:
        """Runs steps until all have ended.

        Args:
          drive: runs a step, and returns whether a request of anybody was live.
          stats: what the progress bar tells.

        Returns:
          The outputs, in order.
        """
        requests, on_output = self.owner.requests, self._on_output
        indices = {request.request_id: index for index, request in enumerate(requests)}
        num_done = 0
        with contextlib.ExitStack() as stack:
            bar = None
            if self._progress:
                # miniters=0 redraws the bar with time, also while no request ends.
                bar = stack.enter_context(
                    tqdm.tqdm(total=len(requests), unit="request", miniters=0)
                )
            while num_done < len(requests):
                alive = drive()
                assert alive or len(self.mailbox) == len(requests), "a request was lost"
                self._on_step()
                new = list(self.mailbox.values())[num_done:]
                num_done += len(new)
                for output in new:
                    if on_output is not None:
                        on_output(indices[output.request_id], output)
                if bar is not None:
                    bar.set_postfix_str(stats().progress_line(), refresh=False)
                    bar.update(len(new))
        outputs = [self.mailbox[request_id] for request_id in indices]
        # Whatever still holds one of the requests does not hold all that came of them.
        self.owner.requests, self.owner.mailbox = (), {}
        return outputs
