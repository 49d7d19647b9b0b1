# SPDX-License-Identifier: Apache-2.0
"""Measures the time to the first token of a long prompt that an earlier process has seen.

    python -m scripts.measure.benchmark_prompt_cache
    python -m scripts.measure.benchmark_prompt_cache --prefix_len=8000 --repeats=5

Each run is a process of its own with random weights of a public shape. It answers another prompt of
the same length, to compile, and then one that begins with the shared prefix: without a prompt
cache, with an empty one, and with the one that this has left. Files are in the page cache of the
operating system then.

The last line of standard output is one JSON object: `shape`, `prefix_len`, `prompt_len`,
`page_bytes`, `versions`, the machine, and `runs`: by name (`without`, `empty`, `filled`) the lists
`start_s` (of the engine; with a prompt cache it reads all weights), `first_token_s`, `save_s` (from
the answer until all is on disk), `num_disk_tokens`, and `token_ids`, which are the same in all.
"""

import json
import multiprocessing
import tempfile
import time
from typing import Any

import numpy as np
import tqdm
from absl import app, flags

from jpaged.measure import machine
from jpaged.models.shapes import SHAPES
from jpaged.scripts.flags import require_device, run

_SHAPE = flags.DEFINE_enum("shape", "smollm2-135m", sorted(SHAPES), "The model's shape.")
_PREFIX_LEN = flags.DEFINE_integer("prefix_len", 2000, "Tokens that are shared.", lower_bound=200)
_OWN_LEN = flags.DEFINE_integer("own_len", 20, "Tokens behind them.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Runs of each kind.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Runs processes one after the other, and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    require_device()
    lengths = _PREFIX_LEN.value, _OWN_LEN.value
    runs: dict[str, list[dict[str, Any]]] = {"without": [], "empty": [], "filled": []}
    for _ in tqdm.trange(_REPEATS.value, unit="round", disable=None):
        with tempfile.TemporaryDirectory() as directory:
            for name, own in runs.items():
                place = None if name == "without" else directory
                context = multiprocessing.get_context("spawn")  # fork would keep this jax
                with context.Pool(1) as pool:
                    own.append(pool.apply(_answer, (_SHAPE.value, *lengths, place)))
    print("          start s  first token s  save s  tokens from disk   (medians)")
    for name, own in runs.items():
        start, first, save, disk = (
            float(np.median([found[key] for found in own]))
            for key in ("start_s", "first_token_s", "save_s", "num_disk_tokens")
        )
        print(f"{name:10}{start:7.2f} {first:14.3f} {save:7.2f} {disk:17.0f}")
    report = {
        "shape": _SHAPE.value,
        "prefix_len": lengths[0],
        "prompt_len": sum(lengths),
        "page_bytes": runs["without"][0]["page_bytes"],
        "versions": machine.versions(),
        **machine.hardware(),
        "runs": {
            name: {key: [found[key] for found in own] for key in own[0] if key != "page_bytes"}
            for name, own in runs.items()
        },
    }
    print(json.dumps(report))


def _answer(shape: str, prefix_len: int, own_len: int, directory: str | None) -> dict[str, Any]:
    """What a process finds; its arguments are those of the flags, and where pages are kept."""
    import jax

    from jpaged import Engine, EngineConfig, SamplingParams
    from jpaged.models.decoder import Decoder

    model = SHAPES[shape]
    params = jax.block_until_ready(Decoder(model).init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    other, prefix = rng.integers(0, model.vocab_size, (2, prefix_len)).tolist()
    own = rng.integers(0, model.vocab_size, own_len).tolist()
    most = prefix_len + own_len + 16
    config = EngineConfig(
        max_model_len=most,
        max_num_seqs=4,
        scan_layers=True,  # which compiles in a moment
        prompt_cache=directory,
        step_shapes=f"{own_len + 15}x1",
    )
    start = time.perf_counter()
    engine = Engine(model, params, config)
    start_s = time.perf_counter() - start
    greedy = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    # Of one in whole chunks, and of one of which only the end is computed.
    engine.generate([other + own], greedy)
    engine.generate([other + own[::-1]], greedy)
    engine.reset_stats()
    (output,) = engine.generate([prefix + own], greedy)
    done = time.perf_counter()
    engine.save_prompts()
    return {
        "start_s": start_s,
        "first_token_s": output.time_to_first_token_s,
        "save_s": time.perf_counter() - done,
        "num_disk_tokens": engine.stats().totals.num_disk_tokens,
        "page_bytes": engine.stats().page_bytes,
        "token_ids": output.outputs[0].token_ids,
    }


if __name__ == "__main__":
    run(main)
