# SPDX-License-Identifier: Apache-2.0
"""Measures what the dtype of pages costs: a model's perplexity on a text, read through pages.

    python -m scripts.measure.perplexity
    python -m scripts.measure.perplexity --model=FILE.gguf --text_file=docs/decisions.md

Without `--text_file` the text is stories of the demo's corpus that it was not trained on. It is cut
into windows of `--context` tokens, each a sequence by itself. Scales of pages of eight bits are
found as an engine finds them, on a text of its own, or are those of `--kv_scales`.

The last line of standard output is one JSON object: `model`, `context`, `num_tokens` (predicted),
`hardware`, `versions`, and by each of `--kv_dtypes` its `perplexity`, `nats` (a token, mean),
`more_nats` (than with the first of them), `error` (the standard error of that) and `bytes`, which a
token takes in pages, beside those that the first takes.
"""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
from absl import app, flags

from jpaged.device.memory import pool_dtype
from jpaged.host.config import CHOICES, EIGHT_BITS
from jpaged.measure import machine
from jpaged.measure.perplexity import token_nats, windows_of
from jpaged.placement import read_model
from jpaged.scripts.demo.corpus import stories
from jpaged.scripts.flags import (
    check_names,
    define_engine_flags,
    enable_compilation_cache,
    engine_config_from_flags,
    require_device,
    run,
    usage_errors,
)

_MODEL = flags.DEFINE_string(
    "model", "demo", "Model directory or GGUF file; demo is the shipped checkpoint."
)
_TEXT = flags.DEFINE_string("text_file", None, "UTF-8 text; without it, stories of the demo's.")
_KV_DTYPES = flags.DEFINE_list(
    "kv_dtypes", "float32,bfloat16,int8,float8_e4m3fn", "Dtypes of pages; the first is the measure."
)
_CONTEXT = flags.DEFINE_integer("context", 512, "Tokens of a window.", lower_bound=2)
_WINDOWS = flags.DEFINE_integer("num_windows", 32, "Windows at most.", lower_bound=1)
define_engine_flags()

# Of another seed than the training's, as train_demo takes for what it holds out.
_STORIES_SEED = 1_000_000


def main(argv: list[str]) -> None:
    """Measures and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    check_names("kv_dtypes", _KV_DTYPES.value, CHOICES["kv_dtype"])
    require_device()
    enable_compilation_cache()
    config, context = engine_config_from_flags(), _CONTEXT.value
    rows: dict[str, dict[str, float]] = {}
    with usage_errors():
        model_config, params, tokenizer, *_ = read_model(_MODEL.value, config)
        if tokenizer is None:
            raise ValueError(f"--model={_MODEL.value} has no tokenizer to read a text with")
        if context > model_config.max_position_embeddings:
            raise ValueError(
                f"--context={context} exceeds the model's max_position_embeddings="
                f"{model_config.max_position_embeddings}"
            )
        if _TEXT.value is None:
            texts = itertools.islice(stories(_STORIES_SEED), _WINDOWS.value * context // 32)
            text = "\n\n".join(texts)
        else:
            text = pathlib.Path(_TEXT.value).read_text(encoding="utf-8")
        windows = windows_of(tokenizer.encode(text).ids, context, _WINDOWS.value)
        first = np.zeros(0)
        print("pages          perplexity  nats a token  more nats          bytes")
        for name in dict.fromkeys(_KV_DTYPES.value):
            scales = config.kv_scales if name in EIGHT_BITS else None
            own = dataclasses.replace(config, kv_dtype=name, kv_scales=scales)
            nats = token_nats(own, model_config, params, windows, tokenizer).mean(axis=1)
            first = first if first.size else nats
            more = nats - first
            size = pool_dtype(own).itemsize
            rows[name] = row = {
                "perplexity": float(np.exp(nats.mean())),
                "nats": float(nats.mean()),
                "more_nats": float(more.mean()),
                "error": float(more.std() / np.sqrt(len(more))),
                "bytes": size / pool_dtype(dataclasses.replace(own, **_first())).itemsize,
            }
            print(
                f"{name:13}  {row['perplexity']:10.4f}  {row['nats']:12.5f}  "
                f"{row['more_nats']:+.5f} ± {row['error']:.5f}  {row['bytes']:5.2f}",
                flush=True,
            )
    report = {
        "model": _MODEL.value,
        "context": context,
        "num_tokens": len(windows) * (context - 1),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "kv_dtypes": rows,
    }
    print(json.dumps(report))


def _first() -> dict[str, str | None]:
    return {"kv_dtype": _KV_DTYPES.value[0], "kv_scales": None}


if __name__ == "__main__":
    run(main)
