# SPDX-License-Identifier: Apache-2.0
"""Scales of pages of eight bits: given in a file, or found by running the model on some text."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import tqdm

from jpaged.host.checks import directory, shown
from jpaged.models.decoder import Decoder, Params
from jpaged.models.inputs import PagedInputs
from jpaged.pallas_kernels import layout
from jpaged.pallas_kernels.rows import Rows

# What the largest number that was seen is stored as. A float loses nothing by room for numbers that
# are twice as large; an integer has none to give away.
_STORED_MAX = {"int8": 127.0, "float8_e4m3fn": 224.0}
_MAX_TOKENS = 512

# Prose, numbers, code and other scripts: keys and values of what models are mostly asked.
_TEXT = """\
The harbour lay quiet that morning, and the old pilot counted the boats twice before he spoke.
"Eleven went out," he said, "and ten came back." Nobody answered. In 1887 the same wind had taken
the church roof, 3 barns, and a clock worth 250 pounds; people still argued about the clock.

A page table maps logical pages to physical ones. If a process writes to a shared page, the kernel
copies it first, so that the other owner sees no change. Why is that cheaper than copying at once?
Because most shared pages are only ever read, and what is never written need never be copied.

    def mean(values: list[float]) -> float:
        if not values:
            raise ValueError("mean of nothing")
        return sum(values) / len(values)

Ingredients: 200 g flour, 2 eggs, 1/2 tsp salt, 30 ml milk. Mix, rest for 20 minutes, then fry.
The derivative of x^2 + 3x is 2x + 3, and its integral from 0 to 1 is 1/3 + 3/2 = 11/6.

{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"], "alive": false}
https://example.org/search?q=paged+attention&page=2

Der Zug nach Bern hat leider zwanzig Minuten Verspätung. Où est la bibliothèque, s'il vous plaît?
El perro duerme bajo la mesa. 今日はとても暑いですね。 Сегодня идёт дождь. مرحبا بالعالم

User: Can you summarise the meeting in two sentences?
Assistant: The team agreed to ship the release on Thursday and to postpone the new parser. Maria
will write the notes, and Tom is to find out why the nightly tests take four hours.
"""


class KvScalesError(ValueError):
    """Scales that are no scales of this model's pages; the message says which and why."""


def calibrate(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    kv_dtype: str,
    *,
    page_size: int,
    pool_dtype: np.dtype,
) -> np.ndarray:
    """Finds scales by running a model on prompts, and looking at what lies in its pages.

    Args:
      decoder: the model, of one device.
      params: its parameters.
      prompts: token ids, each of a sequence by itself; the first 512 of each count.
      kv_dtype: of `EIGHT_BITS`.
      page_size: tokens a page holds, as the kernels take it.
      pool_dtype: of the pages that are looked at, which are not rounded to eight bits.

    Returns:
      f32[num_layers, 2], for `Decoder.apply`: the largest key, and the largest value, of each layer
      over what it is stored as.

    Raises:
      KvScalesError: if there is no prompt, or keys or values are not finite.
    """
    config = decoder.config
    longest = max((len(prompt) for prompt in prompts), default=0)
    if not longest:
        raise KvScalesError("calibration needs a prompt of at least one token")
    num_tokens = min(longest, _MAX_TOKENS, config.max_position_embeddings)
    num_pages = 1 + -(-num_tokens // page_size)
    shape = layout.kv_pages_shape(
        config.num_layers,
        num_pages,
        config.num_kv_heads,
        page_size,
        config.head_dim,
        backend=decoder.backend or "xla",
    )

    @jax.jit
    def largest(params: Params, inputs: PagedInputs) -> jax.Array:
        _, kv_pages = decoder.apply(params, inputs, jnp.zeros(shape, pool_dtype))
        # Page 0 may hold what padding wrote.
        cells = kv_pages[:, 1:, ..., : 2 * config.head_dim].astype(jnp.float32)
        cells = jnp.abs(cells.reshape(config.num_layers, -1, 2, config.head_dim))
        # A maximum may pass over a NaN.
        return jnp.max(jnp.where(jnp.isfinite(cells), cells, jnp.inf), axis=(1, 3))

    found = np.zeros((config.num_layers, 2), np.float32)
    for prompt in tqdm.tqdm(prompts, desc="calibrating", unit="prompt", disable=None, leave=False):
        inputs = one_sequence(prompt[:num_tokens], num_tokens, num_pages)
        found = np.maximum(found, np.asarray(largest(params, inputs)))
    if not np.isfinite(found).all():
        layer = int(np.argwhere(~np.isfinite(found))[0, 0])
        raise KvScalesError(
            f"keys or values of layer {layer} are not finite while scales for {kv_dtype} pages "
            "are found: load the model with dtype='float32' or 'bfloat16', or mend its weights"
        )
    return np.where(found > 0, found / _STORED_MAX[kv_dtype], 1).astype(np.float32)


def one_sequence(prompt: Sequence[int], num_tokens: int, num_pages: int) -> PagedInputs:
    """A step that computes a prompt whole, in the pages from 1 on, with the logits of all tokens.

    Args:
      prompt: token ids.
      num_tokens: what they are padded to.
      num_pages: pages of the pool, page 0 included.
    """
    count = len(prompt)
    token_ids, positions = np.zeros((2, num_tokens), np.int32)
    token_ids[:count], positions[:count] = prompt, np.arange(count)
    rows: Any = {
        "page_table": np.arange(1, num_pages, dtype=np.int32)[None],
        "kv_lens": np.array([count], np.int32),
        "cu_q_lens": np.array([0, count], np.int32),
        "num_seqs": np.ones(1, np.int32),
    }
    arrays: Any = token_ids, positions, Rows(**rows), np.arange(num_tokens, dtype=np.int32)
    return PagedInputs(*arrays)


def calibration_prompt(tokenizer: tokenizers.Tokenizer | None, vocab_size: int) -> list[int]:
    """What an engine calibrates on: a text of this file, or tokens drawn where there are no words.

    Args:
      tokenizer: the model's; None where it has none.
      vocab_size: of the model.
    """
    if tokenizer is None:
        return np.random.default_rng(0).integers(vocab_size, size=_MAX_TOKENS).tolist()
    return tokenizer.encode(_TEXT).ids[:_MAX_TOKENS]


def write_kv_scales(path: str | pathlib.Path, scales: np.ndarray, kv_dtype: str) -> None:
    """Writes scales for `EngineConfig.kv_scales`: a JSON object with `kv_dtype` and `scales`."""
    # Of each number the shortest text that gives it back.
    rows = [[float(str(number)) for number in row] for row in np.asarray(scales, np.float32)]
    text = json.dumps({"kv_dtype": kv_dtype, "scales": rows})
    directory("kv_scales", path).write_text(text + "\n", encoding="utf-8")


def read_kv_scales(path: str | pathlib.Path, num_layers: int, kv_dtype: str) -> np.ndarray:
    """Reads what `write_kv_scales` wrote.

    Returns:
      f32[num_layers, 2].

    Raises:
      KvScalesError: if they are for another dtype, or not one pair of positive numbers a layer.
      OSError: if the file cannot be read.
    """
    try:
        fields = json.loads(directory("kv_scales", path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise KvScalesError(f"kv_scales: {path} is not JSON: {e}") from None
    if not isinstance(fields, dict) or not {"kv_dtype", "scales"} <= fields.keys():
        raise KvScalesError(
            f"kv_scales: {path} is no object with kv_dtype and scales, as jpaged calibrate writes"
        )
    if fields["kv_dtype"] != kv_dtype:
        raise KvScalesError(
            f"kv_scales: {path} is for kv_dtype={shown(fields['kv_dtype'])}, not {kv_dtype}: "
            "calibrate for that"
        )
    try:
        scales = np.array(fields["scales"], np.float32)
    except (TypeError, ValueError, OverflowError):
        scales = np.zeros(0, np.float32)
    if scales.shape != (num_layers, 2) or not ((scales > 0) & np.isfinite(scales)).all():
        raise KvScalesError(
            f"kv_scales: {path} must have for each of {num_layers} layers a pair of finite numbers "
            f"above 0, of keys and of values, not an array of shape {list(scales.shape)}"
            + (f" that begins {scales.ravel()[:4].tolist()}" if scales.size else "")
        )
    return scales
