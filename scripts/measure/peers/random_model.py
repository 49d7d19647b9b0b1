# SPDX-License-Identifier: Apache-2.0
"""Models of random weights on a disk, in the formats that peers read."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jpaged.models.config import ModelConfig
from jpaged.models.config_json import config_to_hf
from jpaged.models.families import source_of
from jpaged.models.fitting import wanted_shapes

_ARCHITECTURES = {"LlamaForCausalLM": "LLAMA", "Qwen3ForCausalLM": "QWEN3"}
_PACKED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def random_tensors(config: ModelConfig, dtype: str, seed: int) -> dict[str, np.ndarray]:
    """Weights by the names of Hugging Face's checkpoints.

    Products keep the size of what they multiply, and embeddings are small beside what layers add to
    them: otherwise a model with a tied head repeats its last token, whatever its attention does.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for path, shape in wanted_shapes(config, {}).items():
        drawn = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            drawn = 1 + 0.1 * drawn if path.endswith("scale") else 0.1 * drawn
        else:
            drawn *= 0.02 if path == "embedding" else shape[-1] ** -0.5
        tensors[source_of(path, shape, config).names[0]] = drawn.astype(jnp.dtype(dtype))
    return tensors


def write_hf(
    directory: pathlib.Path, config: ModelConfig, tensors: dict[str, np.ndarray], dtype: str
) -> None:
    """Writes config.json and model.safetensors as Hugging Face would."""
    # transformers refuses a file that does not say which framework wrote it.
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    fields = {**config_to_hf(config), "dtype": dtype}
    (directory / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def write_gguf(
    file: pathlib.Path, config: ModelConfig, tensors: dict[str, np.ndarray], dtype: str
) -> None:
    """Writes a GGUF file as llama.cpp's converter would, but for a tokenizer, which it lacks.

    Raises:
      ValueError: for a family that it is not written for, or without the package `gguf`.
    """
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise ValueError(f"writing GGUF needs its package ({e}): pip install jpaged[gguf]") from e
    if config.family not in _ARCHITECTURES:
        raise ValueError(f"GGUF is written of {', '.join(_ARCHITECTURES)}, not {config.family}")
    (layer,) = config.pattern
    attention, rope = layer.attention, layer.attention.rope
    assert rope is not None
    fields = config_to_hf(config)
    arch = gguf.MODEL_ARCH[_ARCHITECTURES[config.family]]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(attention.num_q_heads)
    writer.add_head_count_kv(attention.num_kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_dimension_count(rope.dim)
    writer.add_rope_freq_base(rope.theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    kind = gguf.GGMLQuantizationType[_PACKED[dtype]]
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    for name, tensor in tensors.items():
        if arch == gguf.MODEL_ARCH.LLAMA and "q_proj" in name:
            tensor = _pairs(tensor, attention.num_q_heads)
        if arch == gguf.MODEL_ARCH.LLAMA and "k_proj" in name:
            tensor = _pairs(tensor, attention.num_kv_heads)
        own = kind if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32  # as in real files
        packed = gguf.quantize(np.ascontiguousarray(tensor, np.float32), own)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        writer.add_tensor(theirs, packed, raw_dtype=own)
    if rope.scaling is not None:
        # What each frequency is divided by.
        factors = rope.theta ** -(np.arange(0, rope.dim, 2) / rope.dim) / rope.frequencies()
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pairs(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of rows: it turns rows 2 i and 2 i + 1 of a head, others i and i + half."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
