# SPDX-License-Identifier: Apache-2.0
"""Measures beam search by width.

    python -m scripts.measure.benchmark_beams
    python -m scripts.measure.benchmark_beams --model=DIR --widths=4,16,64

One prompt at a time is searched with each width, first to compile and then `--repeats` times; the
fastest counts. `step_ms` is the time a step takes after the prompt has been computed: the model,
the best continuations of all beams, and the host's part, which permutes page tables.

The last line of standard output is one JSON object: `model`, `num_prompt_tokens`, `max_tokens`,
`page_size`, `versions`, and `widths`, a list of `width`, `step_ms`, `step_ms_per_beam`,
`page_copies_per_step` and `pages_saved` (the share that sharing saves); `growth` is the largest
ratio of the time a beam takes at one width to what it takes at a smaller one: at most 1 is no
faster than linear.
"""

import itertools
import json
import os
import time
from typing import Any

import numpy as np
import tqdm
from absl import app, flags

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.measure import machine
from jpaged.scripts.flags import require_device, run

_MODEL = flags.DEFINE_string("model", "demo", "Model directory; demo is the shipped checkpoint.")
_WIDTHS = flags.DEFINE_list("widths", "2,4,8,16,32,64,128,256,400".split(","), "Beam widths.")
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 64, "Tokens of the prompt.", lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 33, "Tokens to generate.", lower_bound=3)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 16, "Tokens a page holds.", lower_bound=1)
_REPEATS = flags.DEFINE_integer(
    "repeats", 3, "Searches a width; the fastest counts.", lower_bound=1
)


def main(argv: list[str]) -> None:
    """Measures and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        widths = sorted({int(width) for width in _WIDTHS.value})
    except ValueError:
        widths = [0]
    if widths[0] < 1:
        raise app.UsageError(f"--widths={','.join(_WIDTHS.value)} must be numbers of at least 1")
    require_device()
    rows = []
    print("width  step ms  ms a beam  copies a step  pages saved")
    for width in tqdm.tqdm(widths, unit="width", disable=None):
        row = _measure(width)
        rows.append(row)
        print(
            f"{width:5}  {row['step_ms']:7.2f}  {row['step_ms_per_beam']:9.3f}  "
            f"{row['page_copies_per_step']:13.1f}  {row['pages_saved']:10.1%}",
            flush=True,
        )
    pairs = itertools.combinations([row["step_ms_per_beam"] for row in rows], 2)
    report = {
        "model": _MODEL.value,
        "num_prompt_tokens": _PROMPT_LEN.value,
        "max_tokens": _MAX_TOKENS.value,
        "page_size": _PAGE_SIZE.value,
        "versions": machine.versions(),
        "cpu_cores": os.cpu_count(),
        "widths": rows,
        "growth": max((wide / narrow for narrow, wide in pairs), default=1.0),
    }
    print(json.dumps(report))


def _measure(width: int) -> dict[str, Any]:
    length = _PROMPT_LEN.value + _MAX_TOKENS.value
    pages = -(-length // _PAGE_SIZE.value)
    config = EngineConfig(
        page_size=_PAGE_SIZE.value,
        num_pages=2 + width * pages,
        max_num_seqs=width,
        max_num_batched_tokens=max(width, _PROMPT_LEN.value, 2),
        max_model_len=length,
        prefix_cache=False,
        preemption="recompute",
    )
    try:
        engine = Engine.load(_MODEL.value, config)
    except (ValueError, OSError) as e:
        raise app.UsageError(str(e)) from e
    rng = np.random.default_rng(0)
    prompt = rng.integers(engine.model_config.vocab_size, size=_PROMPT_LEN.value).tolist()
    params = SamplingParams(max_tokens=_MAX_TOKENS.value, beam_width=width, ignore_eos=True)
    engine.generate([prompt], params)
    best: dict[str, Any] = {}
    for _ in range(_REPEATS.value):
        engine.reset_stats()
        took = _search(engine, prompt, params)
        steps = _MAX_TOKENS.value - 1
        if not best or took / steps * 1e3 < best["step_ms"]:
            stats = engine.stats()
            best = {
                "width": width,
                "step_ms": took / steps * 1e3,
                "step_ms_per_beam": took / steps / width * 1e3,
                "page_copies_per_step": stats.totals.num_page_copies / steps,
                "pages_saved": stats.mean_saving,
            }
    return best


def _search(engine: Engine, prompt: list[int], params: SamplingParams) -> float:
    """Seconds of the steps after the prompt's."""
    engine.add_request(prompt, params)
    engine.step()
    engine.step()  # reads the prompt's
    start = time.perf_counter()
    while engine.has_unfinished_requests:
        engine.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    run(main)
