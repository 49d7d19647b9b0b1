# SPDX-License-Identifier: Apache-2.0
"""Figures of a device: what they aim at, what reports come to, and a file that has them all."""

import json
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# Of a figure, at least or at most what.
TARGETS: Mapping[str, tuple[str, float]] = MappingProxyType(
    {
        "step_over_floor_64": ("<=", 1.6),
        "step_over_floor_1": ("<=", 1.6),
        "speedup_over_static_64": (">=", 3.0),
        "prefill_over_product_rate": (">=", 0.5),
        "attention_us_1": ("<=", 13.0),
        "attention_copy_ratio_8": (">=", 0.85),
        "attention_copy_ratio_64": (">=", 0.97),
        "prefill_attention_over_cudnn": (">=", 0.8),
    }
)


class Figures:
    """figures.json, written whole each time a figure comes."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def read(self) -> dict[str, Any]:
        """What there is; nothing before the first."""
        try:
            return json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {"figures": {}, "parts": {}}

    def add(self, section: str, **values: Any) -> None:
        """Adds figures, or whatever else a section has."""
        report = self.read()
        report.setdefault(section, {}).update(values)
        report["targets"] = targets_of(report["figures"])
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        new.replace(self._path)  # whole, whenever it is cut short


def targets_of(figures: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Each target with its figure, and whether that reaches it."""
    found: dict[str, dict[str, Any]] = {}
    for name, (sign, target) in TARGETS.items():
        value = figures.get(name)
        reached = None
        if value is not None:
            reached = value <= target if sign == "<=" else value >= target
        found[name] = {"value": value, "target": f"{sign} {target:g}", "reached": reached}
    return found


def kernel_figures(report: Mapping[str, Any], ending: str = "") -> dict[str, float]:
    """The figures of a report of `benchmark_kernels`, by rows or as prefill.

    Args:
      report: whose first backend is the one that is in use.
      ending: of names, to tell one report's from another's.
    """
    found: dict[str, float] = {}
    own = report["config"]["backends"][0]
    for result in report["results"]:
        entries = result["contenders"]
        ok = {name: entry for name, entry in entries.items() if entry["status"] == "ok"}
        decode = result["case"].partition("*1@")
        name = f"attention_us_{decode[0]}" if decode[1] else "prefill_attention_us"
        for contender, entry in ok.items():
            whose = "" if contender == own else f"_{contender}"
            found[f"{name}{ending}{whose}"] = entry["call_us"]
        if decode[1] and own in ok:
            found[f"attention_copy_ratio_{decode[0]}{ending}"] = ok[own]["copy_ratio"]
        elif own in ok and "cudnn" in ok:
            found["prefill_attention_over_cudnn"] = ok["cudnn"]["call_us"] / ok[own]["call_us"]
    return found


def transformers_figures(lines: list[dict[str, Any]], ours: Mapping[str, float]) -> dict[str, Any]:
    """The figures of what `transformers_steps.py` printed, and how much faster we are."""
    found: dict[str, Any] = {}
    for line in lines:
        name = f"{line['cache']}_{line['rows']}"
        found[f"transformers_tokens_per_s_{name}"] = line["tokens_per_s"]
        if own := ours.get(f"tokens_per_s_{line['rows']}"):
            found[f"speedup_over_{name}"] = own / line["tokens_per_s"]
    return found
