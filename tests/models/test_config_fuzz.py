# SPDX-License-Identifier: Apache-2.0
"""Wrong values at the doors of config.json and generation_config.json.

Each is refused with one line that names the field and the value, or means what the docs say;
nothing else is ever raised.
"""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.models.config import ModelConfig
from jpaged.models.config_json import load_config
from jpaged.models.generation_config import GenerationConfig, load_generation_config
from jpaged.models.json_fields import ModelConfigError
from tests.models.test_config import LLAMA_3_1_8B

BASE = LLAMA_3_1_8B | {"head_dim": 128, "transformers_weights": None}
NEST = [1]
for _ in range(400):
    NEST = [NEST]
# Never right: of a wrong type, or no number that a config can mean.
WRONG = [
    True,
    "32",
    "full_attention",
    "a" * 10**5,
    "\ud800\n",
    [32],
    ["x"],
    [[["full_attention"]]],
    {"a": 1},
    {"rope_type": ["llama3"]},
    32.5,
    -1,
    -(2**31),
    math.nan,
    math.inf,
    -math.inf,
    10**12,
    10**70,
    10**400,
    NEST,
    {"a": NEST},
    list(range(10**4)),
]
INTEGERS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id"),
)
FLOATS = ("rms_norm_eps", "rope_theta")
OTHERS = (
    *("architectures", "model_type", "layer_types", "mlp_layer_types", "rope_scaling"),
    *("rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act"),
    *("quantization_config", "sliding_window", "is_causal", "is_encoder_decoder"),
    *("partial_rotary_factor", "invented", "original_max_position_embeddings"),
)
ROPE = ("rope_type", "factor", "low_freq_factor", "high_freq_factor")
ROPE += ("original_max_position_embeddings", "rope_theta", "partial_rotary_factor", "invented")
# Values of the table that are right after all.
RIGHT = {
    ("eos_token_id", "[32]"),
    ("eos_token_id", "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9,"),
    ("rms_norm_eps", "32.5"),
    ("rms_norm_eps", "1000000000000"),
    ("rope_theta", "32.5"),
    ("rope_theta", "1000000000000"),
    ("bos_token_id", "-1"),
    ("eos_token_id", "-1"),
    ("tie_word_embeddings", "True"),
    ("attention_bias", "True"),
    ("mlp_bias", "True"),
    ("is_causal", "True"),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("config")


def outcome(directory, load, file, content):
    """What loading gave; an error must be one bounded line of the kind that is documented."""
    for other in ("config.json", "generation_config.json"):
        (directory / other).unlink(missing_ok=True)
    (directory / "config.json").write_text(json.dumps(BASE))
    if isinstance(content, bytes):
        (directory / file).write_bytes(content)
    else:
        (directory / file).write_text(json.dumps(content))
    try:
        return load(directory)
    except ModelConfigError as e:
        message = str(e)
        assert message.isprintable() and len(message) < 2500, message[:5000]
        assert file in message
        return message


def label(value):
    return repr(value)[:30]


@pytest.mark.parametrize("field", [*INTEGERS, *FLOATS, *OTHERS])
def test_fields_of_config_json(directory, field):
    for value in WRONG:
        fields = BASE | {field: value} | ({"rope_scaling": None} if field == "rope_theta" else {})
        found = outcome(directory, load_config, "config.json", fields)
        if (field, label(value)) in RIGHT or found == load_config_of(directory, BASE):
            assert isinstance(found, ModelConfig), (field, value, found)
            # Passed over only where nothing could come of it.
            assert (field, label(value)) in RIGHT or field in OTHERS, (field, value)
        else:
            assert isinstance(found, str), (field, value, found)
            assert field in found or ("rope" in field and "rope" in found), (field, value, found)


def load_config_of(directory, fields):
    (directory / "config.json").write_text(json.dumps(fields))
    return load_config(directory)


@pytest.mark.parametrize("field", ROPE)
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_fields_of_rope(directory, place, field):
    base = BASE | {"rope_scaling": None, "rope_theta": None}
    rope = BASE["rope_scaling"] | {"rope_theta": 5e5}
    for value in WRONG:
        fields = base | {place: rope | {field: value}}
        found = outcome(directory, load_config, "config.json", fields)
        if isinstance(found, ModelConfig):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            assert number or (value is True and field == "partial_rotary_factor"), (field, value)
        else:
            assert field in found, (field, value, found)


GENERATION = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("min_new_tokens", "max_new_tokens", "suppress_tokens", "num_beams", "typical_p"),
    *("bad_words_ids", "guidance_scale", "stop_strings", "no_repeat_ngram_size", "max_time"),
    "sequence_bias",
)


@pytest.mark.parametrize("field", GENERATION)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_fields_of_generation_config(directory, field, file):
    """In config.json they count where there is no other file."""
    base = BASE if file == "config.json" else {}
    for value in WRONG:
        found = outcome(directory, load_generation_config, file, base | {field: value})
        if isinstance(found, str):
            assert field in found and 'generation_config="ignore"' in found
        else:
            honoured = getattr(found, field)
            if field == "suppress_tokens":
                honoured, value = list(honoured), value if isinstance(value, list) else [value]
            elif field in ("bad_words_ids", "sequence_bias"):
                honoured, value = [list(ids) for ids in honoured], value or []
            assert honoured == value, (field, value, found)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_damaged_text(directory, file):
    """Cut anywhere, or with a byte changed or put in."""
    text = json.dumps(
        BASE if file == "config.json" else {"eos_token_id": [1, 2], "top_k": 5, "a": {"b": 1}}
    )
    content = text.encode()
    step = max(1, len(content) // 100)
    damaged = [content[:end] for end in range(0, len(content), step)]
    for byte in (b"\x00", b"\xff", b"\xed\xa0\x80", b"{", b"]", b'"', b",", b"1", b"-", b"\\"):
        for at in range(0, len(content), 3 * step):
            damaged.append(content[:at] + byte + content[at:])
            damaged.append(content[:at] + byte + content[at + 1 :])
    assert len(damaged) >= 300
    refused = 0
    for content in damaged:
        for load in (load_config, load_generation_config):
            found = outcome(directory, load, file, content)
            refused += isinstance(found, str)
            assert isinstance(found, str | ModelConfig | GenerationConfig)
    assert refused > len(damaged) // 2


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
known = st.sampled_from(sorted({*INTEGERS, *FLOATS, *OTHERS, *ROPE, *GENERATION}))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.dictionaries(known | st.text(max_size=8), json_values, max_size=5),
    st.sampled_from(["config.json", "generation_config.json"]),
)
def test_any_json(tmp_path_factory, fields, file):
    directory = tmp_path_factory.getbasetemp() / "any"
    directory.mkdir(exist_ok=True)
    base = BASE if file == "config.json" else {}
    for load in (load_config, load_generation_config):
        found = outcome(directory, load, file, base | fields)
        assert isinstance(found, str | ModelConfig | GenerationConfig)
