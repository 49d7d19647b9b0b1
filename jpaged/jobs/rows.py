# SPDX-License-Identifier: Apache-2.0
"""What a job is made of: rows, what came of them, and who takes that."""

import dataclasses
import typing
from typing import Literal

from jpaged.host.outputs import RequestOutput
from jpaged.host.params import SamplingParams
from jpaged.requests import Prompt

_NEUTRAL = SamplingParams()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a job: a request, or what is wrong with it.

    Attributes:
      row_id: unique in the job; with the job's seed it gives the seed of a row that has none.
      prompt: text or token ids; of a row with an error, anything.
      params: how to sample and when to stop.
      error: what is wrong with it, for its record; None for a row that can be tried.
      where: how messages name the row, such as "line 3".
      kind: whether it is answered as a conversation or as a text.
      model: the name that the row gives the model; "" for none.
    """

    row_id: str
    prompt: Prompt = ()
    params: SamplingParams = _NEUTRAL
    error: str | None = None
    where: str = ""
    kind: Literal["chat", "text"] = "text"
    model: str = ""


class Result(typing.NamedTuple):
    """What came of a row.

    Attributes:
      row: which.
      output: its samples; None where it could not be served.
      error: why not, or what ended one of its samples; None where all is well.
    """

    row: Row
    output: RequestOutput | None
    error: str | None


class Sink(typing.Protocol):
    """Takes results."""

    def write(self, result: Result) -> None:
        """Takes one result, of a row that has ended."""

    def tick(self) -> None:
        """Called after each step of the engine, for what is due with time."""
