# SPDX-License-Identifier: Apache-2.0
"""GGUF files that the package `gguf` wrote, beside the recorded models that they were made of."""

import dataclasses
import json
import os
import random
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.models import checkpoint, find, sharding
from jpaged.models.decoder import stack_layers
from jpaged.models.gguf_file import GgufFile, is_gguf
from jpaged.models.gguf_model import config_of, generation_config_of
from jpaged.models.merged import merge_projections
from tests import gguf_files
from tests.gguf_files import BF16, F16, FIXTURES, Q4_1, Q8_0

HF = FIXTURES / "hf"
TIED = "llama3_rope_hd80_tied"
SQUARE = "llama_linear_rope_mqa"  # whose axes are multiples of the 32 weights of a block
CASES = [TIED, SQUARE, "llama_gqa5_hd48_untied", "llama_yarn_biases", "qwen3_gqa5_hd48_tied"]


def file_of(folder, case=SQUARE, **options):
    return gguf_files.write_case(folder / "model.gguf", case, **options)


def tensors_by_path(params):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(params)}


def check_equal(params, expected):
    params, expected = tensors_by_path(params), tensors_by_path(expected)
    assert params.keys() == expected.keys()
    for path, tensor in params.items():
        assert tensor.dtype == expected[path].dtype
        np.testing.assert_array_equal(tensor, expected[path], err_msg=path)


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_the_one_that_was_converted(tmp_path, case):
    config, params = checkpoint.load(file_of(tmp_path, case), jnp.float32)
    want_config, want = checkpoint.load(HF / case, jnp.float32)
    check_equal(params, want)
    (layer,), (want_layer,) = config.pattern, want_config.pattern
    rope, want_rope = layer.attention.rope, want_layer.attention.rope
    np.testing.assert_allclose(rope.frequencies(), want_rope.frequencies(), rtol=2e-6)
    if case == TIED:  # which has a factor a frequency now, and not what they were computed from
        assert config.tie_word_embeddings and rope != want_rope
        attention = dataclasses.replace(layer.attention, rope=want_rope)
        layer = dataclasses.replace(layer, attention=attention)
    config = dataclasses.replace(config, pattern=(layer,))
    plain = [dataclasses.replace(c, source=None, eos_token_ids=()) for c in (config, want_config)]
    assert plain[0] == plain[1]


def test_qwen2_has_its_biases(tmp_path):
    case = "qwen2_biases_late_windows"  # a converter leaves windows out
    config, params = checkpoint.load(file_of(tmp_path, case), jnp.float32)
    check_equal(params, checkpoint.load(HF / case, jnp.float32)[1])
    assert config.family == "Qwen2ForCausalLM"


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [TIED, *(pytest.param(c, marks=pytest.mark.nightly) for c in CASES[1:])]
)
def test_greedy_tokens_are_those_that_transformers_recorded(tmp_path, case):
    record = json.loads((HF / case / "expected.json").read_text())
    settings = EngineConfig(
        max_model_len=96, num_pages=96, page_size=8, max_num_batched_tokens=48, max_num_seqs=10,
        deterministic=True,
    )  # fmt: skip
    engine = Engine.load(file_of(tmp_path, case), settings)
    outputs = engine.generate(record["prompts"], SamplingParams(max_tokens=24, temperature=0))
    assert [output.outputs[0].token_ids for output in outputs] == record["continuations"]


@pytest.mark.parametrize("scan", [False, True])
def test_each_device_gets_its_part(tmp_path, scan):
    file = file_of(tmp_path, TIED)
    two = Mesh(np.array(jax.devices("cpu")[:2]), ("tp",), axis_types=(AxisType.Auto,))
    config, params = checkpoint.load(file, jnp.float32, mesh=two, scan_layers=scan)
    assert checkpoint.load(file, jnp.float32)[0] == config
    check_equal(params, checkpoint.load(HF / TIED, jnp.float32, scan_layers=scan)[1])
    for leaf, to in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(sharding.param_shardings(params, two)),
        strict=True,
    ):
        assert leaf.sharding == to
        part = leaf.addressable_shards[1]
        np.testing.assert_array_equal(part.data, np.asarray(leaf)[part.index])
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    parts = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(params)]
    assert sum(parts) < 0.55 * sum(sizes)


def test_a_header_that_was_read_serves_an_engine(tmp_path):
    path = file_of(tmp_path, TIED)
    file = GgufFile(path)
    path.rename(tmp_path / "moved.gguf")
    with pytest.raises(ValueError, match=r"tensor .* cannot be read"):
        Engine.load(file, EngineConfig(num_pages=9, max_model_len=32))
    (tmp_path / "moved.gguf").rename(path)
    engine = Engine.load(file, EngineConfig(num_pages=9, max_model_len=32))
    want = merge_projections(checkpoint.load(HF / TIED, jnp.float32)[1])
    check_equal(engine._runner.params, want)


def blocks(data, size):
    raw = np.frombuffer(data, np.uint8).reshape(-1, size)
    halves = raw[:, : size - size // 16 * 16].copy().view(np.float16).astype(np.float32)
    return halves, raw[:, size - size // 16 * 16 :]


def by_hand(tensor, data):
    """The format's definition: 32 weights a block, behind a scale, and of Q4_1 a least weight."""
    if tensor.dtype == "Q8_0":
        halves, rest = blocks(data, 34)
        weights = halves[:, :1] * rest.view(np.int8)
    else:
        halves, rest = blocks(data, 20)
        weights = halves[:, :1] * np.concatenate([rest & 15, rest >> 4], 1) + halves[:, 1:]
    return weights.reshape(tensor.shape)


@pytest.mark.parametrize("kind", [Q8_0, Q4_1], ids=["Q8_0", "Q4_1"])
def test_quantised_weights(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("jpaged.models.gguf_file._CHUNK", 96)  # tensors in several pieces
    path = file_of(tmp_path, kind=kind)
    file, content = GgufFile(path), path.read_bytes()
    num_quantised = 0
    for name, tensor in file.tensors.items():
        if tensor.dtype != kind.name:
            continue
        size = tensor.shape[0] * tensor.shape[1] // tensor.block * tensor.block_bytes
        want = by_hand(tensor, content[tensor.offset : tensor.offset + size])
        np.testing.assert_array_equal(file.read(name, np.dtype(np.float32)), want)
        num_quantised += 1
    assert num_quantised == 3 * 7 + 2
    _, params = checkpoint.load(path, jnp.bfloat16)
    _, want = checkpoint.load(HF / SQUARE, jnp.bfloat16)
    for found, expected in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True):
        assert found.dtype == jnp.bfloat16
        scale = float(abs(expected).max())
        np.testing.assert_allclose(
            found.astype(np.float32), expected.astype(np.float32), atol=scale / 8
        )


@pytest.mark.parametrize("kind", [F16, BF16], ids=["F16", "BF16"])
def test_half_precision(tmp_path, kind):
    dtype = {F16: jnp.float16, BF16: jnp.bfloat16}[kind]
    _, params = checkpoint.load(file_of(tmp_path, kind=kind), jnp.float32)
    _, want = checkpoint.load(HF / SQUARE, jnp.float32)
    rounded = jax.tree.map(
        lambda x: x if x.ndim == 1 else x.astype(dtype).astype(jnp.float32), want
    )
    check_equal(params, rounded)


def test_what_changes_nothing_is_passed_over(tmp_path):
    more = {
        "llama.attention.causal": True, "llama.rope.scaling.attn_factor": 1.0,
        "llama.expert_count": 0, "llama.logit_scale": 0.0, "llama.tensor_data_layout": "Meta",
        "general.name": "A name", "general.file_type": 2, "other.key": 7,
    }  # fmt: skip
    plain = config_of(GgufFile(file_of(tmp_path)))
    assert config_of(GgufFile(file_of(tmp_path, more=more))) == plain


def test_what_the_file_says_of_ends_and_of_sampling(tmp_path):
    more = {
        "tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 5,
        "general.sampling.temp": 0.25, "general.sampling.top_k": 12,
    }  # fmt: skip
    file = GgufFile(file_of(tmp_path, more=more))
    assert (config_of(file).bos_token_id, config_of(file).eos_token_ids) == (3, (5, 7))
    found = generation_config_of(file)
    assert (found.temperature, found.top_k, found.top_p) == (0.25, 12, None)


@pytest.mark.parametrize(("last", "penalty"), [(-1, 1.5), (0, None)])
def test_a_penalty_looks_at_all_tokens_or_at_none(tmp_path, last, penalty):
    more = {"penalty_repeat": 1.5, "penalty_last_n": last, "mirostat_tau": 5.0, "mirostat": 0}
    more = {f"general.sampling.{key}": value for key, value in more.items()}
    found = generation_config_of(GgufFile(file_of(tmp_path, more=more)))
    assert found.repetition_penalty == penalty


def test_stacked_as_it_is_read(tmp_path):
    path = file_of(tmp_path)
    config, params = checkpoint.load(path, jnp.float32)
    check_equal(
        checkpoint.load(path, jnp.float32, scan_layers=True)[1], stack_layers(params, config)
    )


def test_the_newer_name_of_a_factor_counts(tmp_path):
    more = {"llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 2.0}
    (found,) = config_of(GgufFile(file_of(tmp_path, more=more))).pattern
    (alone,) = config_of(GgufFile(file_of(tmp_path, more=dict([*more.items()][:1])))).pattern
    assert found == alone


def test_a_model_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    path = file_of(tmp_path)
    monkeypatch.setattr(GgufFile, "read", lambda *_: pytest.fail("weights were read"))

    def refuse(config):
        raise RuntimeError(f"{config.num_layers} layers")

    with pytest.raises(RuntimeError, match="3 layers"):
        checkpoint.load(path, jnp.float32, refuse)


def test_which_files_are_meant(tmp_path):
    path = file_of(tmp_path)
    assert is_gguf(path) and is_gguf(path.rename(tmp_path / "model.bin"))
    assert is_gguf(tmp_path / "missing.GGUF") and not is_gguf(tmp_path)
    (tmp_path / "text.bin").write_bytes(b"PK..")
    assert not is_gguf(tmp_path / "text.bin")
    os.mkfifo(tmp_path / "pipe")  # which nobody writes to
    assert not is_gguf(tmp_path / "pipe")
    assert find("folder/model.gguf") == "folder/model.gguf"  # no name of a hub
    (tmp_path / "model.bin").rename(tmp_path / "other.gguf")
    with pytest.raises(FileNotFoundError, match=r"name it itself: .*other\.gguf"):
        checkpoint.load(tmp_path, jnp.float32)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 1300
    return text


def refusal(path):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        checkpoint.load(path, jnp.float32)
    return one_line(error)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"general.architecture": "gemma3"}, "architecture='gemma3' .*supported: llama, qwen2"),
        ({"general.type": "adapter"}, "type='adapter' is not supported"),
        ({"split.count": 3, "split.no": 1}, r"part 2 of 3 .*llama-gguf-split --merge"),
        ({"llama.expert_count": 8}, "llama.expert_count=8: not supported"),
        ({"llama.attention.sliding_window": 64}, "sliding_window=64: not supported"),
        ({"llama.attention.causal": False}, "attention.causal=False: not supported"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "attn_factor=2.0: not supported"),
        ({"llama.rope.scaling.type": "longrope"}, "type='longrope' is not supported"),
        ({"llama.rope.dimension_count": 8}, "dimension_count=8 must be the heads' size, 16"),
        ({"llama.block_count": 4}, "missing 'blk.3.attn_k.weight'"),
        ({"llama.block_count": 2}, "unexpected 'blk.2.attn_k.weight'"),
        ({"llama.block_count": 2**30}, "its metadata asks for far more|asks for .* parameters"),
        ({"llama.block_count": "three"}, "llama.block_count='three' must be of type int"),
        ({"llama.embedding_length": 32}, r"has shape \(.*\), its metadata asks for"),
        ({"llama.context_length": None}, "llama.context_length is missing"),
        ({"general.sampling.mirostat": 2}, "mirostat=2.*generation_config=ignore"),
        (
            {"general.sampling.penalty_repeat": 1.5, "general.sampling.penalty_last_n": 64},
            r"penalty_last_n=64 must be -1, .* or 0, .* beside penalty_repeat=1\.5.*=ignore",
        ),
        ({"tokenizer.ggml.eos_token_id": [1]}, "eos_token_id=.1. must be of type int"),
        ({"general.alignment": 24}, "general.alignment=24 is no power of two"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_not_supported_is_named(tmp_path, more, message):
    config, tensors = gguf_files.recorded(SQUARE)
    metadata = gguf_files.metadata_of(config) | more
    metadata = {key: value for key, value in metadata.items() if value is not None}
    path = tmp_path / "model.gguf"
    gguf_files.write(path, metadata, gguf_files.tensors_of(config, tensors))
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load(path, jnp.float32)
        generation_config_of(GgufFile(path))
    assert str(path) in one_line(error)


def test_factors_beside_a_scaling_contradict_each_other(tmp_path):
    path = file_of(tmp_path, TIED, more={"llama.rope.scaling.type": "linear"})
    assert "contradict" in refusal(path)


def test_damaged_files_are_refused_in_one_line(tmp_path):
    path = file_of(tmp_path, more={"tokenizer.ggml.tokens": ["a", "b"]})
    content, damaged = path.read_bytes(), tmp_path / "damaged.gguf"
    header = min(tensor.offset for tensor in GgufFile(path).tensors.values())
    rng = random.Random(1)
    for end in (0, 3, 4, 8, 20, *(rng.randrange(24, header) for _ in range(40)), header + 9):
        damaged.write_bytes(content[:end])
        assert "damaged.gguf" in refusal(damaged)
    refused = 0
    for _ in range(80):
        at = rng.randrange(4, header)
        changed = bytearray(content)
        changed[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, rng.randbytes(8)])
        damaged.write_bytes(changed)
        try:
            checkpoint.load(damaged, jnp.float32)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 2500
    assert refused > 50
    for head, message in (
        (b"GGML" + struct.pack("<I", 3), "no GGUF file"),
        (b"GGUF" + struct.pack(">I", 3), "big-endian"),
        (b"GGUF" + struct.pack("<I", 1), "has version 1"),
    ):
        damaged.write_bytes(head + content[8:])
        assert message in refusal(damaged)
    assert "does not exist" in refusal(tmp_path / "gone.gguf")


@pytest.mark.parametrize(
    ("tensors", "keys", "rest", "message"),
    [
        (0, 1, struct.pack("<Q1sIIQ", 1, b"k", 9, 0, 2**40), "1099511627776 numbers do not fit"),
        (0, 1, struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 2**60), "texts do not fit"),
        (0, 1, struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1), "a list of values of type 9"),
        (0, 1, struct.pack("<Q1sII", 1, b"k", 99, 0), "a value of type 99"),
        (0, 1, struct.pack("<QQ", 2**63, 0), "a text of 9223372036854775808 bytes does not end"),
        (0, 2**60, bytes(64), "keys do not fit"),
        (2**62, 0, bytes(64), "tensors do not fit"),
        (1, 0, struct.pack("<Q1sI", 1, b"t", 9) + bytes(64), "tensor 't' has 9 axes"),
        (1, 0, struct.pack("<Q1sIQIQ", 1, b"t", 1, 2**62, 0, 0), "truncated: its tensors end at"),
    ],
    ids=range(9),
)  # fmt: skip
def test_what_a_header_claims_is_not_believed(tmp_path, tensors, keys, rest, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest)
    assert message in refusal(path)


def test_an_unknown_packing_is_named(tmp_path):
    path = file_of(tmp_path, kind=Q8_0)
    content = path.read_bytes()
    name = b"token_embd.weight"
    at = content.index(name) + len(name) + 4 + 16
    assert struct.unpack_from("<I", content, at) == (Q8_0,)
    path.write_bytes(content[:at] + struct.pack("<I", 200) + content[at + 4 :])
    assert "'token_embd.weight' is packed as type 200" in refusal(path)


def test_without_the_package(tmp_path, monkeypatch):
    path = file_of(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refusal(path).endswith("pip install gguf")
