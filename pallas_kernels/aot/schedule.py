# SPDX-License-Identifier: Apache-2.0
"""Reads the schedule that the TPU compiler made of a kernel.

A bundle is what a TensorCore issues in one cycle at best: it may wait for memory, so bundles rank
variants of a kernel and are no time.
"""

import dataclasses
import json
import pathlib
import re


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of the schedule, those within it included.

    Attributes:
      depth: how many loops it is in, itself included; 1 is the grid.
      bundles: its length.
      dma_bytes: what one trip copies, in bytes, as far as sizes are constant.
      slots: share of the bundles' slots in use, by kind of unit.
    """

    depth: int
    bundles: int
    dma_bytes: int
    slots: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A kernel's schedule.

    Attributes:
      bundles: its length.
      loops: in the order in which they start.
      vmem_bytes: vector memory that the kernel takes, or None if the compiler did not say.
      spill_bytes: of it, for registers that did not suffice.
    """

    bundles: int
    loops: tuple[Loop, ...]
    vmem_bytes: int | None
    spill_bytes: int | None


_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|\d+)\s+([A-Z]{2}(?: [A-Z]{2})*)?\s*:\s*((?:> ?)*)\s*\{")
_DMA = re.compile(r"= dma\.[a-z_]+[^;]*?/\*size_in_granules=\*/(%?\w+)")


def read_schedule(dump: pathlib.Path, kernel: str, dma_granule_bytes: int) -> Schedule:
    """Reads the files that libtpu wrote.

    Args:
      dump: the directory of `--xla_jf_dump_to`.
      kernel: name that was given to `pallas_call`.
      dma_granule_bytes: see `Target`.

    Raises:
      FileNotFoundError: if there are none of that kernel.
      ValueError: if they do not look like those of the versions that this was written for.
    """
    name = rf"^\d+-{re.escape(kernel)}(\.\d+)?-\d+-final"
    bundles = _newest(dump, rf"{name}_bundles\.txt$")
    slots = _newest(dump, rf"{name}_hlo-static-per-bundle-utilization\.txt$")
    if bundles is None or slots is None:
        raise FileNotFoundError(f"no schedule of {kernel!r} in {dump}")
    lines = slots.read_text().splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    capacity = [int(number) for number in lines[2].split()]
    used = [[int(number) for number in line.split()] for line in lines[4:] if line.strip()]
    if len(names) != len(capacity):
        raise ValueError(f"{slots} has {len(names)} units and {len(capacity)} capacities")

    def share(start: int, end: int) -> dict[str, float]:
        return {
            unit: sum(row[i] for row in used[start:end]) / (capacity[i] * max(end - start, 1))
            for i, unit in enumerate(names)
        }

    num_bundles, loops = _read_bundles(bundles, dma_granule_bytes)
    if not 0 < num_bundles <= len(used):
        raise ValueError(f"{bundles} has {num_bundles} bundles, {slots} has {len(used)}")
    report = _newest(dump, r"vmem_report\.html$")
    vmem, spill = _read_vmem(report, kernel) if report else (None, None)
    return Schedule(
        num_bundles,
        tuple(
            Loop(loop.depth, loop.end - loop.start, loop.dma_bytes, share(loop.start, loop.end))
            for loop in loops
        ),
        vmem,
        spill,
    )


@dataclasses.dataclass
class _OpenLoop:
    depth: int
    start: int
    end: int = 0
    dma_bytes: int = 0


def _read_bundles(path: pathlib.Path, dma_granule_bytes: int) -> tuple[int, list[_OpenLoop]]:
    count, depth = 0, 0
    loops: list[_OpenLoop] = []
    open_loops: dict[int, _OpenLoop] = {}
    for line in path.read_text().splitlines():
        if match := _BUNDLE.match(line):
            at = int(match[1], 0)
            if not re.search(r":\s*\{\}", line):  # empty bundles show no depth
                depth = match[3].count(">")
            count = at + 1
            tags = match[2] or ""
            # A loop ends where the path falls through its branch back, or where another begins.
            # In between, a bundle that only moves registers may show the depth outside.
            if "PF" in tags or "LB" in tags:
                for other in [other for other in open_loops if other > depth]:
                    open_loops.pop(other).end = at
            if "LB" in tags:
                if depth in open_loops:
                    open_loops[depth].end = at
                open_loops[depth] = _OpenLoop(depth, at)
                loops.append(open_loops[depth])
        # Comments on bounds checks quote the copy again.
        for granules in _DMA.findall(re.sub(r"BoundsCheck \d+ \[.*", "", line)):
            for loop in open_loops.values():
                loop.dma_bytes += int(granules) * dma_granule_bytes if granules.isdigit() else 0
    for loop in open_loops.values():
        loop.end = count
    return count, loops


def _read_vmem(path: pathlib.Path, kernel: str) -> tuple[int | None, int | None]:
    text = path.read_text()
    start = text.index("const DATA =") + len("const DATA =")
    data, _ = json.JSONDecoder().raw_decode(text[start:].lstrip())
    for name, breakdown in data["hlo_breakdowns"].items():
        if re.search(rf"(?<![\w]){re.escape(kernel)}(\.\d+)?(?![\w])", name):
            allocations = [a for block in breakdown["blocks"] for a in block["allocations"]]
            spill = sum(a["size"] for a in allocations if a.get("tag") == "SPILL")
            return breakdown["total_size"], spill
    return None, None


def _newest(dump: pathlib.Path, pattern: str) -> pathlib.Path | None:
    matching = [path for path in dump.iterdir() if re.search(pattern, path.name)]
    return max(matching, key=lambda path: path.name, default=None)
