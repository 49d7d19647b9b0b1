# SPDX-License-Identifier: Apache-2.0
"""Metrics as Prometheus reads them from a file, such as node_exporter's textfile collector.

Names are vLLM's where the thing is the same, with `jpaged:` for `vllm:`, so that its dashboards and
alerts need another prefix and nothing else. A counter begins at 0 with the process, as usual.
"""

import os
import pathlib
from typing import NamedTuple

from jpaged.host.stats import EngineStats


class Metric(NamedTuple):
    """A number with a name.

    Attributes:
      name: without the prefix; that of a counter ends in `_total`.
      value: now.
      help: what it is.
    """

    name: str
    value: float
    help: str

    @property
    def kind(self) -> str:
        """Whether it only grows."""
        return "counter" if self.name.endswith("_total") else "gauge"


def metrics_of(stats: EngineStats, num_done: int, total: int) -> list[Metric]:
    """What can be said of a run.

    Args:
      stats: of its engine.
      num_done: requests or rows that are done.
      total: of so many.
    """
    totals = stats.totals
    usage = stats.num_used_pages / stats.num_usable_pages
    return [
        Metric("num_requests_running", stats.num_running, "Sequences that have pages."),
        Metric("num_requests_waiting", stats.num_waiting, "Sequences that wait."),
        Metric("kv_cache_usage_perc", usage, "Pages in use; 1 is all."),
        Metric("num_preemptions_total", totals.num_preemptions, "Sequences that lost pages."),
        Metric("prompt_tokens_total", totals.num_prefill_tokens, "Prefill tokens computed."),
        Metric("generation_tokens_total", totals.num_generated_tokens, "Tokens generated."),
        Metric("prefix_cache_queries_total", totals.num_lookup_tokens, "Tokens looked up."),
        Metric("prefix_cache_hits_total", totals.num_hit_tokens, "Tokens found."),
        Metric("external_prefix_cache_hits_total", totals.num_disk_tokens, "Of them, on disk."),
        # What vLLM does not have.
        Metric("recomputed_tokens_total", totals.num_recomputed_tokens, "Tokens computed again."),
        Metric("swapped_pages_total", totals.num_swapped_pages, "Pages copied to host memory."),
        Metric("page_copies_total", totals.num_page_copies, "Pages copied on write."),
        Metric("steps_total", totals.num_steps, "Steps."),
        Metric("compilations_total", stats.num_compilations, "Programs compiled."),
        Metric("compile_seconds_total", totals.compile_s, "Seconds of it."),
        Metric("prefill_seconds_total", totals.prefill_s, "Seconds in steps with prefill."),
        Metric("decode_seconds_total", totals.decode_s, "Seconds in steps without."),
        Metric("pages", stats.num_usable_pages, "Pages of the pool."),
        Metric("pages_cached", stats.num_cached_pages, "Free pages that keep their content."),
        Metric("pages_shared", stats.num_shared_pages, "Pages of several sequences."),
        Metric(
            "page_utilisation", stats.utilisation, "Cells of used pages with a token; 1 is all."
        ),
        Metric("requests_done", num_done, "Requests or rows of the run that are done."),
        Metric("requests", total, "Requests or rows of the run."),
    ]


def write_metrics(path: pathlib.Path, metrics: list[Metric]) -> None:
    """Replaces a file in one stroke, so that who reads it finds it whole. Raises: OSError."""
    text = "".join(
        f"# HELP jpaged:{m.name} {m.help}\n# TYPE jpaged:{m.name} {m.kind}\njpaged:{m.name} "
        f"{m.value:.17g}\n"
        for m in metrics
    )
    # The collector reads what ends in .prom.
    new = path.with_name(f".{path.name}.writing")
    try:
        new.write_text(text, encoding="ascii")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
