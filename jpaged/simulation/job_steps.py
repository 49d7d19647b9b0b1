# SPDX-License-Identifier: Apache-2.0
"""Which steps a job has, before it runs: the real scheduler over the lengths of its requests."""

import collections
from collections.abc import Sequence

import tqdm

from jpaged.host.compile_plan import JobSteps, StepSize
from jpaged.simulation.paged import PagedSimulator
from jpaged.simulation.workload import Item


def job_steps(
    simulator: PagedSimulator,
    items: Sequence[Item],
    *,
    progress: bool = False,
    most_steps: int | None = None,
) -> JobSteps:
    """Runs requests that are all there from the start, each to its last token.

    Sizes are in the order in which steps first have them.

    Args:
      simulator: without requests.
      items: the requests; at least one.
      progress: whether to show a progress bar on standard error.
      most_steps: ends after so many, for those that a job begins with.

    Raises:
      ValueError: if a request could never run.
    """
    for item in items:
        simulator.add(item)
    sizes: collections.Counter[StepSize] = collections.Counter()
    with tqdm.tqdm(total=len(items), desc="planning", unit="request", disable=not progress) as bar:
        while simulator.has_unfinished_requests and sizes.total() != most_steps:
            work = simulator.step()
            if work.num_tokens:
                sizes[StepSize(work.num_tokens, max(work.num_seqs, work.num_samples))] += 1
            bar.update(len(work.finished))
    config = simulator.scheduler.config
    page_size, usable = simulator.page_size, simulator.table.pool.num_usable_pages
    lengths = [(len(i.prompt_token_ids), i.num_output_tokens, i.num_samples) for i in items]
    pages = sum(count * -(-(prompt + more) // page_size) for prompt, more, count in lengths)
    # Who may lose pages computes what was generated again, with the prompt.
    again = pages * simulator.table.num_groups > usable
    tokens = sum(max(prompt + again * count * more, count) for prompt, more, count in lengths)
    most = StepSize(
        min(config.max_num_batched_tokens, tokens),
        min(config.max_num_seqs, sum(count for *_, count in lengths)),
    )
    return JobSteps(most, dict(sizes))
