# SPDX-License-Identifier: Apache-2.0
"""Which step shapes a job needs, how often, and what they cost: padding, and compiling."""

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping

from jpaged.host.batch import ShapeBuckets, StepShape


class UnplannedProgramError(RuntimeError):
    """A step of a shape that is not compiled, of an engine with strict_shapes; says what to add."""


class StepSize(typing.NamedTuple):
    """What a step computes, before it is padded.

    Attributes:
      num_tokens: of all sequences.
      num_rows: sequences, or samples where those are more.
    """

    num_tokens: int
    num_rows: int


@dataclasses.dataclass(frozen=True)
class JobSteps:
    """The steps of a job.

    Attributes:
      most: no step is larger, however the job goes.
      sizes: how many steps of each size there are if every answer is as long as it may be.
    """

    most: StepSize
    sizes: Mapping[StepSize, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PlannedShape:
    """A shape that is compiled, and the steps of a job that have it.

    Attributes:
      shape: the shape.
      num_steps: steps that are padded to it; 0 for what a job may need where answers end early.
      num_tokens: tokens that they compute, padding left out.
      compile_s: seconds that compiling took; None where that is not known.
    """

    shape: StepShape
    num_steps: int = 0
    num_tokens: int = 0
    compile_s: float | None = None

    @property
    def padded_tokens(self) -> int:
        """Tokens that the device computes in these steps."""
        return self.num_steps * self.shape.num_tokens


@dataclasses.dataclass(frozen=True)
class CompilePlan:
    """The shapes to compile ahead of a job.

    Attributes:
      shapes: the smallest first.
    """

    shapes: tuple[PlannedShape, ...]

    @classmethod
    def of(cls, buckets: ShapeBuckets, job: JobSteps) -> "CompilePlan":
        """Plans for a job: every shape that it can have, as answers may end early."""
        planned = {shape: PlannedShape(shape) for shape in buckets.shapes_within(*job.most)}
        for size, count in job.sizes.items():
            shape = buckets.shape(*size, 0)
            old = planned.get(shape, PlannedShape(shape))
            tokens = old.num_tokens + count * size.num_tokens
            planned[shape] = PlannedShape(shape, old.num_steps + count, tokens)
        return cls(tuple(planned[shape] for shape in sorted(planned)))

    @property
    def padded_tokens(self) -> int:
        """Tokens that the device computes in all steps."""
        return sum(each.padded_tokens for each in self.shapes)

    def timed(self, seconds: Mapping[StepShape, float]) -> "CompilePlan":
        """The plan with what compiling took."""
        return CompilePlan(
            tuple(
                dataclasses.replace(each, compile_s=seconds.get(each.shape, each.compile_s))
                for each in self.shapes
            )
        )

    def table(self) -> Iterator[str]:
        """Lines for people: a shape each, and the sum."""
        yield "   tokens x rows    steps      tokens   padding   compiled in"
        for each in self.shapes:
            yield _line(f"{each.shape.num_tokens:,} x {each.shape.num_rows:,}", (each,))
        yield _line(f"{len(self.shapes)} shapes", self.shapes)


def fewest_shapes(buckets: ShapeBuckets, job: JobSteps, most_added: float) -> ShapeBuckets:
    """Chooses few shapes for a job, of which one holds every step that it can have.

    Of those that its steps have by the ladder, it leaves out again and again the one that adds
    least padding: a decode step goes to a larger decode shape, and any other to a larger one.

    Args:
      buckets: the ladder, without shapes that are given.
      job: its steps, of sizes that are known.
      most_added: tokens of padding that may be added, as a share of the tokens that the device
        computes by the ladder; at least 0.
    """

    def chosen(shapes: Iterable[StepShape]) -> ShapeBuckets:
        return dataclasses.replace(buckets, given=tuple(sorted(shapes)))

    def padded(shapes: Iterable[StepShape]) -> int:
        trial = chosen(shapes)
        return sum(n * trial.shape(*size, 0).num_tokens for size, n in job.sizes.items())

    largest = buckets.shape(*job.most, 0)
    kept = {buckets.shape(*size, 0) for size in job.sizes} | {largest}
    most = (1 + most_added) * padded(kept)
    while len(kept) > 1:
        cost, _, fewer = min(
            (padded(kept - {shape}), shape, kept - {shape}) for shape in kept - {largest}
        )
        if cost > most:
            break
        kept = fewer
    return chosen(kept)


def _line(name: str, shapes: tuple[PlannedShape, ...]) -> str:
    steps, tokens = sum(s.num_steps for s in shapes), sum(s.num_tokens for s in shapes)
    padded = sum(s.padded_tokens for s in shapes)
    padding = f"{1 - tokens / padded:.1%}" if padded else "-"
    known = [s.compile_s for s in shapes if s.compile_s is not None]
    seconds = f"{sum(known):.2f} s" if known else "-"
    return f"{name:>16} {steps:8,} {tokens:11,} {padding:>9} {seconds:>13}"
