# SPDX-License-Identifier: Apache-2.0
"""gpt-oss as it was published, and packed checkpoints beside what transformers unpacks them to."""

import hashlib
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.models import checkpoint
from jpaged.models.config import ExpertsSpec
from jpaged.models.config_json import config_from_hf
from jpaged.models.decoder import Decoder
from jpaged.models.json_fields import ModelConfigError

CASE = pathlib.Path(__file__).parents[1] / "fixtures" / "hf" / "gpt_oss_mxfp4"


def published(num_layers, num_experts):
    """The fields of openai/gpt-oss-20b and 120b."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (num_layers // 2),
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": 8,
        "num_local_experts": num_experts,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": 201088,
    }


# Parameters as the model card has them (OpenAI 2025, table 1), in billions.
@pytest.mark.parametrize(
    ("num_layers", "num_experts", "billions"), [(24, 32, 20.91), (36, 128, 116.83)], ids=str
)
def test_the_published_models(num_layers, num_experts, billions):
    config = config_from_hf(published(num_layers, num_experts))
    assert round(Decoder(config).num_params / 1e9, 2) == billions
    assert config.packing == "mxfp4"
    windows = [layer.attention.variant.sliding_window for layer in config.pattern]
    assert windows == [128, None]
    for layer in config.pattern:
        attention, experts = layer.attention, layer.mlp
        assert attention.sinks and attention.qkv_bias and attention.out_bias
        assert (attention.num_q_heads, attention.num_kv_heads, attention.head_dim) == (64, 8, 64)
        assert isinstance(experts, ExpertsSpec)
        assert (experts.activation, experts.limit, experts.bias) == ("swiglu_oai", 7.0, True)


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size"])
def test_packed_weights_come_in_whole_blocks(field):
    fields = published(2, 4) | {field: 2890}
    message = f"{field}=2890 must be a multiple of 32, the numbers of a block of MXFP4"
    with pytest.raises(ModelConfigError, match=f"^{re.escape(message)}"):
        config_from_hf(fields)
    del fields["quantization_config"]
    assert config_from_hf(fields).packing is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_unpacked_is_what_transformers_unpacks(dtype):
    """To the bit: numbers of four bits and powers of two are exact in both."""
    recorded = json.loads((CASE / "expected.json").read_text())["unpacked"]
    config, params = checkpoint.load(CASE, dtype)
    assert len(recorded) == 2 * config.num_layers
    for name, want in recorded.items():
        _, _, layer, _, _, kind = name.split(".")
        mlp = params[f"layers_{layer}"]["mlp"]
        parts = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
        weights = [np.asarray(mlp[part]["weight"], np.float32) for part in parts]
        # As transformers has them: what is contracted first, gate and up in turn.
        got = np.stack(weights, axis=2).reshape(weights[0].shape[0], -1, weights[0].shape[2])
        got = np.ascontiguousarray(got.swapaxes(1, 2))
        np.testing.assert_array_equal(got.reshape(-1)[:8], want["first"])
        assert hashlib.sha256(got.astype("<f4").tobytes()).hexdigest() == want["sha256"]
