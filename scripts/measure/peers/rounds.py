# SPDX-License-Identifier: Apache-2.0
"""Rounds of a load, in which peers take turns, and what they come to."""

import contextlib
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from jpaged.scripts.measure.peers.loads import Load
from jpaged.scripts.measure.peers.process import PeerError, PeerProcess, PeerSpec

Run = tuple[float, list[list[int]]]
"""Seconds of a round, and the tokens of each request."""

_SETTLE_S = 0.5  # threads of a peer that has answered still spin for a while


def measure(
    load: Load,
    specs: Sequence[PeerSpec],
    job: Mapping[str, Any],
    *,
    vocab_size: int,
    seed: int,
    repeats: int,
    logs: pathlib.Path,
    timeout_s: float,
    bar: tqdm.tqdm,
) -> dict[str, Any]:
    """Has peers take turns at a load, each in a process of its own.

    Args:
      load: the load.
      specs: the peers, first the one that others are compared with.
      job: what each is told first, without its own options.
      vocab_size: prompts have tokens below it.
      seed: of the prompts.
      repeats: rounds after the first, cold one.
      logs: folder for what the peers print.
      timeout_s: for an answer of a peer.
      bar: is told of each run.

    Returns:
      The report of a load, as `compare_peers` documents it.
    """
    rng = np.random.default_rng([seed, load.rows, len(load.prompt_lens)])
    errors: dict[str, str] = {}
    peers: dict[str, PeerProcess] = {}
    runs: dict[str, list[Run]] = {}

    def attempt(name: str, work: Callable[[], object]) -> None:
        bar.set_postfix_str(f"{load.name}: {name}")
        try:
            work()
        except PeerError as e:
            errors[name] = str(e)
            peers.pop(name, None)
            tqdm.tqdm.write(f"{load.name}: {e}", file=sys.stderr)
        bar.update()

    with contextlib.ExitStack() as stack:

        def start(spec: PeerSpec) -> None:
            log = logs / f"{load.name}-{spec.name}.log"
            peer = PeerProcess(spec, job, log, timeout_s)
            stack.callback(peer.close)
            peers[spec.name], runs[spec.name] = peer, []

        def turn(name: str, prompts: list[list[int]]) -> None:
            time.sleep(_SETTLE_S)
            runs[name].append(peers[name].generate(prompts, load.output_lens))

        for spec in specs:
            attempt(spec.name, lambda spec=spec: start(spec))
        for number in range(repeats + 1):
            prompts = load.prompts(rng, vocab_size)
            names = list(peers)
            first = number % max(len(names), 1)
            for name in names[first:] + names[:first]:
                attempt(name, lambda name=name, prompts=prompts: turn(name, prompts))
        loaded = {name: peer.loaded for name, peer in peers.items()}
    ours = runs[specs[0].name] if specs[0].name in loaded else []
    num_tokens = sum(load.output_lens)
    return {
        "rows": load.rows,
        "num_requests": len(load.prompt_lens),
        "prompt_tokens": sum(load.prompt_lens),
        "output_tokens": num_tokens,
        "errors": errors,
        "peers": {
            name: told | report_of(runs[name], ours, num_tokens) for name, told in loaded.items()
        },
    }


def report_of(
    runs: list[Run],
    ours: list[Run],
    num_tokens: int,
) -> dict[str, Any]:
    """What the rounds of a peer come to.

    Args:
      runs: seconds and tokens of each, the first one cold.
      ours: those of the peer that it is compared with; none if it failed.
      num_tokens: that a round generates.

    Returns:
      A part of the report, as `compare_peers` documents it; without `ratio` and `agreement` where
      there is nothing to compare with.
    """
    cold_s, *warm_s = [seconds for seconds, _ in runs]
    report: dict[str, Any] = {
        "cold_s": cold_s,
        "cold_tokens_per_s": num_tokens / cold_s,
        "warm_s": _spread(warm_s),
        "tokens_per_s": _spread([num_tokens / seconds for seconds in warm_s]),
    }
    if ours:
        cold, *warm = [
            theirs / own for (theirs, _), (own, _) in zip(runs, ours, strict=True)
        ]  # fmt: skip
        same = [
            (_common(mine, other), len(mine))
            for (_, theirs), (_, own) in zip(runs, ours, strict=True)
            for mine, other in zip(own, theirs, strict=True)
        ]
        report["ratio"] = {"cold": cold, **_spread(warm)}
        report["agreement"] = {
            "requests": statistics.fmean(count == length for count, length in same),
            "tokens": sum(count for count, _ in same) / sum(length for _, length in same),
        }
    return report


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _common(own: list[int], other: list[int]) -> int:
    """Tokens before the first difference."""
    pairs = enumerate(zip(own, other, strict=True))
    return next((index for index, (a, b) in pairs if a != b), len(own))
