# SPDX-License-Identifier: Apache-2.0
"""generation_config.json: what is read, passed over and refused, beside transformers 5.24."""

import json
import re

import pytest

from jpaged.models.generation_config import GenerationConfig, load_generation_config
from jpaged.models.json_fields import ModelConfigError


@pytest.fixture
def load(tmp_path):
    def make(fields, config=None):
        for file, content in (("generation_config.json", fields), ("config.json", config)):
            if content is not None:
                (tmp_path / file).write_text(json.dumps(content))
        return load_generation_config(tmp_path)

    return make


# Published with the weights.
LLAMA_2_CHAT = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": 2,
    "max_length": 4096,
    "pad_token_id": 0,
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.31.0.dev0",
}
QWEN3 = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}


def test_published_files(load):
    assert load(LLAMA_2_CHAT) == GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, max_length=4096
    )
    assert load(QWEN3) == GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)


def test_every_field(load):
    fields = {
        "do_sample": False,
        "temperature": 1,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.1,
        "min_new_tokens": 5,
        "max_new_tokens": 7,
        "max_length": 9,
        "suppress_tokens": [3, 5],
        "sequence_bias": [[[5, 6], -1.5], [[7], 2], [[5, 6], 3]],
        "bad_words_ids": [[5], [6, 7]],
        "length_penalty": -1,
        "early_stopping": "never",
        "renormalize_logits": True,
    }
    read = {
        "suppress_tokens": (3, 5),
        "sequence_bias": (((5, 6), 3.0), ((7,), 2.0)),
        "bad_words_ids": ((5,), (6, 7)),
    }
    assert load(fields) == GenerationConfig(**fields | read)


def test_no_file(load):
    assert load(None) == GenerationConfig()
    assert load(None, {"model_type": "llama", "vocab_size": 7}) == GenerationConfig()


def test_config_json_of_old_releases(load):
    """transformers 5.24 takes its fields where there is no generation_config.json, and only then.

    With repetition_penalty=1.5 in config.json its greedy output changed so, and not beside an empty
    generation_config.json.
    """
    config = {"model_type": "llama", "repetition_penalty": 1.5, "invented": 3}
    assert load(None, config) == GenerationConfig(repetition_penalty=1.5)
    with pytest.raises(ModelConfigError, match=r"config\.json: num_beams=4 is not supported"):
        load(None, config | {"num_beams": 4})
    assert load({}, config | {"num_beams": 4, "temperature": "hot"}) == GenerationConfig()


@pytest.mark.parametrize(
    "fields",
    [
        dict.fromkeys(["num_beams", "temperature", "suppress_tokens", "typical_p", "invented"]),
        {"num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.5},
        {"num_return_sequences": 1, "min_length": 0},
        {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0, "top_h": None},
        {"guidance_scale": 1, "penalty_alpha": 0, "no_repeat_ngram_size": 0},
        {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0},
        {"bad_words_ids": [], "begin_suppress_tokens": [], "stop_strings": [], "constraints": None},
        {"suppress_tokens": [], "sequence_bias": {}, "watermarking_config": None},
        {"suppress_tokens": [-1]},
        {"token_healing": False, "remove_invalid_values": True},
        {"use_cache": False, "cache_implementation": "hybrid", "cache_config": {"a": 1}},
        {"num_assistant_tokens": 20, "assistant_confidence_threshold": 0.4, "is_assistant": False},
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2},
        {"output_scores": True, "return_dict_in_generate": True, "pad_token_id": -5},
        {"transformers_version": 4, "_commit_hash": "abc", "unsloth_fixed": True},
        {"invented": False, "chat_format": ""},
    ],
    ids=lambda fields: "_".join(fields)[:60],
)
def test_what_changes_nothing(load, fields, caplog):
    assert load(fields) == GenerationConfig()
    assert not caplog.records


def test_unknown_fields_are_said_once(load, caplog):
    assert load({"chat_format": "chatml", "user_token_id": 195}) == GenerationConfig()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "chat_format='chatml', user_token_id=195" in record.getMessage()


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("num_beams", 4, "not supported; supported: 1"),
        ("num_beams", True, "not supported; supported: 1"),
        ("num_beam_groups", 2, "not supported; supported: 1"),
        ("num_return_sequences", 2, "not supported; supported: 1"),
        ("no_repeat_ngram_size", 3, "not supported; supported: 0"),
        ("forced_bos_token_id", 0, "not supported"),
        ("forced_eos_token_id", 2, "not supported"),
        ("penalty_alpha", 0.6, "not supported"),
        ("guidance_scale", 1.5, "not supported"),
        ("typical_p", 0.9, "not supported"),
        ("epsilon_cutoff", 3e-4, "not supported"),
        ("eta_cutoff", 3e-4, "not supported"),
        ("top_h", 0.4, "not supported"),
        ("min_length", 5, "not supported"),
        ("max_time", 2.0, "not supported"),
        ("stop_strings", ["x"], "not supported"),
        ("begin_suppress_tokens", [5], "not supported"),
        ("sequence_bias", [[[5], -1.0, 3]], "pairs"),
        ("sequence_bias", [[5, -1.0]], "type list"),
        ("sequence_bias", [[[], -1.0]], "at least one"),
        ("sequence_bias", [[[5], float("inf")]], "finite"),
        ("sequence_bias", [[["5"], 1.0]], "type int"),
        ("sequence_bias", {"5": 1.0}, "type list"),
        ("bad_words_ids", [5], "type list"),
        ("bad_words_ids", [[5], []], "at least one"),
        ("bad_words_ids", [[-5]], "at least one"),
        ("bad_words_ids", [[5.0]], "type int"),
        ("exponential_decay_length_penalty", [3, 1.1], "not supported"),
        ("encoder_repetition_penalty", 1.2, "not supported"),
        ("watermarking_config", {"bias": 2.5}, "not supported"),
        ("token_healing", True, "not supported"),
        ("dola_layers", "low", "not supported"),
        ("do_sample", "false", "type bool"),
        ("do_sample", 1, "type bool"),
        ("temperature", "0.6", "type float"),
        ("temperature", True, "type float"),
        ("temperature", -1, "at least 0"),
        ("temperature", float("nan"), "finite"),
        ("temperature", 10**70, "finite"),
        ("top_k", 5.0, "type int"),
        ("top_k", -1, "at least 0"),
        ("top_k", 10**12, "at most"),
        ("top_p", 0, "above 0"),
        ("top_p", 1.5, "at most 1"),
        ("top_p", [0.9], "type float"),
        ("min_p", -0.1, "between 0 and 1"),
        ("repetition_penalty", 0, "above 0"),
        ("repetition_penalty", float("inf"), "finite"),
        ("min_new_tokens", -1, "at least 0"),
        ("max_new_tokens", 0, "at least 1"),
        ("max_new_tokens", 1.5, "type int"),
        ("max_length", 0, "at least 1"),
        ("max_length", "20", "type int"),
        ("length_penalty", "1", "type float"),
        ("length_penalty", float("inf"), "finite"),
        ("early_stopping", "always", "type bool"),
        ("early_stopping", 1, "type bool"),
        ("renormalize_logits", "true", "type bool"),
        ("temperature", "never", "type float"),
        ("suppress_tokens", 5, "type list"),
        ("suppress_tokens", "abc", "type list"),
        ("suppress_tokens", [[5]], "type int"),
        ("suppress_tokens", [5, "6"], "type int"),
        ("suppress_tokens", [True], "type int"),
    ],
)
def test_what_is_refused(load, field, value, rule):
    with pytest.raises(ModelConfigError) as raised:
        load({field: value})
    message = str(raised.value)
    assert re.search(rf"generation_config\.json: {field}=.* {re.escape(rule)}", message)
    assert 'EngineConfig(generation_config="ignore")' in message
    assert "--generation_config=ignore" in message and "\n" not in message


@pytest.mark.parametrize("content", ["[1]", "{", "null", "[" * 10**6])
def test_damaged(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelConfigError, match=r"generation_config\.json (is not|must hold)"):
        load_generation_config(tmp_path)
