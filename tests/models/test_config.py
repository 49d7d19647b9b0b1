# SPDX-License-Identifier: Apache-2.0
"""config.json in and out, beside numbers written down by hand."""

import dataclasses
import json
import math
import pathlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged import EngineConfig
from jpaged.device.memory import plan_pool
from jpaged.models.config import dense_config
from jpaged.models.config_json import config_from_hf, config_to_hf, load_config
from jpaged.models.decoder import Decoder
from jpaged.models.json_fields import ModelConfigError
from jpaged.models.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from jpaged.models.shapes import SHAPES

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "hf"

# What scripts/fixtures/record_hf_fixtures.py asked transformers for.
RECORDED = {
    "llama_gqa5_hd48_untied": dense_config(
        family="LlamaForCausalLM",
        vocab_size=131,
        hidden_size=60,
        intermediate_size=32,
        num_layers=2,
        num_q_heads=5,
        num_kv_heads=1,
        head_dim=48,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        max_position_embeddings=128,
    ),
    "llama3_rope_hd80_tied": dense_config(
        family="LlamaForCausalLM",
        vocab_size=160,
        hidden_size=40,
        intermediate_size=40,
        num_layers=2,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=80,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=Llama3Scaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position=32,
        ),
        tie_word_embeddings=True,
        max_position_embeddings=256,
    ),
    "llama_linear_rope_mqa": dense_config(
        family="LlamaForCausalLM",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_layers=3,
        num_q_heads=4,
        num_kv_heads=1,
        head_dim=16,
        rms_norm_eps=1e-2,
        rope_theta=10_000.0,
        rope_scaling=LinearScaling(factor=2.0),
        tie_word_embeddings=False,
        max_position_embeddings=128,
    ),
    "qwen3_gqa5_hd48_tied": dense_config(
        family="Qwen3ForCausalLM",
        vocab_size=150,
        hidden_size=36,
        intermediate_size=32,
        num_layers=2,
        num_q_heads=10,
        num_kv_heads=2,
        head_dim=48,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        qk_norm=True,
        tie_word_embeddings=True,
        max_position_embeddings=128,
    ),
    "qwen3_mha_hd80_untied_sharded": dense_config(
        family="Qwen3ForCausalLM",
        vocab_size=128,
        hidden_size=48,
        intermediate_size=40,
        num_layers=2,
        num_q_heads=2,
        num_kv_heads=2,
        head_dim=80,
        rms_norm_eps=1e-2,
        rope_theta=1_000_000.0,
        qk_norm=True,
        tie_word_embeddings=False,
        max_position_embeddings=128,
    ),
}

# As published with the weights.
LLAMA_2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_3_2_1B = LLAMA_3_1_8B | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA_3_1_8B["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


class TestPublishedModels:
    def test_llama_2_7b(self):
        config = config_from_hf(LLAMA_2_7B)
        assert config == dense_config(
            family="LlamaForCausalLM",
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_layers=32,
            num_q_heads=32,
            num_kv_heads=32,
            head_dim=128,
            rms_norm_eps=1e-5,
            rope_theta=10_000.0,
            tie_word_embeddings=False,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_ids=(2,),
        )
        assert Decoder(config).num_params == 6_738_415_616
        assert config.kv_bytes_per_token(2) == 512 * 1024

    def test_llama_3_1_8b(self):
        config = config_from_hf(LLAMA_3_1_8B)
        assert (config.num_kv_heads, config.head_dim, config.num_layers) == (8, 128, 32)
        (layer,) = config.pattern
        assert layer.attention.rope.theta == 500_000.0
        assert layer.attention.rope.scaling == Llama3Scaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position=8192,
        )
        assert (config.bos_token_id, config.eos_token_ids) == (128000, (128001,))
        assert config.max_position_embeddings == 131072
        assert layer.attention.qk_norm is None and not config.tie_word_embeddings
        assert Decoder(config).num_params == 8_030_261_248
        assert config.kv_bytes_per_token(2) == 128 * 1024

    def test_llama_3_2_1b(self):
        config = config_from_hf(LLAMA_3_2_1B)
        assert (config.num_q_heads, config.num_kv_heads, config.head_dim) == (32, 8, 64)
        assert config.pattern[0].attention.rope.scaling.factor == 32.0
        assert config.tie_word_embeddings
        assert Decoder(config).num_params == 1_235_814_400
        assert config.kv_bytes_per_token(2) == 32 * 1024

    def test_qwen3_0_6b(self):
        config = config_from_hf(QWEN3_0_6B)
        assert (config.num_q_heads, config.num_kv_heads, config.head_dim) == (16, 8, 128)
        attention = config.pattern[0].attention
        assert attention.qk_norm == "head" and config.tie_word_embeddings
        assert attention.rope == Rope(theta=1_000_000.0, dim=128)
        assert (config.bos_token_id, config.eos_token_ids) == (151643, (151645,))
        assert Decoder(config).num_params == 596_049_920
        assert config.kv_bytes_per_token(2) == 112 * 1024


SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}


def test_shapes_that_are_measured_are_the_published_ones():
    published = {
        "smollm2-135m": SMOLLM2_135M,
        "llama-3.2-1b": LLAMA_3_2_1B,
        "qwen3-0.6b": QWEN3_0_6B,
    }
    read = {name: config_from_hf(fields) for name, fields in published.items()}
    assert read == {name: SHAPES[name] for name in published}
    assert Decoder(SHAPES["smollm2-135m"]).num_params == 134_515_008


class TestRecordedModels:
    @pytest.mark.parametrize("name", RECORDED)
    def test_reads_what_was_asked_for(self, name):
        assert load_config(FIXTURES / name) == RECORDED[name]

    @pytest.mark.parametrize("name", ["llama3_rope_hd80_tied", "qwen3_gqa5_hd48_tied"])
    def test_transformers_4_and_5_write_the_same_model(self, name):
        old = json.loads((FIXTURES / name / "config_v4.json").read_text())
        new = json.loads((FIXTURES / name / "config.json").read_text())
        assert "rope_parameters" in new and "rope_parameters" not in old
        assert config_from_hf(old) == config_from_hf(new) == RECORDED[name]

    @pytest.mark.parametrize("name", RECORDED)
    def test_writes_what_transformers_writes(self, name):
        theirs = json.loads((FIXTURES / name / "config.json").read_text())
        ours = json.loads(json.dumps(config_to_hf(RECORDED[name])))
        assert ours == {field: theirs[field] for field in ours}
        assert "num_key_value_heads" in ours and "rope_parameters" in ours


@st.composite
def configs(draw):
    size = st.integers(1, 10**6)
    vocab_size = draw(size)
    num_kv_heads = draw(st.integers(1, 64))
    factor = st.floats(1, 64, allow_nan=False)
    rope_scaling = draw(
        st.one_of(
            st.none(),
            st.builds(LinearScaling, factor=factor),
            st.builds(
                Llama3Scaling,
                factor=factor,
                low_freq_factor=st.floats(0.1, 8, allow_nan=False),
                high_freq_factor=st.floats(9, 64, allow_nan=False),
                original_max_position=size,
            ),
        )
    )
    family = draw(st.sampled_from(["LlamaForCausalLM", "Qwen3ForCausalLM"]))
    return dense_config(
        family=family,
        vocab_size=vocab_size,
        hidden_size=draw(size),
        intermediate_size=draw(size),
        num_layers=draw(size),
        num_q_heads=num_kv_heads * draw(st.integers(1, 16)),
        num_kv_heads=num_kv_heads,
        head_dim=2 * draw(st.integers(1, 128)),
        rms_norm_eps=draw(st.floats(1e-9, 1)),
        rope_theta=draw(st.floats(1, 1e9)),
        rope_scaling=rope_scaling,
        qk_norm=family == "Qwen3ForCausalLM",
        tie_word_embeddings=draw(st.booleans()),
        max_position_embeddings=draw(size),
        bos_token_id=draw(st.one_of(st.none(), st.integers(0, vocab_size - 1))),
        eos_token_ids=tuple(draw(st.lists(st.integers(0, vocab_size - 1), max_size=3))),
    )


@given(configs())
def test_round_trip(config):
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


SMALL = {
    "family": "LlamaForCausalLM", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8,
    "num_layers": 2, "num_q_heads": 2, "num_kv_heads": 1, "head_dim": 4, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "tie_word_embeddings": True, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_ids": (),
}  # fmt: skip
YARN = YarnScaling(factor=4.0, original_max_position=16, attention_factor=1.0)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (dense_config(**SMALL, rope_scaling=YARN), "pattern would be read back"),
        (dense_config(**SMALL, qk_norm=True), "pattern would be read back"),
        (dataclasses.replace(config_from_hf(QWEN3_0_6B), num_layers=3), "num_layers would be"),
    ],
)
def test_what_would_be_read_back_as_something_else_is_not_written(config, says):
    with pytest.raises(ModelConfigError, match=says):
        config_to_hf(config)


class TestDefaults:
    """Fields that config.json may leave out, and what transformers takes for them."""

    def test_heads_of_their_own(self):
        fields = {key: value for key, value in LLAMA_3_1_8B.items() if key != "num_key_value_heads"}
        assert config_from_hf(fields).num_kv_heads == 32
        assert config_from_hf(fields | {"num_key_value_heads": None}).num_kv_heads == 32

    def test_head_dim(self):
        assert config_from_hf(LLAMA_3_1_8B | {"head_dim": None}).head_dim == 128
        assert config_from_hf(LLAMA_3_1_8B | {"head_dim": 96}).head_dim == 96
        # Qwen3's is not hidden_size / heads, which would be 64 here.
        fields = {key: value for key, value in QWEN3_0_6B.items() if key != "head_dim"}
        assert config_from_hf(fields).head_dim == 128

    def test_the_rest(self):
        left_out = ("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "rope_theta")
        fields = {key: value for key, value in LLAMA_3_1_8B.items() if key not in left_out}
        config = config_from_hf(fields)
        assert (config.norm.eps, config.tie_word_embeddings) == (1e-6, False)
        assert config.max_position_embeddings == 2048
        assert config.pattern[0].attention.rope.theta == 10_000.0
        assert config_from_hf(fields | {"eos_token_id": None}).eos_token_ids == ()
        assert config_from_hf(fields | {"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
        assert config_from_hf(fields | {"eos_token_id": 0}).eos_token_ids == (0,)

    def test_rope_written_both_ways(self):
        both = LLAMA_3_1_8B | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": None}}
        assert config_from_hf(both) == config_from_hf(LLAMA_3_1_8B)

    def test_rope_scaling_in_its_oldest_form(self):
        config = config_from_hf(LLAMA_2_7B | {"rope_scaling": {"type": "linear", "factor": 4}})
        assert config.pattern[0].attention.rope.scaling == LinearScaling(factor=4.0)


REMOVED = object()
LLAMA3_ROPE = LLAMA_3_1_8B["rope_scaling"]
# What is changed, and what the message must say.
FAULTS = {
    "unknown field": ({"logit_scale": 0.5}, ["logit_scale=0.5", "LlamaForCausalLM", "not ignored"]),
    "unknown fields": ({"b": 1, "a": [2]}, ["a=[2], b=1"]),
    "unknown field without a name": ({"a\nb" * 99: 1}, ["'a\\nba\\nb", "...", "=1"]),
    "quantized": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        ["quantization_config={'bits': 4, 'quant_method': 'gptq'}", "supported: null"],
    ),
    "window": ({"sliding_window": 4096}, ["sliding_window=4096", "LlamaForCausalLM"]),
    "not causal": ({"is_causal": False}, ["is_causal=False", "supported: True"]),
    "encoder": ({"is_encoder_decoder": True}, ["is_encoder_decoder=True"]),
    "interleaved": ({"rope_interleaved": True}, ["rope_interleaved=True"]),
    "more than a head turned": (
        {"partial_rotary_factor": 1.5},
        ["partial_rotary_factor=1.5", "at most 1"],
    ),
    "two parts of a head turned": (
        {
            "rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5},
            "partial_rotary_factor": 0.25,
        },
        ["partial_rotary_factor", "[0.25, 0.5]"],
    ),
    "bias that is no flag": ({"attention_bias": 0}, ["attention_bias=0", "type bool"]),
    "text for a bias": ({"mlp_bias": "false"}, ["mlp_bias='false'", "type bool"]),
    "another config": ({"text_config": {"vocab_size": 3}}, ["text_config={'vocab_size': 3}"]),
    "two contexts": (
        {"original_max_position_embeddings": 4096},
        ["original_max_position_embeddings=4096", "8192"],
    ),
    "architecture": (
        {"architectures": ["FalconForCausalLM"]},
        ["architectures=['FalconForCausalLM']", "'LlamaForCausalLM'", "'Qwen3ForCausalLM'"],
    ),
    "two architectures": (
        {"architectures": ["LlamaForCausalLM", "Qwen3ForCausalLM"]},
        ["architectures=['LlamaForCausalLM', 'Qwen3ForCausalLM']"],
    ),
    "no architecture": (
        {"architectures": REMOVED, "model_type": REMOVED},
        ["architectures=[] with model_type=None"],
    ),
    "no architecture of ours": (
        {"architectures": None, "model_type": "falcon"},
        ["architectures=[] with model_type='falcon'"],
    ),
    "one architecture of ours and no type": (
        {"architectures": ["LlamaForCausalLM", "LlamaModel"], "model_type": REMOVED},
        ["architectures=['LlamaForCausalLM', 'LlamaModel'] with model_type=None"],
    ),
    "model type": ({"model_type": "mistral"}, ["model_type='mistral'", "'llama'"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
    "sliding layers": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        ["layer_types=['full_attention', 'sliding_attention']", "'full_attention'"],
    ),
    "sliding window": ({"use_sliding_window": True}, ["use_sliding_window=True"]),
    "ntk": (
        {"rope_scaling": {"rope_type": "ntk", "factor": 4.0}},
        ["rope_type='ntk'", "'default', 'linear', 'dynamic', 'llama3', 'yarn', 'longrope'"],
    ),
    "old yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_type='yarn'"]),
    "new yarn": (
        {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            "rope_scaling": None,
        },
        ["rope_type='yarn'"],
    ),
    "dynamic without factor": (
        {"rope_scaling": {"type": "dynamic"}},
        ["rope_type='dynamic'", "'factor'", "missing"],
    ),
    "linear without factor": (
        {"rope_scaling": {"rope_type": "linear"}},
        ["rope_type='linear'", "'factor'", "missing"],
    ),
    "linear with llama3's fields": (
        {"rope_scaling": LLAMA3_ROPE | {"rope_type": "linear"}},
        [
            "'high_freq_factor', 'low_freq_factor', 'original_max_position_embeddings'",
            "rope_type='linear'",
        ],
    ),
    "unknown rope parameter": (
        {"rope_scaling": LLAMA3_ROPE | {"attention_factor": 0.5}},
        ["attention_factor", "rope_type='llama3'"],
    ),
    "rope for each kind of layer": (
        {
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_scaling": None,
        },
        ["full_attention", "rope_type='default'"],
    ),
    "heads that do not divide the width": (
        {"hidden_size": 4097},
        ["hidden_size=4097", "num_attention_heads=32", "head_dim"],
    ),
    "a layer too few": (
        {"layer_types": ["full_attention"] * 31},
        ["layer_types has 31", "num_hidden_layers=32"],
    ),
    "sparse layers": ({"mlp_layer_types": ["sparse"] * 32}, ["mlp_layer_types=['sparse', "]),
    "stop token beyond 32 bits": ({"eos_token_id": [2, 2**31]}, ["eos_token_id=2147483648"]),
    "no layers": ({"num_hidden_layers": 0}, ["num_layers=0", "at least 1"]),
    "heads that do not divide": (
        {"num_key_value_heads": 7},
        ["num_q_heads=32", "multiple of num_kv_heads=7"],
    ),
    "heads of none": ({"num_attention_heads": 0, "head_dim": None}, ["num_q_heads=0", "least 1"]),
    "no KV heads": ({"num_key_value_heads": 0}, ["num_kv_heads=0", "at least 1"]),
    "no theta": ({"rope_theta": 0.0}, ["rope_theta=0.0", "above 0"]),
    "factor that shrinks": ({"rope_scaling": LLAMA3_ROPE | {"factor": 0.0}}, ["factor=0.0"]),
    "equal frequency factors": (
        {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}},
        ["low_freq_factor=4.0", "below high_freq_factor=4.0"],
    ),
    "two kinds of rope": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
        ["rope_parameters=", "rope_scaling=", "contradict"],
    ),
    "two thetas": (
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 1e4}, "rope_theta": 2e4},
        ["rope_theta", "[10000.0, 20000.0]"],
    ),
    "infinite factor": ({"rope_scaling": LLAMA3_ROPE | {"factor": math.inf}}, ["factor=inf"]),
    "half a token": (
        {"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 8192.5}},
        ["original_max_position_embeddings=8192.5", "int"],
    ),
    "context of none": (
        {"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 0}},
        ["original_max_position=0", "at least 1"],
    ),
    "no number for eps": ({"rms_norm_eps": math.nan}, ["rms_norm_eps=nan"]),
    "odd head_dim": ({"head_dim": 63}, ["head_dim=63", "even"]),
    "text for a number": ({"hidden_size": "4096"}, ["hidden_size", "'4096'"]),
    "text for a stop token": ({"eos_token_id": "2"}, ["eos_token_id", "'2'"]),
    "text for a flag": ({"tie_word_embeddings": "false"}, ["tie_word_embeddings", "'false'"]),
    "text for a list of layers": ({"layer_types": "full_attention"}, ["layer_types"]),
    "text for rope": ({"rope_scaling": "linear"}, ["rope_scaling", "'linear'"]),
    "null factor": (
        {"rope_scaling": LLAMA3_ROPE | {"factor": None}},
        ["rope_type='llama3'", "factor"],
    ),
} | {
    f"llama3 without {field}": (
        {"rope_scaling": {key: value for key, value in LLAMA3_ROPE.items() if key != field}},
        ["rope_type='llama3'", f"'{field}'", "missing"],
    )
    for field in LLAMA3_ROPE
    if field != "rope_type"
}


def changed(fields, changes):
    fields = fields | changes
    return {field: value for field, value in fields.items() if value is not REMOVED}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_not_supported_is_named(name):
    changes, parts = FAULTS[name]
    with pytest.raises(ModelConfigError) as raised:
        config_from_hf(changed(LLAMA_3_1_8B, changes))
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"layer_types": ["sliding_attention"] * 28}, "layer_types=['sliding_attention', "),
        ({"model_type": "llama"}, "model_type='llama' does not go with"),
        ({"num_experts": 128}, "num_experts=128"),
    ],
    ids=str,
)
def test_what_qwen3_does_not_support(changes, part):
    with pytest.raises(ModelConfigError, match=re.escape(part)):
        config_from_hf(QWEN3_0_6B | changes)


def test_windows_of_qwen3():
    """Of the layers from max_window_layers on, where use_sliding_window says so."""
    fields = QWEN3_0_6B | {"sliding_window": 9, "max_window_layers": 26, "use_sliding_window": True}
    config = config_from_hf(fields)
    windows = [config.layer(i).attention.variant.sliding_window for i in range(28)]
    assert windows == [None] * 26 + [9, 9]


def test_dynamic_rope_changes_nothing_within_the_context():
    """transformers changes the base beyond max_position_embeddings, which is never served.

    tests/fixtures/hf/llama_dynamic_rope is what it computes.
    """
    rope = {"rope_type": "dynamic", "factor": 4.0}
    assert config_from_hf(LLAMA_2_7B | {"rope_scaling": rope}) == config_from_hf(LLAMA_2_7B)
    case = FIXTURES / "llama_dynamic_rope"
    for file in ("config.json", "config_v4.json"):
        config = config_from_hf(json.loads((case / file).read_text()))
        # base * (factor * length / longest - (factor - 1)) ** (dim / (dim - 2)), that is the base.
        assert config.layer(0).attention.rope == Rope(theta=10000.0, dim=18)
        with pytest.raises(ValueError, match="max_model_len=97 exceeds the model's max"):
            plan_pool(EngineConfig(max_model_len=97), config, "xla")


def test_inert_fields_of_qwen3():
    """transformers reads these only where use_sliding_window is true."""
    fields = {"sliding_window": 4096, "max_window_layers": 3, "use_sliding_window": None}
    assert config_from_hf(QWEN3_0_6B | fields) == config_from_hf(QWEN3_0_6B)


class TestDirectory:
    @pytest.fixture
    def directory(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(QWEN3_0_6B))
        return tmp_path

    @pytest.mark.parametrize(
        ("generation", "eos"),
        [
            (None, (151645,)),
            ({"temperature": 0.6}, (151645,)),
            ({"eos_token_id": None}, (151645,)),
            ({"eos_token_id": [151645, 151643], "top_k": 20}, (151645, 151643)),
            ({"eos_token_id": 151643}, (151643,)),
            ({"eos_token_id": 0}, (0,)),
            ({"eos_token_id": []}, (151645,)),
        ],
        ids=str,
    )
    def test_generation_config_wins(self, directory, generation, eos):
        if generation is not None:
            (directory / "generation_config.json").write_text(json.dumps(generation))
        config = load_config(directory)
        assert config.eos_token_ids == eos
        assert config.bos_token_id == 151643
        assert config.head_dim == 128

    @pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
    @pytest.mark.parametrize(
        ("content", "part"),
        [
            (b'{"architectures": ["Llama', "is not valid JSON"),
            (b"", "is not valid JSON"),
            (b"[1, 2]", "must hold a JSON object, not a list"),
            (b"null", "must hold a JSON object, not a NoneType"),
            (b"\x80\x02}q\x00.", "is not valid JSON"),
        ],
        ids=["cut", "empty", "list", "null", "binary"],
    )
    def test_damaged_json(self, directory, file, content, part):
        (directory / file).write_bytes(content)
        with pytest.raises(ModelConfigError, match=f"{re.escape(str(directory / file))} {part}"):
            load_config(directory)

    def test_no_config(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"has no config\.json: not a model directory"):
            load_config(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"'.*/gone' does not exist"):
            load_config(tmp_path / "gone")
        (tmp_path / "file").write_text("")
        with pytest.raises(FileNotFoundError, match=r"'.*/file' is no directory"):
            load_config(tmp_path / "file")

    def test_what_to_name_instead(self, tmp_path):
        (tmp_path / "params").mkdir()
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(FileNotFoundError, match=f"folder above it: '{tmp_path}'"):
            load_config(tmp_path / "params")
        (tmp_path / "params" / "m.gguf").write_text("")
        with pytest.raises(FileNotFoundError, match=r"name it itself: '.*params/m\.gguf'"):
            load_config(tmp_path / "params")
