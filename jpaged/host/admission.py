# SPDX-License-Identifier: Apache-2.0
"""The budgets of a scheduler, and which requests could never run within them."""

import dataclasses

from jpaged.host.page_table import PageTable
from jpaged.host.preemption import NO_COSTS, PreemptionCosts
from jpaged.host.sequence import Request


class RequestTooLongError(ValueError):
    """A request that can never run; the message has both numbers and what to change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Budgets of one step.

    Attributes:
      max_num_batched_tokens: tokens a step computes at most, prefill and decode together.
      max_num_seqs: sequences that run at once at most.
      max_model_len: tokens a sequence has at most, prompt and generated together.
      reservation: "paged" takes pages as a sequence grows; "max" takes those of max_model_len when
        it is admitted, as contiguous preallocation does, for comparison.
      prefix_cache: whether requests share the pages of equal prefixes; samples and beams of one
        request do in any case.
      preemption: "recompute" computes preempted tokens again, "swap" copies their pages to host
        memory and back where there is room, "auto" does what costs less.
      num_host_pages: pages that host memory has room for.
      costs: what "auto" compares.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    reservation: str = "paged"
    prefix_cache: bool = True
    preemption: str = "recompute"
    num_host_pages: int = 0
    costs: PreemptionCosts = NO_COSTS

    def __post_init__(self):
        for name in ("max_num_batched_tokens", "max_num_seqs", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.reservation not in ("paged", "max"):
            raise ValueError(f"reservation={self.reservation!r} must be 'paged' or 'max'")
        if self.preemption not in ("recompute", "swap", "auto"):
            raise ValueError(
                f"preemption={self.preemption!r} must be 'recompute', 'swap' or 'auto'"
            )


def check_fits(request: Request, config: SchedulerConfig, table: PageTable) -> None:
    """Refuses a request that could never run.

    Args:
      request: as it was made.
      config: its budgets.
      table: its pages.

    Raises:
      RequestTooLongError: if it could not run even with the whole pool to itself.
      ValueError: if it wants more beams than can run at once.
    """
    (seq,), growth = request.sequences, request.growth
    if seq.num_prompt_tokens >= config.max_model_len:
        raise RequestTooLongError(
            f"request {request.request_id!r}: a prompt of {seq.num_prompt_tokens} tokens "
            f"leaves no room for an answer in max_model_len={config.max_model_len}; shorten "
            "the prompt or raise max_model_len"
        )
    width = growth.reserved_places or 1
    most = min(config.max_num_seqs, config.max_num_batched_tokens)
    if width > most:
        raise ValueError(
            f"request {request.request_id!r}: beam_width={width} exceeds the {most} beams that "
            "a step computes: lower it, or raise max_num_seqs and max_num_batched_tokens"
        )
    if config.reservation == "max" and growth.max_sequences > 1:
        raise ValueError(
            f"request {request.request_id!r}: samples and beams need shared pages, which "
            "reservation='max' does not have; use n=1 or reservation='paged'"
        )
    # The last token is returned, never attended to: it needs no cell.
    longest = seq.max_total_tokens - 1
    if config.reservation == "max":
        longest = config.max_model_len
    shared = _num_shared_pages(table, seq.num_prompt_tokens, width)
    needed = shared + width * (-(-longest // table.page_size) - shared)
    usable = table.pool.num_usable_pages
    if needed > usable:
        more = seq.max_total_tokens - seq.num_prompt_tokens
        each = f" for each of {width} beams" if width > 1 else ""
        raise RequestTooLongError(
            f"request {request.request_id!r}: {seq.num_prompt_tokens} prompt tokens and up to "
            f"{more} more{each} need {needed} pages of {table.page_size} tokens, but the pool "
            f"has {usable}; lower max_tokens or raise num_pages"
        )


def max_tokens_in(table: PageTable, num_prompt_tokens: int, width: int = 1) -> int:
    """Tokens, prompt and generated ones, of a sequence or `width` beams alone in the pool.

    What `check_fits` takes at most.
    """
    shared = _num_shared_pages(table, num_prompt_tokens, width)
    own = (table.pool.num_usable_pages - shared) // width
    return (shared + own) * table.page_size + 1  # the last token needs no cell


def _num_shared_pages(table: PageTable, num_prompt_tokens: int, width: int) -> int:
    """Beams share the full pages of the prompt at least."""
    return num_prompt_tokens // table.page_size if width > 1 else 0
