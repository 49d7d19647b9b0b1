# SPDX-License-Identifier: Apache-2.0
"""MXFP4: each code is what the specification says, and a packed checkpoint what it stands for."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jpaged.models import checkpoint
from jpaged.models.checkpoint import CheckpointError
from jpaged.models.json_fields import ModelConfigError
from jpaged.models.mxfp4 import dequantised

CASE = pathlib.Path(__file__).parents[1] / "fixtures" / "hf" / "gpt_oss_sinks"
HIDDEN, INNER, EXPERTS, LAYERS = 32, 64, 3, 2


def stands_for(code, scale):
    """By the specification, section 5.3.3: a sign, two bits of exponent and one of mantissa."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
    return (-size if code >> 3 else size) * 2.0 ** (scale - 127)


def unpacked(blocks, scales):
    out = np.zeros((*scales.shape, 32))
    for at in np.ndindex(scales.shape):
        for i, byte in enumerate(blocks[at]):
            out[at][2 * i] = stands_for(byte & 15, int(scales[at]))
            out[at][2 * i + 1] = stands_for(byte >> 4, int(scales[at]))
    return out.reshape(*scales.shape[:-1], -1).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_code_at_every_scale_is_exact(dtype):
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 1, 16), (1, 200, 1))
    scales = np.tile(np.arange(30, 230, dtype=np.uint8), (16, 1))
    got = dequantised(jnp.asarray(blocks), jnp.asarray(scales), dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got, np.float32), unpacked(blocks, scales))


@pytest.fixture(scope="module")
def tensors():
    """What a checkpoint has beside the experts' weights, and these packed and as they are."""
    rng = np.random.default_rng(0)
    heads, kv_heads, head_dim, vocab = 4, 2, 20, 97
    shared = {
        "model.embed_tokens.weight": (vocab, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (vocab, HIDDEN),
    }
    packed, plain = {}, {}
    for i in range(LAYERS):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            shared[f"{attention}.{name}_proj.weight"] = (rows * head_dim, HIDDEN)
            shared[f"{attention}.{name}_proj.bias"] = (rows * head_dim,)
        shared[f"{attention}.o_proj.weight"] = (HIDDEN, heads * head_dim)
        shared[f"{attention}.o_proj.bias"] = (HIDDEN,)
        shared[f"{attention}.sinks"] = (heads,)
        shared[f"model.layers.{i}.input_layernorm.weight"] = (HIDDEN,)
        shared[f"model.layers.{i}.post_attention_layernorm.weight"] = (HIDDEN,)
        shared[f"{mlp}.router.weight"], shared[f"{mlp}.router.bias"] = (EXPERTS, HIDDEN), (EXPERTS,)
        for name, rows, size in (("gate_up", 2 * INNER, HIDDEN), ("down", HIDDEN, INNER)):
            tensor = f"{mlp}.experts.{name}_proj"
            shared[f"{tensor}_bias"] = (EXPERTS, rows)
            blocks = rng.integers(0, 256, (EXPERTS, rows, size // 32, 16)).astype(np.uint8)
            scales = rng.integers(118, 128, blocks.shape[:3]).astype(np.uint8)
            packed |= {f"{tensor}_blocks": blocks, f"{tensor}_scales": scales}
            # As transformers keeps them: what is contracted comes first.
            plain[tensor] = np.ascontiguousarray(unpacked(blocks, scales).swapaxes(1, 2))
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shared.items()}
    return drawn, packed, plain


def write(directory, tensors, **fields):
    config = json.loads((CASE / "config.json").read_text()) | {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_local_experts": EXPERTS,
        "num_hidden_layers": LAYERS,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    (directory / "config.json").write_text(json.dumps(config | fields))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


def test_a_packed_checkpoint_is_what_it_stands_for(tensors, tmp_path):
    drawn, packed, plain = tensors
    for name, own, fields in (
        ("packed", packed, {"quantization_config": MXFP4}),
        ("plain", plain, {}),
    ):
        (tmp_path / name).mkdir()
        write(tmp_path / name, drawn | own, **fields)
    config, got = checkpoint.load(tmp_path / "packed", jnp.float32)
    assert config.packing == "mxfp4"
    same, want = checkpoint.load(tmp_path / "plain", jnp.float32)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, got, want)
    # What is written is unpacked, and says so.
    checkpoint.save_orbax(tmp_path / "orbax", config, got)
    again, restored = checkpoint.load(tmp_path / "orbax", jnp.float32)
    assert again.packing is None
    jax.tree.map(np.testing.assert_array_equal, restored, want)


def test_what_is_packed_otherwise_is_refused(tensors, tmp_path):
    drawn, packed, plain = tensors
    write(tmp_path, drawn | packed, quantization_config={"quant_method": "awq"})
    with pytest.raises(ModelConfigError, match=r"quantization_config=.*supported: quant_method"):
        checkpoint.load(tmp_path, jnp.float32)
    write(tmp_path, drawn | packed)
    with pytest.raises(CheckpointError, match="has dtype U8; supported: F32, F16, BF16"):
        checkpoint.load(tmp_path, jnp.float32)
    write(tmp_path, drawn | plain, quantization_config=MXFP4)
    with pytest.raises(
        CheckpointError, match=re.escape("missing 'model.layers.0.mlp.experts.down")
    ):
        checkpoint.load(tmp_path, jnp.float32)
    scales = "model.layers.1.mlp.experts.down_proj_scales"
    wrong = packed | {scales: packed[scales].astype(np.float32)}
    write(tmp_path, drawn | wrong, quantization_config=MXFP4)
    with pytest.raises(CheckpointError, match=re.escape(f"{scales}' has dtype F32; supported: U8")):
        checkpoint.load(tmp_path, jnp.float32)
