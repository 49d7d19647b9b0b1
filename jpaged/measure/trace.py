# SPDX-License-Identifier: Apache-2.0
"""Reads a trace of jax's profiler: what the host did in each step, and what ran on the device."""

import collections
import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from jpaged.measure.kinds import CONTAINER, Scopes, kernel_name, kind_of, place_of
from jpaged.profiling import PHASES, STEP

# A program that the host starts: of one in another, as wrappers have it, the outer one counts.
_STARTS = re.compile(r"PjitFunction\(|LoadedExecutable::Execute")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Something that ran on the device: a kernel, a copy; on CPUs an operation of a program.

    Attributes:
      name: where in the model it comes from, as `kinds.place_of` has it, or what it is called.
      kind: of `kinds.ALL_KINDS`.
      start_ns, end_ns: on the trace's clock.
    """

    name: str
    kind: str
    start_ns: float
    end_ns: float


@dataclasses.dataclass(frozen=True)
class Trace:
    """What was traced.

    Attributes:
      device: the device's name in the trace.
      steps: start and end of each step on the host, in nanoseconds, in order.
      phases: of each of `PHASES`, nanoseconds in each step.
      kernels: in order of their start, cut to the span of the steps.
      num_programs: that the host started in the steps.
    """

    device: str
    steps: list[tuple[float, float]]
    phases: dict[str, list[float]]
    kernels: list[Kernel]
    num_programs: int


def read_trace(data: Any, scopes: Scopes) -> Trace:
    """Reads a trace.

    Args:
      data: a `jax.profiler.ProfileData`.
      scopes: of the programs that ran.

    Returns:
      The trace; without steps where none is in it.
    """
    # jaxlib 0.12 makes the type of an event's stats when first asked for them, which Python 3.13
    # deprecates: where warnings are errors the process would end there.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return _read_trace(data, scopes)


def _read_trace(data: Any, scopes: Scopes) -> Trace:
    planes = list(data.planes)
    host = [line for plane in planes if plane.name.startswith("/host") for line in plane.lines]
    steps, events = _steps(host)
    phases = {name: [0.0] * len(steps) for name in PHASES}
    num_programs, index, program_end = 0, 0, 0.0
    for start, end, name in events:
        while index < len(steps) and steps[index][1] <= start:
            index += 1
        if index == len(steps) or start < steps[index][0]:
            continue  # between two steps
        if name in phases:
            phases[name][index] += end - start
        elif start >= program_end and _STARTS.search(name):
            num_programs, program_end = num_programs + 1, end
    device, lines = _device_lines(planes, host)
    span = (steps[0][0], steps[-1][1]) if steps else (0.0, 0.0)
    return Trace(device, steps, phases, _kernels(lines, span, scopes), num_programs)


def _steps(host: list[Any]) -> tuple[list[tuple[float, float]], list[tuple[float, float, str]]]:
    """The steps, and the events of their thread, in order."""
    for line in host:
        events = [(e.start_ns, e.start_ns + e.duration_ns, e.name) for e in line.events]
        steps = sorted((start, end) for start, end, name in events if name == STEP)
        if steps:
            return steps, sorted(events, key=lambda event: (event[0], -event[1]))
    return [], []


def _device_lines(planes: list[Any], host: list[Any]) -> tuple[str, list[Any]]:
    """The lines of the device that has most of them; of a CPU those of its threads."""
    found: list[tuple[str, list[Any]]] = []
    for plane in planes:
        # Others of an accelerator's plane repeat the same, by step, module or name.
        names = ("Stream", "XLA Ops")
        lines = [line for line in plane.lines if line.name.startswith(names)]
        if plane.name.startswith("/device:") and lines:
            found.append((plane.name, lines))
    if found:
        return max(found, key=lambda each: sum(1 for line in each[1] for _ in line.events))
    return "/host:CPU", host


def _kernels(lines: list[Any], span: tuple[float, float], scopes: Scopes) -> list[Kernel]:
    on_host = not any(line.name.startswith(("Stream", "XLA Ops")) for line in lines)
    programs: dict[tuple[str, str], list[tuple[str, str, float, float]]]
    programs = collections.defaultdict(list)
    for line in lines:
        for event in line.events:
            start, end = event.start_ns, event.start_ns + event.duration_ns
            start, end = max(start, span[0]), min(end, span[1])
            if end <= start:
                continue
            name = event.name.partition(" = ")[0].lstrip("%")  # of TPUs it is the whole text
            stats: Mapping[str, Any] = dict(event.stats)
            operation = str(stats.get("hlo_op", ""))
            if (on_host and not operation) or name.startswith("end: "):
                continue
            if CONTAINER.match(name):
                continue
            module = str(stats.get("hlo_module", ""))
            program = str(stats.get("program_id", ""))
            programs[module, program].append((name, operation, start, end))
    kernels = [
        kernel for (module, _), ran in programs.items() for kernel in _named(module, ran, scopes)
    ]
    return sorted(kernels, key=lambda kernel: kernel.start_ns)


def _named(
    module: str, ran: list[tuple[str, str, float, float]], scopes: Scopes
) -> Iterator[Kernel]:
    """The kernels of a program, which may be one CUDA graph: then their own names say more."""
    known = scopes.of(module, {word for name, op, *_ in ran for word in (name, op)})
    for name, operation, start, end in ran:
        scope = known.get(kernel_name(name)) or known.get(operation, "")
        kind = kind_of(module, scope, operation, name)
        yield Kernel(place_of(scope) or name, kind, start, end)
