# SPDX-License-Identifier: Apache-2.0
"""Serving without a device: workloads, real memory management, and a cost model for time.

`PagedSimulator` runs the real scheduler, pool and page table. `ContiguousSimulator` runs what came
before them. `serve` has one of them serve a workload in the time that a `CostModel` gives its
steps. Nothing needs jax.
"""

from jpaged.simulation.contiguous import CONTIGUOUS_POLICIES, ContiguousSimulator
from jpaged.simulation.costs import CostModel, Memory, StepWork
from jpaged.simulation.layers import LayerGroups
from jpaged.simulation.lengths import parse_lengths
from jpaged.simulation.paged import PagedSimulator
from jpaged.simulation.serving import (
    ONE_TABLE,
    PAGED_POLICIES,
    POLICIES,
    Serving,
    run_scheduler,
    serve,
    simulate,
)
from jpaged.simulation.workload import Item, Workload, make_workload

__all__ = [
    "CONTIGUOUS_POLICIES",
    "ONE_TABLE",
    "PAGED_POLICIES",
    "POLICIES",
    "ContiguousSimulator",
    "CostModel",
    "Item",
    "LayerGroups",
    "Memory",
    "PagedSimulator",
    "Serving",
    "StepWork",
    "Workload",
    "make_workload",
    "parse_lengths",
    "run_scheduler",
    "serve",
    "simulate",
]
