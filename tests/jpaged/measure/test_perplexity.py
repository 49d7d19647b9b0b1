# SPDX-License-Identifier: Apache-2.0
"""Perplexity through pages, beside a model without any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import EngineConfig
from jpaged.measure.perplexity import token_nats, windows_of
from jpaged.models.decoder import Decoder
from tests.jpaged.tiny import TINY, prompts_of, tiny_params


def test_nats_are_those_of_a_dense_model():
    windows = windows_of(prompts_of([41])[0], 20)
    assert [len(window) for window in windows] == [20, 20]
    got = token_nats(EngineConfig(page_size=8), TINY, tiny_params(), windows)
    logits = Decoder(TINY).apply_dense(tiny_params(), jnp.array(windows))
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    want = [[-logprobs[w, t, windows[w][t + 1]] for t in range(19)] for w in range(2)]
    # float32: up to 64 nats, so that 1e-4 alone is a few units in the last place.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_a_text_that_is_too_short():
    with pytest.raises(ValueError, match="the text has 3 tokens, fewer than one window of context"):
        windows_of([1, 2, 3], 4)
