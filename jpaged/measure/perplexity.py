# SPDX-License-Identifier: Apache-2.0
"""How well a model predicts a text through pages: what rounding keys and values costs."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import tqdm

from jpaged.device.kv_scales import one_sequence
from jpaged.device.memory import pool_dtype
from jpaged.host.config import EngineConfig
from jpaged.models.config import ModelConfig
from jpaged.pallas_kernels import layout
from jpaged.pallas_kernels.dispatch import resolve_backend
from jpaged.placement import decoder_of


def windows_of(token_ids: Sequence[int], context: int, most: int | None = None) -> list[list[int]]:
    """Cuts a text into windows of `context` tokens, one behind the other; `most` of them at most.

    Raises:
      ValueError: if there is no whole window.
    """
    count = len(token_ids) // context
    if not count:
        raise ValueError(
            f"the text has {len(token_ids)} tokens, fewer than one window of context={context}"
        )
    starts = range(0, min(count, most or count) * context, context)
    return [list(token_ids[start : start + context]) for start in starts]


def token_nats(
    config: EngineConfig,
    model_config: ModelConfig,
    params: Any,
    windows: Sequence[Sequence[int]],
    tokenizer: tokenizers.Tokenizer | None = None,
) -> np.ndarray:
    """Minus the log-probability of each token of some windows, given those before it there.

    Each window is one step, whose queries read keys and values as pages hold them, those of the
    step's own tokens too: as they would if every token had been decoded by itself.

    Args:
      config: an engine's, of which kv_dtype, kv_scales, dtype, page_size and backend count.
      model_config: the model's shape.
      params: its parameters.
      windows: token ids, equally many each, and at least two.
      tokenizer: for the text that scales are found on.

    Returns:
      f64[num_windows, context - 1], in nats; the first token of a window is given.
    """
    backend, context = resolve_backend(config.backend), len(windows[0])
    decoder, params = decoder_of(
        config, model_config, params, tokenizer, backend=backend, max_length=context
    )
    num_pages = 1 + -(-context // config.page_size)
    shape = layout.kv_pages_shape(
        model_config.num_layers,
        num_pages,
        model_config.num_kv_heads,
        config.page_size,
        model_config.head_dim,
        backend=backend,
    )

    @jax.jit
    def nats(params, inputs, following):
        logits, _ = decoder.apply(params, inputs, jnp.zeros(shape, pool_dtype(config)))
        logprobs = jax.nn.log_softmax(logits[:-1])
        return -jnp.take_along_axis(logprobs, following[:, None], axis=1)[:, 0]

    name = f"{config.kv_dtype or pool_dtype(config).name} pages"
    bar = tqdm.tqdm(windows, desc=name, unit="window", disable=None, leave=False)
    found = [
        nats(params, one_sequence(window, context, num_pages), np.array(window[1:], np.int32))
        for window in bar
    ]
    return np.array(found, np.float64)
