# SPDX-License-Identifier: Apache-2.0
"""Which layers share a page table: hand-worked cases, and what holds for any pattern."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.models.cache_groups import cache_groups
from jpaged.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, NormSpec
from jpaged.models.decoder import Decoder
from jpaged.models.inputs import PagedInputs
from jpaged.pallas_kernels.rows import Rows
from jpaged.pallas_kernels.variant import AttentionVariant

LONGEST = 131072


def model(windows, num_layers=None):
    """A model whose layers see these windows, one after the other."""
    pattern = tuple(
        LayerSpec(
            attention=AttentionSpec(
                num_q_heads=2,
                num_kv_heads=1,
                head_dim=16,
                rope=None,
                variant=AttentionVariant(sliding_window=window),
            ),
            mlp=MlpSpec(intermediate_size=8),
        )
        for window in windows
    )
    return ModelConfig(
        family="Gemma3ForCausalLM",
        vocab_size=7,
        hidden_size=8,
        num_layers=num_layers or len(pattern),
        pattern=pattern,
        norm=NormSpec(eps=1e-6),
        tie_word_embeddings=True,
        max_position_embeddings=LONGEST,
    )


GEMMA3 = [512] * 5 + [None]


@pytest.mark.parametrize(
    ("name", "windows", "num_layers", "size", "kinds", "num_padded"),
    [
        ("Llama", [None], 32, 32, ((None, 1),), 0),
        ("Mistral", [4096], 32, 32, ((4096, 1),), 0),
        ("Gemma 2 9B", [4096, None], 42, 21, ((None, 1), (4096, 1)), 0),
        # 22 with a window and 4 without: no padding with 13 groups, which is less than with 7.
        ("Gemma 3 1B", GEMMA3, 26, 2, ((None, 2), (512, 11)), 0),
        ("Gemma 3 4B", GEMMA3, 34, 5, ((None, 1), (512, 6)), 1),
        ("Gemma 3 12B", GEMMA3, 48, 8, ((None, 1), (512, 5)), 0),
        # 52 and 10: without padding there would be 31 groups.
        ("Gemma 3 27B", GEMMA3, 62, 5, ((None, 2), (512, 11)), 3),
        ("gpt-oss-20b", [128, None], 24, 12, ((None, 1), (128, 1)), 0),
        ("Ministral 8B", [None, 32768, 32768, 32768], 36, 9, ((None, 1), (32768, 3)), 0),
        ("a window that nothing exceeds", [LONGEST, None], 6, 6, ((None, 1),), 0),
        ("two windows", [8, 16], 8, 4, ((8, 1), (16, 1)), 0),
    ],
)
def test_by_hand(name, windows, num_layers, size, kinds, num_padded):
    groups = cache_groups(model(windows, num_layers))
    assert (groups.size, groups.kinds, groups.num_padded) == (size, kinds, num_padded)


@pytest.mark.parametrize(
    ("name", "num_layers", "max_length", "kinds", "num_padded"),
    [
        # 16 groups of 131,072 tokens are 34 of 61,680, and 31 of 67,650.
        ("Gemma 3 4B", 34, 61_680, ((None, 5), (512, 29)), 0),
        ("Gemma 3 4B", 34, 61_681, ((None, 1), (512, 6)), 1),
        ("Gemma 3 27B", 62, 67_650, ((None, 5), (512, 26)), 0),
        ("Gemma 3 27B", 62, 67_651, ((None, 2), (512, 11)), 3),
        # What pads nothing stays as it is.
        ("Gemma 3 1B", 26, 1024, ((None, 2), (512, 11)), 0),
        ("Gemma 3 12B", 48, 1024, ((None, 1), (512, 5)), 0),
    ],
)
def test_shorter_sequences_may_have_more_groups(name, num_layers, max_length, kinds, num_padded):
    groups = cache_groups(model(GEMMA3, num_layers), max_length)
    assert (groups.kinds, groups.num_padded) == (kinds, num_padded)


def test_places_are_in_order_of_layers():
    groups = cache_groups(model([3, None, 3, 3], 5))
    # Layers 0, 2, 3 and 4 see three tokens, and share two groups of two with layer 1.
    assert groups.size == 1
    assert groups.windows == (None, 3, 3, 3, 3)
    assert groups.places == ((1, 0), (0, 0), (2, 0), (3, 0), (4, 0))
    groups = cache_groups(model([3, None], 4))
    assert groups.places == ((1, 0), (0, 0), (1, 1), (0, 1))


@settings(deadline=None, max_examples=80)
@given(
    windows=st.lists(st.sampled_from([None, None, 1, 7, 128, LONGEST]), min_size=1, max_size=70),
    max_length=st.sampled_from([None, 100, 40_000, 90_000, LONGEST]),
)
def test_of_any_pattern(windows, max_length):
    config = model(windows)
    groups = cache_groups(config, max_length)
    assert len(set(groups.places)) == len(groups.places) == config.num_layers
    for index, (group, place) in enumerate(groups.places):
        window = config.layer(index).attention.variant.sliding_window
        assert groups.windows[group] == (None if window == LONGEST else window)
        assert 0 <= place < groups.size
    assert groups.num_groups * (max_length or LONGEST) <= 16 * LONGEST
    # Kinds stand together, and no group is empty.
    assert [w for w, count in groups.kinds for _ in range(count)] == list(groups.windows)
    assert {group for group, _ in groups.places} == set(range(groups.num_groups))
    # One more place a page would leave whole groups out, or more padding.
    assert groups.num_padded < groups.size * len(groups.kinds)


def test_layers_of_other_shapes_are_refused():
    one = model([4, None])
    other = dataclasses.replace(one.pattern[1].attention, head_dim=32)
    with pytest.raises(ValueError, match="KV heads and lanes differ: the pages of one pool"):
        dataclasses.replace(
            one, pattern=(one.pattern[0], dataclasses.replace(one.pattern[1], attention=other))
        )


@pytest.mark.parametrize("num_tokens", [4, 64], ids=["decode", "mixed"])
def test_a_donated_step_by_groups_holds_one_pool(num_tokens):
    """Scanned over the layers, of which each has its group and its place only at run time."""
    config = model([8, 8, None], 8)
    groups = cache_groups(config)
    assert (groups.size, groups.num_groups) == (2, 4)
    shape = (groups.size, 40_000, 1, 16, 32)
    pool = jax.ShapeDtypeStruct(shape, jnp.float32)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    inputs = PagedInputs(
        token_ids=ints((num_tokens,)),
        positions=ints((num_tokens,)),
        rows=Rows(ints((4, 4, 64)), ints((4,)), ints((5,)), ints((1,))),
        logits_indices=ints((4,)),
    )
    decoder = Decoder(config, scan_layers=True, backend="xla")
    step = jax.jit(decoder.apply, donate_argnums=2)
    memory = step.lower(decoder.abstract_params(), inputs, pool).compile().memory_analysis()
    pool_bytes = 4 * math.prod(shape)
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 50
