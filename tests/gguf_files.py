# SPDX-License-Identifier: Apache-2.0
"""GGUF files for tests, written by the package `gguf` as llama.cpp's converter writes them."""

import json
import pathlib

import gguf
import numpy as np
import safetensors.numpy

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"
F32, F16, BF16, Q4_1, Q8_0 = (
    getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "BF16", "Q4_1", "Q8_0")
)
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3",
}  # fmt: skip
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def recorded(case):
    """config.json and tensors of a recorded model of Hugging Face's."""
    directory = FIXTURES / "hf" / case
    config = json.loads((directory / "config.json").read_text())
    return config, safetensors.numpy.load_file(directory / "model.safetensors")


def metadata_of(config):
    """What a converter writes of a config.json."""
    arch = _ARCHITECTURES[config["architectures"][0]]
    rope = config["rope_parameters"]
    own = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.dimension_count": config["head_dim"],
        "rope.freq_base": rope["rope_theta"],
        "vocab_size": config["vocab_size"],
    }  # fmt: skip
    if rope["rope_type"] in ("linear", "yarn"):
        own["rope.scaling.type"], own["rope.scaling.factor"] = rope["rope_type"], rope["factor"]
    if rope["rope_type"] == "yarn":
        own["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in own.items()}


def rope_factors(config):
    """The tensor that a converter writes for Llama 3: what each frequency is divided by."""
    rope, dim = config["rope_parameters"], config["head_dim"]
    factors = []
    for frequency in 1 / rope["rope_theta"] ** (np.arange(0, dim, 2) / dim):
        turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def tensors_of(config, tensors):
    """Tensors by llama.cpp's names and in its order of rows."""
    renamed = {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        _, _, own = stem.partition("model.layers.")
        number, _, own = own.partition(".")
        prefix = f"blk.{number}." if own else ""
        if config["architectures"] == ["LlamaForCausalLM"] and own in (
            "self_attn.q_proj",
            "self_attn.k_proj",
        ):
            which = "num_attention_heads" if own[-6] == "q" else "num_key_value_heads"
            tensor = interleaved(tensor, config[which])
        renamed[f"{prefix}{_NAMES[own or stem]}.{part}"] = tensor
    if config["rope_parameters"]["rope_type"] == "llama3":
        renamed["rope_freqs.weight"] = rope_factors(config)
    return renamed


def interleaved(tensor, num_heads):
    """llama.cpp's order of a head's rows: of each half one in turn."""
    rows = []
    for head in np.split(tensor, num_heads):
        first, second = np.split(head, 2)
        rows += [row for pair in zip(first, second, strict=True) for row in pair]
    return np.array(rows)


def write(path, metadata, tensors, kind=F32):
    """Writes a file; vectors stay float32, as in real ones."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
            continue
        if type(value) is int:
            (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
            continue
        kinds = {bool: writer.add_bool, float: writer.add_float32}
        kinds.get(type(value), writer.add_string)(key, value)
    for name, tensor in tensors.items():
        own = kind if tensor.ndim > 1 else F32
        if own == F32:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
        else:
            writer.add_tensor(name, gguf.quantize(tensor, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_case(path, case, kind=F32, more=None):
    """Writes a recorded model."""
    config, tensors = recorded(case)
    return write(path, metadata_of(config) | (more or {}), tensors_of(config, tensors), kind)


def vocabulary_of(tokenizer_json, pre):
    """The metadata of a byte-level tokenizer."""
    fields = json.loads(tokenizer_json)
    special = {token["content"]: token["special"] for token in fields["added_tokens"]}
    ids = fields["model"]["vocab"] | {t["content"]: t["id"] for t in fields["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    assert [ids[token] for token in tokens] == list(range(len(tokens)))
    merges = [m if isinstance(m, str) else " ".join(m) for m in fields["model"]["merges"]]
    # An empty list has no type of its own.
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [{True: 3, False: 4}.get(special.get(t), 1) for t in tokens],
        **({"tokenizer.ggml.merges": merges} if merges else {}),
    }
