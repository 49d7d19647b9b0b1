# SPDX-License-Identifier: Apache-2.0
"""The named public shapes."""

import jax
import pytest

from jpaged.models.config_json import config_from_hf, config_to_hf
from jpaged.models.decoder import Decoder
from jpaged.models.shapes import SHAPES


def test_parameter_counts_are_the_published_ones():
    counts = {name: Decoder(config).num_params for name, config in SHAPES.items()}
    assert counts == {
        "smollm2-135m": 134_515_008,
        "llama-3.2-1b": 1_235_814_400,
        "qwen3-0.6b": 596_049_920,
        "llama-3.2-3b": 3_212_749_824,
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.1-70b": 70_553_706_496,
        "qwen3-1.7b": 1_720_574_976,
        "qwen3-4b": 4_022_468_096,
        "qwen3-8b": 8_190_735_360,
        "qwen3-14b": 14_768_307_200,
        "qwen3-32b": 32_762_123_264,
    }


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_are_supported_as_hugging_face_writes_them(name):
    assert config_from_hf(config_to_hf(SHAPES[name])) == SHAPES[name]
    decoder = Decoder(SHAPES[name])
    sizes = [leaf.size for leaf in jax.tree.leaves(decoder.abstract_params())]
    assert sum(sizes) == decoder.num_params
