# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import pytest

from jpaged.measure.floor import floor_of
from jpaged.measure.rates import copy_rates, product_rate
from jpaged.models.config import ExpertsSpec
from jpaged.models.decoder import Decoder
from tests.jpaged.tiny import TINY

RATES = {"copy_bytes_per_s": 1e6, "product_flops_per_s": 1e9}


def test_weights_are_read_once_and_tokens_multiply_by_them():
    # Norms, 97 * 32 of the embedding, and of two layers q, k, v and o, gate, up and down.
    products = 2 * (32 * (64 + 32 + 32 + 64) + 3 * 32 * 48)
    norms = 2 * (2 * 32 + 2 * 16) + 32
    step = {"tokens": 7, "samples": 3, "page_bytes": 1000}
    floor = floor_of(TINY, np.dtype("float16"), **step, **RATES)
    assert floor.weight_bytes == 2 * (97 * 32 + products + norms)
    assert floor.flops == 2 * (7 * (products + norms) + 3 * 97 * 32)
    assert floor.bytes_s == pytest.approx((floor.weight_bytes + 1000) / 1e6)
    assert floor.s == max(floor.bytes_s, floor.flops_s) == floor.bytes_s

    # Of an embedding beside a head only rows are read.
    untied = dataclasses.replace(TINY, tie_word_embeddings=False)
    assert floor_of(untied, np.dtype("float16"), **step, **RATES) == floor


def test_of_experts_those_that_tokens_can_choose_are_read():
    (layer,) = TINY.pattern
    spec = ExpertsSpec(num_experts=8, num_experts_per_token=2, intermediate_size=16)
    config = dataclasses.replace(TINY, pattern=(dataclasses.replace(layer, mlp=spec),))
    one = 2 * 3 * 16 * 32  # of both layers
    found = {
        tokens: floor_of(config, np.dtype("int8"), tokens=tokens, samples=0, page_bytes=0, **RATES)
        for tokens in (1, 3, 4, 100)
    }
    assert found[3].weight_bytes - found[1].weight_bytes == 4 * one
    assert found[100].weight_bytes == found[4].weight_bytes == Decoder(config).num_params
    per_token = Decoder(config).num_params - 97 * 32 - 6 * one
    assert found[1].flops == 2 * per_token


def test_rates_are_of_this_machine():
    # Between a slow laptop under load and more than any CPU has.
    (rate,) = copy_rates(limit_bytes=2**28).values()
    assert 1e8 < rate < 1e13
    assert 1e8 < product_rate(np.dtype("float32")) < 1e14
