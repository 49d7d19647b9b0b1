# SPDX-License-Identifier: Apache-2.0
"""Finds the scales of int8 and float8 pages on prompts of yours.

    jpaged calibrate --model=DIR --kv_dtype=int8 --prompts_file=prompts.txt --output=scales.json
    jpaged generate --model=DIR --kv_dtype=int8 --kv_scales=scales.json --prompt="Once upon a time"

The model computes each prompt, up to 512 tokens of it, with pages of its own dtype; the largest key
and the largest value of each layer decide what a step of eight bits is. Without --prompts_file that
is done on a text of the program's, as an engine does at every start that has no file of scales.
"""

import dataclasses

import numpy as np
from absl import app, flags

from jpaged.device.kv_scales import calibration_prompt, write_kv_scales
from jpaged.host.config import EIGHT_BITS
from jpaged.pallas_kernels.dispatch import resolve_backend
from jpaged.placement import calibrated, decoder_of, pool_of, read_model
from jpaged.scripts.flags import (
    define_engine_flags,
    enable_compilation_cache,
    engine_config_from_flags,
    require_device,
    run,
    usage_errors,
)
from jpaged.scripts.prompts import parse_token_ids, read_prompts

_MODEL = flags.DEFINE_string("model", "demo", "As in jpaged generate.")
_PROMPTS = flags.DEFINE_string(
    "prompts_file", None, "Prompts, one a line; token ids where the model has no tokenizer."
)
_SCALES = flags.DEFINE_string("output", None, "File to write, for --kv_scales.")
define_engine_flags()


def main(argv: list[str]) -> None:
    """Calibrates, and says what was found."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not _SCALES.value:
        raise app.UsageError("--output must be given")
    config = engine_config_from_flags()
    if config.kv_dtype not in EIGHT_BITS:
        raise app.UsageError(f"--kv_dtype={config.kv_dtype}: choose {' or '.join(EIGHT_BITS)}")
    require_device()
    enable_compilation_cache()
    with usage_errors():
        texts = None if _PROMPTS.value is None else read_prompts([], _PROMPTS.value)
        model_config, params, tokenizer, *_ = read_model(_MODEL.value, config)
        backend = resolve_backend(config.backend)
        if texts is None:
            prompts = [calibration_prompt(tokenizer, model_config.vocab_size)]
        elif tokenizer is None:
            prompts = [parse_token_ids(text) for text in texts]
        else:
            prompts = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        # The model as it is without scales, in what would be an engine's.
        plain = dataclasses.replace(config, kv_dtype=None, kv_scales=None)
        max_length = pool_of(config, model_config, backend).max_model_len
        decoder, params = decoder_of(
            plain, model_config, params, backend=backend, max_length=max_length
        )
        scales = calibrated(config, decoder, params, prompts)
        write_kv_scales(_SCALES.value, scales, config.kv_dtype)
    count = sum(map(len, prompts))
    print(
        f"wrote {_SCALES.value}: {config.kv_dtype} scales of {len(scales)} layers, found on "
        f"{count} tokens of {len(prompts)} prompts; keys {_range(scales[:, 0])}, values "
        f"{_range(scales[:, 1])}"
    )


def _range(scales: np.ndarray) -> str:
    return f"{scales.min():.3g} to {scales.max():.3g}"


if __name__ == "__main__":
    run(main)
