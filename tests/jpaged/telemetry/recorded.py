# SPDX-License-Identifier: Apache-2.0
"""Runs without a model, and what their records should hold."""

from jpaged.host.admission import SchedulerConfig
from jpaged.host.preemption import PreemptionCosts
from jpaged.host.viewer import PoolSnapshot
from jpaged.simulation.layers import ONE_KIND
from jpaged.simulation.paged import PagedSimulator
from jpaged.simulation.workload import Item
from jpaged.telemetry import recorder as recorder_module


def simulate(
    path, *, num_pages=24, page_size=4, num_requests=9, preemption="recompute", num_samples=2,
    layers=ONE_KIND, on_look=lambda scheduler: None, monkeypatch=None, steps=None,
):  # fmt: skip
    """Serves a few requests in a pool so small that they are preempted; returns the simulator.

    Args:
      path: of the record.
      on_look: called with the scheduler where a frame may be taken.
      steps: after how many to stop; None goes on to the end.
    """
    config = SchedulerConfig(
        max_num_batched_tokens=32, max_num_seqs=8, max_model_len=40, preemption=preemption,
        num_host_pages=64, costs=PreemptionCosts(1.0, 1.0), prefix_cache=True,
    )  # fmt: skip
    if monkeypatch is not None:
        look = recorder_module.Recorder.look

        def both(self, scheduler, totals):
            on_look(scheduler)
            look(self, scheduler, totals)

        monkeypatch.setattr(recorder_module.Recorder, "look", both)
    host = PagedSimulator(config, num_pages, page_size, layers=layers, record=str(path))
    for number in range(num_requests):
        prompt = [7] * 8 + list(range(number, number + 5))
        host.add(Item(prompt, 9 + number, num_samples=num_samples if number % 2 else 1))
    count = 0
    while host.has_unfinished_requests and count != steps:
        host.clock_s = 0.5 * count
        host.step()
        count += 1
    return host


def snapshot_of(scheduler):
    """The pool, as read by other code."""
    requests = {id(seq.request): seq.request for seq in scheduler.holders()}
    return PoolSnapshot.of_requests(scheduler.table, requests.values())
