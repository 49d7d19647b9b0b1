# SPDX-License-Identifier: Apache-2.0
"""Has the sequences of a request go on: from others of it, on their pages, or from tokens alone."""

from collections.abc import Sequence as SequenceOf

from jpaged.host.checks import checked, instance_of, integers, shown
from jpaged.host.outputs import Completion
from jpaged.host.page_table import PageTable
from jpaged.host.sequence import Request, Sequence, Status
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


def resume_sequences(request: Request, samples: SequenceOf[Completion], vocab_size: int) -> None:
    """Has a request that nobody has seen yet go on from what its samples had come to.

    They are as after a preemption: they hold no pages, and their tokens are to be computed again.

    Args:
      request: as it was made.
      samples: its first ones, in order, with tokens or without. One with a finish_reason has ended.
      vocab_size: of its model.

    Raises:
      ValueError: if the request cannot have come to that.
    """
    where = f"request {request.request_id!r}: resume"
    if not samples:
        return
    if request.growth.chooser is not None:
        raise ValueError(f"{where}: beams are begun anew; leave resume away with beam_width")
    num_samples = request.params.num_samples
    if len(samples) > num_samples:
        raise ValueError(f"{where} has {len(samples)} samples, but the request has {num_samples}")
    sequences: list[Sequence] = []
    for index, sample in enumerate(samples):
        name = f"{where}[{index}]"
        instance_of(name, sample, Completion)
        sequences.append(_resumed(request, index, sample, name, vocab_size))
    while sequences and not (sequences[-1].generated_token_ids or sequences[-1].finish_reason):
        sequences.pop()  # those that have nothing are forked off each other, once there is a prompt
    if not sequences:
        return
    if len(sequences) < num_samples:
        rest = Sequence(request, len(sequences), request.max_total_tokens)
        rest.num_pending_forks = num_samples - len(sequences) - 1
        sequences.append(rest)
    elif all(seq.status is Status.FINISHED for seq in sequences):
        raise ValueError(f"{where}: all samples have ended, so there is nothing to go on with")
    request.sequences = sequences


def _resumed(
    request: Request, index: int, sample: Completion, name: str, vocab_size: int
) -> Sequence:
    """The sequence of one sample."""
    seq = Sequence(request, index, request.max_total_tokens)
    try:
        token_ids = integers(sample.token_ids)
    except TypeError as e:
        raise ValueError(f"{name}.token_ids={shown(sample.token_ids)} must be {e}") from None
    if outside := [token for token in token_ids if not 0 <= token < vocab_size]:
        raise ValueError(
            f"{name}: token id {shown(outside[0])} is outside the vocabulary, [0, {vocab_size})"
        )
    reason = sample.finish_reason
    if reason not in (None, "stop", "length", "error"):
        raise ValueError(
            f"{name}.finish_reason={shown(reason)} must be None, 'stop', 'length' or 'error': ask "
            "`Engine.progress` before a request is aborted"
        )
    room = seq.max_total_tokens - seq.num_prompt_tokens
    if len(token_ids) > room - (reason is None):
        state = "goes on" if reason is None else "has ended"
        raise ValueError(
            f"{name} {state} and has {len(token_ids)} tokens, where the request has room for {room}"
        )
    if request.params.logprobs is not None:
        seq.logprobs = list(sample.logprobs or ())
        if len(seq.logprobs) != len(token_ids):
            raise ValueError(
                f"{name}.logprobs must be those of {len(token_ids)} tokens, as the request wants "
                f"logprobs; they are {len(seq.logprobs)}"
            )
    seq.token_ids = [*request.prompt_token_ids, *token_ids]
    seq.cumulative_logprob = checked(f"{name}.cumulative_logprob", sample.cumulative_logprob, float)
    if reason is not None:
        seq.status, seq.finish_reason = Status.FINISHED, reason
        seq.text, seq.error = sample.text, sample.error
    return seq
