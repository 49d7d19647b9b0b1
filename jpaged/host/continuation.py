# SPDX-License-Identifier: Apache-2.0
"""Has the sequences of a request go on from others of it, on the pages of those."""

from collections.abc import Sequence as SequenceOf

from jpaged.host.page_table import PageTable
from jpaged.host.sequence import Request, Sequence
from jpaged.host.swap import SwapSpace


def continue_sequences(
    table: PageTable, space: SwapSpace, request: Request, parents: SequenceOf[int]
) -> list[Sequence]:
    """Gives sequences the pages of those that they continue; forks and frees, copies nothing.

    Args:
      table: where those before have pages, unless they wait.
      space: where they have them if they were swapped.
      request: with the sequences before.
      parents: for each sequence from now on, which of those before it continues; `request.growth`
        knows their tokens.

    Returns:
      The sequences from now on; the first ones are the same objects as before. The others of before
      hold nothing.
    """
    before, chooser = list(request.sequences), request.growth.chooser
    assert chooser is not None, "sequences go on as they are"
    states = [(s.table_id, s.num_computed_tokens, s.num_addressed_pages) for s in before]
    after, continued = before[: len(parents)], set[int]()
    while len(after) < len(parents):
        after.append(Sequence(request, len(after), request.max_total_tokens))
    for index, (seq, parent) in enumerate(zip(after, parents, strict=True)):
        table_id, computed, addressed = states[parent]
        if parent in continued and table_id is not None:
            table_id = table.fork(table_id)
        continued.add(parent)
        seq.token_ids = chooser.tokens(index)
        seq.table_id, seq.num_computed_tokens = table_id, computed
        seq.num_addressed_pages, seq.num_inflight_tokens = addressed, 0
    for parent, (table_id, *_) in enumerate(states):
        if parent not in continued and table_id is not None:
            table.free(table_id)
    for seq in before[len(parents) :]:
        seq.table_id = None
    group = before[0].swapped
    if group is not None:
        held = [group.held[before[parent]] for parent in parents]
        for seq in before:
            seq.swapped = None
        for seq in after:
            seq.swapped = group
        space.hold(group, dict(zip(after, held, strict=True)))
    return after
