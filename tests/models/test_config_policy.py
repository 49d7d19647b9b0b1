# SPDX-License-Identifier: Apache-2.0
"""Fields of config.json that change nothing, fields left out, and files that are hard to read."""

import json
import os
import re

import pytest

from jpaged.models.config import dense_config
from jpaged.models.config_json import config_from_hf, load_config
from jpaged.models.json_fields import ModelConfigError
from tests.models.test_config import LLAMA3_ROPE, LLAMA_2_7B, LLAMA_3_1_8B, QWEN3_0_6B

# What transformers 5.24 computes the same with (greedy output compared), where it takes it at all:
# it has no null for hidden_act and model_type, no empty quantization_config.
HARMLESS = [
    {"is_llama_config": True, "rope_interleaved": False},
    {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
    {"unsloth_fixed": True, "unsloth_version": "2024.9"},
    {"quantization_config": None},
    {"quantization_config": {}},
    {"sliding_window": None, "attention_chunk_size": None, "use_sliding_window": False},
    {"max_sequence_length": 2048, "seq_length": 2048, "model_max_length": 10**30},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "num_beams": 4, "max_length": 20},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": [[5]]},
    {"torchscript": False, "pruned_heads": {}, "use_bfloat16": True, "tf_legacy_loss": False},
    {"id2label": {"0": "a"}, "label2id": {"a": 0}, "num_labels": 1, "problem_type": None},
    {"auto_map": {"AutoConfig": "configuration_llama.LlamaConfig"}},
    {"hidden_act": "swish"},
    {"hidden_act": None, "mlp_bias": None, "attention_bias": None},
    {"pretraining_tp": 2},
    {"task_specific_params": {"text-generation": {"do_sample": True}}, "tokenizer_class": "X"},
    {"prefix": "a", "chunk_size_feed_forward": 2, "is_decoder": True, "finetuning_task": "x"},
    {"is_encoder_decoder": False, "add_cross_attention": False, "tie_encoder_decoder": False},
    {"cross_attention_hidden_size": None, "decoder_start_token_id": None, "sep_token_id": None},
    {"output_scores": True, "output_attentions": True, "return_dict_in_generate": True},
    {"_commit_hash": "abc", "_name_or_path": "/x", "pad_token_id": -1},
    {"pad_token_id": 10**6},
    {"attention_dropout": 0.1, "hidden_dropout": 0, "initializer_range": 0.041666666666666664},
    {"partial_rotary_factor": 1.0},
    {"layer_types": ["full_attention"] * 32, "mlp_layer_types": ["dense"] * 32},
    {"layer_types": None},
    {"rope_scaling": {"unknown": None} | LLAMA3_ROPE},
    {"rope_scaling": LLAMA3_ROPE | {"type": "llama3", "partial_rotary_factor": 1}},
    {"original_max_position_embeddings": 8192},
    {
        "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k[:8] != "original"},
        "original_max_position_embeddings": 8192,
    },
    {"rope_parameters": {}, "rope_theta": None, "rope_scaling": LLAMA3_ROPE | {"rope_theta": 5e5}},
    {"architectures": None},
    {"architectures": []},
    {"architectures": ["LlamaForCausalLM", "LlamaModel"]},
    {"architectures": ["LlamaForCausalLM"] * 2},
    {"model_type": None},
    {"not_invented": None, "nor_this": False, "num_experts": 0, "extra": "", "more": [], "m": {}},
]


@pytest.mark.parametrize("fields", HARMLESS, ids=lambda fields: "_".join(fields)[:60])
def test_what_changes_nothing_is_passed_over(fields, caplog):
    assert config_from_hf(LLAMA_3_1_8B | fields) == config_from_hf(LLAMA_3_1_8B)
    assert not caplog.records


@pytest.mark.parametrize(
    ("rope", "warnings"),
    [
        (None, 0),
        ({}, 0),
        ({"type": "default"}, 0),
        ({"rope_type": "default", "factor": None}, 0),
        ({"rope_type": None, "type": "default"}, 0),
        ({"rope_type": "default", "factor": 8.0, "original_max_position_embeddings": 64}, 1),
    ],
    ids=str,
)
def test_plain_rope_in_many_words(rope, warnings, caplog):
    """transformers 5.24 computes the same with each."""
    assert config_from_hf(LLAMA_2_7B | {"rope_scaling": rope}) == config_from_hf(LLAMA_2_7B)
    assert len(caplog.records) == warnings


class TestFieldsLeftOut:
    def test_sizes_are_the_family_s(self):
        """transformers 5.24's LlamaConfig() and Qwen3Config(), and what follows from a null."""
        assert config_from_hf({"model_type": "llama"}) == dense_config(
            family="LlamaForCausalLM",
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_layers=32,
            num_q_heads=32,
            num_kv_heads=32,
            head_dim=128,
            rms_norm_eps=1e-6,
            rope_theta=10_000.0,
            tie_word_embeddings=False,
            max_position_embeddings=2048,
        )
        assert config_from_hf({"model_type": "qwen3"}) == dense_config(
            family="Qwen3ForCausalLM",
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=22016,
            num_layers=32,
            num_q_heads=32,
            num_kv_heads=32,
            head_dim=128,
            rms_norm_eps=1e-6,
            rope_theta=10_000.0,
            qk_norm=True,
            tie_word_embeddings=False,
            max_position_embeddings=32768,
        )

    def test_key_value_heads_of_qwen3(self):
        heads = {"model_type": "qwen3", "num_attention_heads": 64}
        assert config_from_hf(heads).num_kv_heads == 32
        assert config_from_hf(heads | {"num_key_value_heads": None}).num_kv_heads == 64

    def test_null_is_a_field_left_out(self):
        nulls = dict.fromkeys(LLAMA_2_7B, None) | {"model_type": "llama"}
        assert config_from_hf(nulls) == config_from_hf({"model_type": "llama"})


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_0_6B))
    return tmp_path


class TestFiles:
    @pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
    @pytest.mark.parametrize(
        ("content", "part"),
        [
            (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "is not valid JSON: it is nested too deeply"),
            (b"[" * 10**6, "is not valid JSON: it is nested too deeply"),
            (b'{"a": 1' + b"0" * 5000 + b"}", "is not valid JSON"),
            ('{"a": 1}'.encode("utf-16"), "is not valid JSON: it is not UTF-8"),
            (b'{"a": {"b": 1, "b": 2}}', ": 'b' stands there twice, as 1 and 2"),
            (b" " * (64 * 2**20 + 1), "has 67108865 bytes"),
        ],
        ids=["deep", "deeper", "digits", "utf-16", "twice", "large"],
    )
    def test_hard_to_read(self, directory, file, content, part):
        (directory / file).write_bytes(content)
        with pytest.raises(ModelConfigError, match=f"{re.escape(str(directory / file))} ?{part}"):
            load_config(directory)

    @pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
    def test_no_file(self, directory, file):
        (directory / file).unlink(missing_ok=True)
        (directory / file).mkdir()
        with pytest.raises(ModelConfigError, match=f"{re.escape(file)} is not a file"):
            load_config(directory)
        (directory / file).rmdir()
        os.mkfifo(directory / file)  # Reading it would wait for ever.
        with pytest.raises(ModelConfigError, match=f"{re.escape(file)} is not a file"):
            load_config(directory)

    def test_byte_order_mark(self, directory):
        path = directory / "config.json"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert load_config(directory) == config_from_hf(QWEN3_0_6B)

    def test_field_that_stands_there_twice_alike(self, directory):
        text = json.dumps(QWEN3_0_6B)
        (directory / "config.json").write_text('{"vocab_size": 151936, ' + text[1:])
        assert load_config(directory) == config_from_hf(QWEN3_0_6B)

    @pytest.mark.parametrize(
        ("ids", "known"), [(-1, ()), ([2, 151936], (2,)), ([-1, 7, 400_000], (7,)), (151936, ())]
    )
    def test_ids_that_are_no_tokens_change_nothing(self, directory, ids, known):
        """As in transformers, whose output is the same with and without them."""
        config = config_from_hf(QWEN3_0_6B | {"eos_token_id": ids, "bos_token_id": -1})
        assert (config.eos_token_ids, config.bos_token_id) == (known, None)
        assert config_from_hf(QWEN3_0_6B | {"bos_token_id": 151936}).bos_token_id is None
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        want = known or config_from_hf(QWEN3_0_6B).eos_token_ids
        assert load_config(directory).eos_token_ids == want

    @pytest.mark.parametrize("eos", ["2", True, [[2]], 2.0, 10**12, {"a": 1}])
    def test_stop_tokens_that_are_none(self, directory, eos):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        with pytest.raises(ModelConfigError, match=r"generation_config\.json: eos_token_id="):
            load_config(directory)
