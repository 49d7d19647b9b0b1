# SPDX-License-Identifier: Apache-2.0
"""Where the time of steps goes, as figures and as one page."""

import collections
import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from jpaged.measure.floor import Floor
from jpaged.measure.kinds import ALL_KINDS
from jpaged.measure.trace import Kernel, Trace

_LARGEST = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What the traced steps computed, by the engine's own counts.

    Attributes:
      steps: of the device; one call of the engine may dispatch several.
      rows: sequences, of all steps together, as are the others.
      prefill_tokens: tokens of prompts.
      page_bytes: bytes of the pages in use.
      compilations: programs that were compiled meanwhile.
    """

    steps: int
    rows: int
    prefill_tokens: int
    page_bytes: float
    compilations: int

    @property
    def tokens(self) -> float:
        """Tokens of a step; a row with a piece of its prompt counts as one more."""
        return (self.prefill_tokens + self.rows) / self.steps


def make_breakdown(trace: Trace, work: Work, floor: Floor) -> dict[str, Any]:
    """Sums a trace up.

    Args:
      trace: with a step at least.
      work: what the steps computed.
      floor: of a step of that size.

    Returns:
      A JSON object; docs/performance.md explains each of its figures. Times are in microseconds.
    """
    starts = [start for start, _ in trace.steps]
    span_ns = trace.steps[-1][1] - starts[0]
    inside = [end - start for start, end in trace.steps]
    named = [sum(each) for each in zip(*trace.phases.values(), strict=True)]
    host = {name: _quantiles(values) for name, values in trace.phases.items()}
    host["rest of the step"] = _quantiles([a - b for a, b in zip(inside, named, strict=True)])
    between = [b - a for (_, a), b in zip(trace.steps, starts[1:], strict=False)]
    host["between steps"] = _quantiles(between or [0.0])
    step_us = span_ns / work.steps / 1e3
    busy_ns, shares = _shared_out(trace.kernels)
    floor_us = 1e6 * floor.s
    return {
        "steps": work.steps,
        "calls": len(trace.steps),
        "rows_per_step": work.rows / work.steps,
        "prefill_tokens_per_step": work.prefill_tokens / work.steps,
        "compilations": work.compilations,
        "step_us": step_us,
        "call_us": _quantiles(inside),
        "host_us": host,
        "device": {
            "name": trace.device,
            "busy_us": busy_ns / work.steps / 1e3,
            "idle_us": (span_ns - busy_ns) / work.steps / 1e3,
            "programs": trace.num_programs / work.steps,
            "kernels": len(trace.kernels) / work.steps,
            "by_kind": _by_kind(trace.kernels, shares, work.steps),
            "largest": _largest(trace.kernels, work.steps),
        },
        "floor": {
            **dataclasses.asdict(floor),
            "bytes_us": 1e6 * floor.bytes_s,
            "flops_us": 1e6 * floor.flops_s,
            "step_us": floor_us,
        },
        "step_over_floor": step_us / floor_us,
        "busy_over_floor": busy_ns / work.steps / 1e3 / floor_us,
    }


def _quantiles(values_ns: Sequence[float]) -> dict[str, float]:
    ordered = sorted(value / 1e3 for value in values_ns)
    p90 = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return {"median": statistics.median(ordered), "p90": p90, "mean": statistics.fmean(ordered)}


def _shared_out(kernels: Sequence[Kernel]) -> tuple[float, dict[str, float]]:
    """Nanoseconds in which something ran, and what of them each kind has.

    Kernels that run at once share the time, so that kinds add up to what the device was busy.
    """
    edges = sorted(
        edge
        for kernel in kernels
        for edge in ((kernel.start_ns, 1, kernel.kind), (kernel.end_ns, -1, kernel.kind))
    )
    running: collections.Counter[str] = collections.Counter()
    shares, busy, last, count = dict.fromkeys(ALL_KINDS, 0.0), 0.0, 0.0, 0
    for at, change, kind in edges:
        if count and at > last:
            busy += at - last
            for each, number in running.items():
                shares[each] += (at - last) * number / count
        last, count = at, count + change
        running[kind] += change
    return busy, shares


def _by_kind(
    kernels: Iterable[Kernel], shares: dict[str, float], steps: int
) -> dict[str, dict[str, float]]:
    counts = collections.Counter(kernel.kind for kernel in kernels)
    return {
        kind: {"us": shares[kind] / steps / 1e3, "kernels": counts[kind] / steps}
        for kind in ALL_KINDS
    }


def _largest(kernels: Iterable[Kernel], steps: int) -> list[dict[str, Any]]:
    """The names on which most time went, each with its own time, whatever ran beside it."""
    total: dict[tuple[str, str], float] = collections.defaultdict(float)
    count: collections.Counter[tuple[str, str]] = collections.Counter()
    for kernel in kernels:
        total[kernel.name, kernel.kind] += kernel.end_ns - kernel.start_ns
        count[kernel.name, kernel.kind] += 1
    return [
        {"name": name, "kind": kind, "us": ns / steps / 1e3, "kernels": count[name, kind] / steps}
        for (name, kind), ns in sorted(total.items(), key=lambda item: -item[1])[:_LARGEST]
    ]


def draw(found: dict[str, Any]) -> str:
    """The page that people read. Args: what `make_breakdown` returned, with what it was made on."""
    hardware, step_us = found["hardware"], found["step_us"]
    lines = [
        f"{hardware['device']} ({hardware['cpu']}, {hardware['cpu_cores']} cores), "
        f"jax {found['versions']['jax']}",
        f"{found['steps']} steps in {found['calls']} calls, of {found['rows_per_step']:.1f} "
        f"sequences and {found['prefill_tokens_per_step']:.1f} tokens of prompts; us a step",
    ]
    if found["compilations"]:
        lines.append(f"{found['compilations']} programs were compiled meanwhile: run it again")
    over = f"{found['step_over_floor']:.2f} x the floor"
    lines += ["", f"{'step, start to start':<26}{step_us:12,.1f}   {over}"]
    lines += ["", f"{'host, in a call':<26}{'median':>12}{'p90':>12}{'mean':>12}"]
    for name, own in found["host_us"].items():
        cells = "".join(f"{own[q]:12,.1f}" for q in ("median", "p90", "mean"))
        lines.append(f"  {name:<24}{cells}")
    lines += ["", *_device_lines(found["device"], step_us, found["busy_over_floor"])]
    return "\n".join([*lines, "", *_floor_lines(found["floor"])]) + "\n"


def _device_lines(device: dict[str, Any], step_us: float, over_floor: float) -> list[str]:
    lines = [f"{'device ' + device['name']:<26}{'':>12}{'of the step':>12}{'kernels':>12}"]
    for kind, own in device["by_kind"].items():
        share = own["us"] / step_us
        lines.append(f"  {kind:<24}{own['us']:12,.1f}{share:12.1%}{own['kernels']:12,.1f}")
    busy_us, idle_us = device["busy_us"], device["idle_us"]
    busy = f"  {'busy':<24}{busy_us:12,.1f}{busy_us / step_us:12.1%}{device['kernels']:12,.1f}"
    lines += [
        f"{busy}   {over_floor:.2f} x the floor",
        f"  {'idle':<24}{idle_us:12,.1f}{idle_us / step_us:12.1%}",
        f"  {'programs started':<24}{device['programs']:12,.1f}",
        "",
        "on most of the device's time",
    ]
    for own in device["largest"]:
        cells = f"{own['us']:12,.1f}{'':12}{own['kernels']:12,.1f}"
        lines.append(f"  {own['kind']:<24}{cells}   {own['name'][:64]}")
    return lines


def _floor_lines(floor: dict[str, Any]) -> list[str]:
    megabytes = f"weights {floor['weight_bytes'] / 1e6:,.1f} MB, pages "
    megabytes += f"{floor['page_bytes'] / 1e6:,.1f} MB, a copy "
    copied, product = floor["copy_bytes_per_s"] / 1e9, floor["product_flops_per_s"] / 1e12
    flops = f"{floor['flops'] / 1e9:,.2f} GFLOP, a product"
    return [
        "floor",
        f"  {'bytes':<24}{floor['bytes_us']:12,.1f}   {megabytes}{copied:,.1f} GB/s",
        f"  {'operations':<24}{floor['flops_us']:12,.1f}   {flops} {product:,.3f} TFLOP/s",
        f"  {'the larger':<24}{floor['step_us']:12,.1f}",
    ]
