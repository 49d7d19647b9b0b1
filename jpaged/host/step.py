# SPDX-License-Identifier: Apache-2.0
"""What the scheduler plans and the device does."""

import dataclasses

from jpaged.host.sequence import Request, Sequence


@dataclasses.dataclass
class ScheduledStep:
    """One step's work.

    Attributes:
      seqs: sequences that compute tokens, in order of row.
      num_scheduled_tokens: how many tokens each of them computes.
      input_slots: per row, which sample of the step before its one token is, while the host does
        not know it yet; -1 where the host knows the tokens.
      samples: sequences that get a token from this step, in order of sample slot.
      sample_rows: the row whose last token each sample continues.
      beams: requests whose running beams are among the samples, each with the sample slot of the
        first; the others follow it.
      swap_outs: `(page, host_page)` to copy to host memory before anything else.
      swap_ins: `(host_page, page)` to copy back after that.
      copies: `(src, dst)` pages to copy after that, before the step writes.
      addressed: pages that were given an address in the prefix cache.
      num_prefill_tokens: of the tokens, those of rows that are not a plain decode.
      num_preemptions: sequences that lost their pages to it.
      num_lookup_tokens: tokens of sequences that were admitted.
      num_hit_tokens: of them, those that were found in the prefix cache.
    """

    seqs: list[Sequence] = dataclasses.field(default_factory=list[Sequence])
    num_scheduled_tokens: list[int] = dataclasses.field(default_factory=list[int])
    input_slots: list[int] = dataclasses.field(default_factory=list[int])
    samples: list[Sequence] = dataclasses.field(default_factory=list[Sequence])
    sample_rows: list[int] = dataclasses.field(default_factory=list[int])
    beams: list[tuple[Request, int]] = dataclasses.field(default_factory=list[tuple[Request, int]])
    swap_outs: list[tuple[int, int]] = dataclasses.field(default_factory=list[tuple[int, int]])
    swap_ins: list[tuple[int, int]] = dataclasses.field(default_factory=list[tuple[int, int]])
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list[tuple[int, int]])
    addressed: list[int] = dataclasses.field(default_factory=list[int])
    num_prefill_tokens: int = 0
    num_preemptions: int = 0
    num_lookup_tokens: int = 0
    num_hit_tokens: int = 0

    def add_row(self, seq: Sequence, num_tokens: int) -> int:
        """Has a sequence compute its next tokens. Returns: its row."""
        self.seqs.append(seq)
        self.num_scheduled_tokens.append(num_tokens)
        self.input_slots.append(seq.sample_slot if seq.num_inflight_tokens else -1)
        if num_tokens > 1 or seq.num_computed_tokens < seq.num_prompt_tokens:
            self.num_prefill_tokens += num_tokens
        seq.num_computed_tokens += num_tokens
        return len(self.seqs) - 1

    def add_sample(self, seq: Sequence, row: int) -> None:
        """Has a sequence get the token that follows the last one of a row."""
        seq.sample_slot = len(self.samples)
        seq.num_inflight_tokens += 1
        self.samples.append(seq)
        self.sample_rows.append(row)
