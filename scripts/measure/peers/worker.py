# SPDX-License-Identifier: Apache-2.0
"""A peer's side of the talk: JSON objects, a line each, on standard input and output.

It runs in the peer's environment, so it needs Python's own library alone. The first line says what
to load; the answer, what was loaded. Each later one has prompts, which are continued at once. The
process ends with its standard input, or when something went wrong, which its last answer says.

    {"model": DIR, "gguf": FILE or null, "dtype": "float32", "threads": 2, "rows": 16,
     "max_model_len": 128, "options": {...}}
    -> {"load_s": 1.5, "versions": {...}, "device": "cpu", "notes": [...]}
    {"prompts": [[...], ...], "output_lens": [...]}
    -> {"seconds": 5.2, "tokens": [[...], ...]}
    -> {"error": "..."}, in place of either
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol


class Peer(Protocol):
    """An engine with a model in memory.

    Attributes:
      versions: of what it is made of, by name.
      device: that it runs on, as it calls it, such as "cpu".
      notes: what whoever reads its figures has to know.
    """

    versions: dict[str, str]
    device: str
    notes: list[str]

    def generate(self, prompts: list[list[int]], output_lens: list[int]) -> list[list[int]]:
        """Continues each prompt greedily by so many tokens, whatever they are."""
        ...


def serve(load: Callable[[dict[str, Any]], Peer]) -> None:
    """Answers until standard input ends.

    Args:
      load: makes the peer of the first line; what it imports counts as loading.
    """
    # Peers print what they like: that goes to standard error, and only answers where they printed.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(fields: dict[str, Any]) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    try:
        first = sys.stdin.readline()
        if not first:
            return
        job = json.loads(first)
        _keep_to(job["threads"])
        start = time.perf_counter()
        peer = load(job)
        took = time.perf_counter() - start
        told = {"versions": peer.versions, "device": peer.device, "notes": peer.notes}
        answer({"load_s": took, **told})
        for line in sys.stdin:
            batch = json.loads(line)
            start = time.perf_counter()
            tokens = peer.generate(batch["prompts"], batch["output_lens"])
            answer({"seconds": time.perf_counter() - start, "tokens": tokens})
    except Exception as e:
        traceback.print_exc()
        answer({"error": f"{type(e).__name__}: {' '.join(str(e).split())}"})
        sys.exit(1)


def _keep_to(threads: int) -> None:
    """Leaves this process as many cores: jax, for one, takes all that it may."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
