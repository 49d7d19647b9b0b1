# SPDX-License-Identifier: Apache-2.0
"""Models that see images are run as what reads and writes text: its config, its tensors alone."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jpaged.models import checkpoint
from jpaged.models.config_json import config_from_hf, load_config
from jpaged.models.convert import convert
from jpaged.models.stored_tensor import CheckpointError
from tests.gguf_files import FIXTURES

TEXT = FIXTURES / "hf" / "gemma3_two_ropes"
VISION = {
    "vision_tower.vision_model.embeddings.position_embedding.weight": np.ones((4, 16), np.float32),
    "multi_modal_projector.mm_input_projection_weight": np.ones((16, 36), np.float16),
}
# google/gemma-3-4b-it's config.json, but for the vision part's numbers.
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False},
}


def write_whole(directory, *, layers, head, more=()):
    """The recorded model of text, as a part of one that sees images."""
    config = json.loads((TEXT / "config.json").read_text())
    own = {name: value for name, value in config.items() if name != "architectures"}
    whole = GEMMA3_4B | {"text_config": own}
    del whole["eos_token_id"]
    tensors = safetensors.numpy.load_file(TEXT / "model.safetensors")
    renamed = {
        name.replace("model.", layers, 1) if name.startswith("model.") else head + name: tensor
        for name, tensor in tensors.items()
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(whole))
    safetensors.numpy.save_file(renamed | VISION | dict(more), directory / "model.safetensors")
    return directory


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    ("layers", "head"),
    [("language_model.model.", "language_model."), ("model.language_model.", "")],
    ids=["on the hub", "in memory"],
)
def test_it_is_the_model_of_text(tmp_path, layers, head):
    config, params = checkpoint.load(
        write_whole(tmp_path / "whole", layers=layers, head=head), jnp.float32
    )
    want_config, want = checkpoint.load(TEXT, jnp.float32)
    same(params, want)
    plain = [dataclasses.replace(each, source=None) for each in (config, want_config)]
    assert plain[0] == dataclasses.replace(plain[1], eos_token_ids=plain[0].eos_token_ids)


def test_it_is_converted_to_one_of_text(tmp_path):
    whole = write_whole(tmp_path / "whole", layers="language_model.model.", head="language_model.")
    convert(whole, tmp_path / "text")
    fields = json.loads((tmp_path / "text" / "config.json").read_text())
    assert fields["architectures"] == ["Gemma3ForCausalLM"] and "vision_config" not in fields
    same(checkpoint.load(tmp_path / "text", jnp.float32)[1], checkpoint.load(TEXT, jnp.float32)[1])


def test_a_tensor_that_no_part_has_is_refused(tmp_path):
    more = {"language_model.model.layers.0.self_attn.extra.weight": np.ones(3, np.float32)}
    whole = write_whole(
        tmp_path / "whole", layers="language_model.model.", head="language_model.", more=more
    )
    with pytest.raises(CheckpointError, match=r"unexpected 'model.layers.0.self_attn.extra.weight"):
        checkpoint.load(whole, jnp.float32)


def test_tensors_of_files_that_an_index_names(tmp_path):
    whole = write_whole(tmp_path / "whole", layers="language_model.model.", head="language_model.")
    tensors = safetensors.numpy.load_file(whole / "model.safetensors")
    (whole / "model.safetensors").unlink()
    files = {"a.safetensors": VISION, "b.safetensors": {}}
    files["b.safetensors"] = {name: t for name, t in tensors.items() if name not in VISION}
    for name, held in files.items():
        safetensors.numpy.save_file(held, whole / name)
    weight_map = {name: file for file, held in files.items() for name in held}
    index = whole / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    same(checkpoint.load(whole, jnp.float32)[1], checkpoint.load(TEXT, jnp.float32)[1])
    index.write_text(json.dumps({"weight_map": weight_map | {"vision_tower.x": "a.safetensors"}}))
    checkpoint.load(whole, jnp.float32)  # what is missing of the other part is no fault of this one


def test_a_published_config():
    config = config_from_hf(GEMMA3_4B)
    assert (config.family, config.num_layers, config.eos_token_ids) == (
        "Gemma3ForCausalLM", 34, (1, 106)
    )  # fmt: skip
    assert config.vocab_size == 262208 and config.tie_word_embeddings
    assert [a.variant.sliding_window for a in config.attentions[:6]] == [1024] * 5 + [None]
    local, full = config.attentions[0].rope, config.attentions[5].rope
    assert local.theta == 10_000 and local.scaling is None
    assert full.theta == 1_000_000 and full.scaling.factor == 8
    attention = config.attentions[0]
    assert (attention.num_q_heads, attention.num_kv_heads, attention.head_dim) == (8, 4, 256)


def test_a_config_without_its_text_is_refused(tmp_path):
    shutil.copytree(TEXT, tmp_path / "m")
    fields = {name: value for name, value in GEMMA3_4B.items() if name != "text_config"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="text_config=None must be"):
        load_config(tmp_path / "m")
