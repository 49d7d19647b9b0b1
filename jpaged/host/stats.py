# SPDX-License-Identifier: Apache-2.0
"""What an engine has done and how full its pool is."""

import copy
import dataclasses

from jpaged.host.page_table import PageTable
from jpaged.host.scheduler import Scheduler
from jpaged.host.step import StepPlan


@dataclasses.dataclass(kw_only=True)
class Counters:
    """Running totals since the engine was made or `reset_stats`; the engine owns them.

    Attributes:
      num_steps: steps dispatched.
      num_decode_steps: steps read that did nothing but decode.
      num_dispatches: how often the device was given steps: once for all of a burst.
      num_prefill_tokens: tokens computed in rows that were not a plain decode, recomputed ones
        included.
      num_generated_tokens: tokens sampled and kept.
      num_decode_tokens: those of them from steps that did nothing but decode.
      num_page_copies: pages copied on write.
      num_preemptions: sequences that gave their pages back to wait.
      num_swapped_pages: pages copied to host memory for them.
      num_lookup_tokens: tokens of sequences that started, or started again.
      num_hit_tokens: of them, those that the prefix cache had.
      num_disk_tokens: of these, those that the prompt cache had on disk.
      num_recomputed_tokens: of the others, those that were computed before a preemption.
      peak_used_pages: most pages in use after a step was scheduled.
      peak_running: most sequences in a step.
      prefill_s: seconds in steps with prefill.
      decode_s: seconds in steps that did nothing but decode.
      compile_s: seconds spent compiling, which the two before leave out.
      live_cell_steps, allocated_cell_steps, running_steps: sums over steps, for means.
      used_page_steps, page_reference_steps: likewise; pages as they are, and as they would be if
        none were shared.
    """

    num_steps: int = 0
    num_decode_steps: int = 0
    num_dispatches: int = 0
    num_prefill_tokens: int = 0
    num_generated_tokens: int = 0
    num_decode_tokens: int = 0
    num_page_copies: int = 0
    num_preemptions: int = 0
    num_swapped_pages: int = 0
    num_lookup_tokens: int = 0
    num_hit_tokens: int = 0
    num_disk_tokens: int = 0
    num_recomputed_tokens: int = 0
    peak_used_pages: int = 0
    peak_running: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    compile_s: float = 0.0
    live_cell_steps: int = 0
    allocated_cell_steps: int = 0
    running_steps: int = 0
    used_page_steps: int = 0
    page_reference_steps: int = 0

    def reset(self) -> None:
        """Starts again, in one stroke for whoever looks meanwhile."""
        vars(self).update(vars(Counters()))

    def record_step(self, step: StepPlan, table: PageTable) -> None:
        """Adds a step that was just scheduled."""
        running = step.num_rows
        self.num_steps += 1
        self.num_prefill_tokens += step.num_prefill_tokens
        self.num_page_copies += len(step.copies)
        self.record_swaps(step)
        self.num_lookup_tokens += step.num_lookup_tokens
        self.num_hit_tokens += step.num_hit_tokens
        self.num_disk_tokens += step.num_disk_tokens
        self.num_recomputed_tokens += step.num_recomputed_tokens
        used = table.pool.num_used_pages
        self.peak_used_pages = max(self.peak_used_pages, used)
        self.used_page_steps += used
        self.page_reference_steps += table.pool.num_references
        self.peak_running = max(self.peak_running, running)
        self.live_cell_steps += table.num_live_cells
        self.allocated_cell_steps += table.num_allocated_cells
        self.running_steps += running

    def record_swaps(self, step: StepPlan) -> None:
        """Adds what a step does beside its rows; it may have none."""
        self.num_preemptions += step.num_preemptions
        self.num_swapped_pages += len(step.swap_outs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A reading of an engine.

    Attributes:
      page_size: tokens a page holds.
      page_bytes: bytes of one page over the layers of a group.
      num_groups: groups of layers that have pages of their own; a sequence takes a page for each.
      num_usable_pages: pages that can be handed out.
      num_free_pages, num_used_pages: of them, now.
      num_cached_pages: of the free ones, those that are kept for their content, now.
      num_shared_pages: pages in use by more than one sequence, now.
      num_saved_pages: pages that would be in use beside them if none were shared, now.
      num_saved_cells: tokens that sequences hold in pages less cells that hold one, now.
      num_host_pages, num_free_host_pages: room for swapped pages, now.
      utilisation: share of the used pages' cells that hold a token which is needed, as it is not
        below a window, now; 1.0 when none is used.
      num_running, num_waiting: sequences, now.
      num_compilations: programs compiled since the engine was made.
      num_unplanned_compilations: of them, those after `warm_up`.
      max_model_len: tokens a sequence has at most.
      totals: sums since the start or `reset_stats`.
    """

    page_size: int
    page_bytes: int
    num_groups: int
    num_usable_pages: int
    num_free_pages: int
    num_used_pages: int
    num_cached_pages: int
    num_shared_pages: int
    num_saved_pages: int
    num_saved_cells: int
    num_host_pages: int
    num_free_host_pages: int
    utilisation: float
    num_running: int
    num_waiting: int
    num_compilations: int
    num_unplanned_compilations: int
    max_model_len: int
    totals: Counters

    @classmethod
    def read(cls, scheduler: Scheduler, totals: Counters, **device: int) -> "EngineStats":
        """Reads the host's state.

        Args:
          scheduler: gives the queues, the pages and max_model_len.
          totals: copied.
          **device: page_bytes, num_compilations and num_unplanned_compilations.
        """
        table = scheduler.table
        pool, cells = table.pool, table.num_allocated_cells
        return cls(
            page_size=table.page_size,
            num_groups=table.num_groups,
            num_usable_pages=pool.num_usable_pages,
            num_free_pages=pool.num_free_pages,
            num_used_pages=pool.num_used_pages,
            num_cached_pages=pool.num_cached_pages,
            num_shared_pages=pool.num_shared_pages,
            num_saved_pages=pool.num_references - pool.num_used_pages,
            num_saved_cells=table.num_saved_cells,
            num_host_pages=scheduler.swap_space.num_pages,
            num_free_host_pages=scheduler.swap_space.num_free_pages,
            utilisation=_ratio(table.num_live_cells, cells, 1.0),
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            max_model_len=scheduler.config.max_model_len,
            totals=copy.copy(totals),
            **device,
        )

    @property
    def mean_utilisation(self) -> float:
        """Share of used pages' cells that held a needed token, over all steps; 1.0 before one."""
        return _ratio(self.totals.live_cell_steps, self.totals.allocated_cell_steps, 1.0)

    @property
    def mean_saving(self) -> float:
        """Share of the pages that sharing saved, over all steps."""
        totals = self.totals
        return _ratio(
            totals.page_reference_steps - totals.used_page_steps, totals.page_reference_steps
        )

    @property
    def hit_rate(self) -> float:
        """Share of the tokens of sequences that started which the prefix cache had."""
        return _ratio(self.totals.num_hit_tokens, self.totals.num_lookup_tokens)

    @property
    def recomputed_share(self) -> float:
        """Share of the computed tokens that preemptions had computed again."""
        totals = self.totals
        computed = totals.num_prefill_tokens + totals.num_generated_tokens
        return _ratio(totals.num_recomputed_tokens, computed)

    @property
    def mean_running(self) -> float:
        """Sequences in a step, over all steps."""
        return _ratio(self.totals.running_steps, self.totals.num_steps)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prefill tokens a second of steps with prefill."""
        return _ratio(self.totals.num_prefill_tokens, self.totals.prefill_s)

    @property
    def decode_tokens_per_s(self) -> float:
        """Decode tokens a second of steps without prefill."""
        return _ratio(self.totals.num_decode_tokens, self.totals.decode_s)

    @property
    def pages_per_seq(self) -> int:
        """Pages of a sequence that preallocates max_model_len."""
        return -(-self.max_model_len // self.page_size) * self.num_groups

    @property
    def contiguous_pages(self) -> int:
        """Pages that the fullest step would hold if each sequence preallocated max_model_len."""
        return self.totals.peak_running * self.pages_per_seq

    def progress_line(self) -> str:
        """A few words for a progress bar."""
        seconds = self.totals.prefill_s + self.totals.decode_s
        return (
            f"{_ratio(self.totals.num_generated_tokens, seconds):.0f} tokens/s, "
            f"{self.num_running} running, {self.num_used_pages}/{self.num_usable_pages} pages"
        )


def _ratio(part: float, whole: float, otherwise: float = 0.0) -> float:
    return part / whole if whole else otherwise
