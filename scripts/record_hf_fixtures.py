# SPDX-License-Identifier: Apache-2.0
"""Records tiny Hugging Face models and their greedy output as test fixtures.

jpaged's tests compare its own output with these recordings token for token, so that running them
needs neither torch nor the network. Recording does need an environment of its own:
`transformers` (5.x), `torch` (the CPU build is enough) and `absl-py`. The first two are not
dependencies of jpaged. Nothing is downloaded: every model is built from a configuration and
filled with random weights from a fixed seed.

    python -m scripts.record_hf_fixtures --output=tests/fixtures/hf

Each case becomes one directory that holds what `save_pretrained` writes (config.json,
generation_config.json, safetensors) and `expected.json`:

  * `prompts`: token ids; each prompt was run alone (batch 1, no padding, KV cache on).
  * `continuations`: the greedy token ids, of full length since no end-of-sequence token is set.
  * `top_logprobs`: for the shortest and the longest prompt (`prompt` is its index), the five
    highest float32 log-probabilities at each generated position, highest first, with their ids.
  * `min_top2_logit_gap`: the smallest difference between the two highest logits over every
    generated position of every prompt. Seeds are tried in order until this gap is large enough
    that rounding differences of another float32 implementation cannot change a token.
  * `max_float64_logit_diff`: the largest difference between the recorded logits and those of the
    same model in float64, run over each whole sequence at once without a cache.
  * `weight_seed`, `torch_version`, `transformers_version`.

Some cases also hold `config_v4.json`: the same configuration in the form that transformers 4
wrote (`rope_theta`, `rope_scaling` and `torch_dtype` at the top level).

`scripts.record_hf_beams` adds beam searches of the same models, in `beams.json`.
"""

import copy
import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from absl import app, flags, logging

_OUTPUT = flags.DEFINE_string(
    "output", "tests/fixtures/hf", "Directory that receives one directory per case."
)
_PROMPT_LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 50)
_NUM_NEW_TOKENS = 24
_NUM_TOP = 5
# The gap every recording must have, and the larger one that the search for a seed asks for.
_REQUIRED_GAP = 1e-3
_SEARCHED_GAP = 1e-2
# A continuation with fewer different tokens than this counts as degenerate.
_MIN_DISTINCT_TOKENS = 8
_MAX_SEEDS = 500
_MAX_CASE_BYTES = 400_000

_README = """\
# Recorded Hugging Face models

Tiny Llama and Qwen3 models with random weights, and the output of greedy decoding and beam search
that transformers (CPU, float32, eager attention) gave for them; expected.json and beams.json name
its version and torch's. Recorded by `python -m scripts.record_hf_fixtures`
and `scripts.record_hf_beams`, whose docstrings describe the files; do not edit by hand.
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """One model to record.

    Attributes:
      name: Directory of the case.
      model_type: "llama" or "qwen3".
      config: Arguments of the model's configuration class.
      first_seed: Seed of the weights and prompts that is tried first.
      max_shard_size: Largest safetensors shard, or None for one file.
      write_v4_config: Whether to write config_v4.json too.
    """

    name: str
    model_type: str
    config: dict[str, Any]
    first_seed: int
    max_shard_size: str | None = None
    write_v4_config: bool = False


CASES = (
    Case(
        name="llama_gqa5_hd48_untied",
        model_type="llama",
        first_seed=1000,
        config={
            "vocab_size": 131,
            "hidden_size": 60,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 48,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": False,
        },
    ),
    Case(
        name="llama3_rope_hd80_tied",
        model_type="llama",
        first_seed=2000,
        write_v4_config=True,
        config={
            "vocab_size": 160,
            "hidden_size": 40,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 80,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "tie_word_embeddings": True,
        },
    ),
    Case(
        name="qwen3_gqa5_hd48_tied",
        model_type="qwen3",
        first_seed=3000,
        write_v4_config=True,
        config={
            "vocab_size": 150,
            "hidden_size": 36,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 10,
            "num_key_value_heads": 2,
            "head_dim": 48,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": True,
        },
    ),
    Case(
        name="qwen3_mha_hd80_untied_sharded",
        model_type="qwen3",
        first_seed=4000,
        max_shard_size="100KB",
        config={
            "vocab_size": 128,
            "hidden_size": 48,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 80,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-2,  # Large enough to change tokens if it is not read.
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": False,
        },
    ),
    Case(
        name="llama_linear_rope_mqa",
        model_type="llama",
        first_seed=5000,
        config={
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-2,  # Large enough to change tokens if it is not read.
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
            "tie_word_embeddings": False,
        },
    ),
)


_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def build_model(case: Case, seed: int) -> transformers.PreTrainedModel:
    """Builds the model of a case in float32 with random weights.

    Args:
      case: The case.
      seed: Seed of the weights.

    Returns:
      The model, in evaluation mode.
    """
    config_class, model_class = _CLASSES[case.model_type]
    config = config_class(
        **case.config, bos_token_id=None, eos_token_id=None, pad_token_id=None, dtype="float32"
    )
    config._attn_implementation = "eager"
    model = model_class(config).to(torch.float32).eval()
    # The default initialization gives near-tied logits and repeated tokens. Here norm weights
    # differ from one another, and what the layers add outweighs the embedding of the last token,
    # which with a tied head would otherwise be predicted again.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # named_parameters() gives a tied head once, as the embedding.
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim == 1:
                parameter.copy_(1.0 + 0.3 * values)
            elif "embed_tokens" in name:
                parameter.copy_(0.5 * values)
            else:
                gain = 4.0 if "o_proj" in name or "down_proj" in name else 1.5
                parameter.copy_(gain * values / parameter.shape[1] ** 0.5)
    return model


def make_prompts(vocab_size: int, seed: int) -> list[list[int]]:
    """Returns one prompt per length, each of distinct random token ids."""
    generator = torch.Generator().manual_seed(seed + 500_000)
    return [
        torch.randperm(vocab_size, generator=generator)[:length].tolist()
        for length in _PROMPT_LENGTHS
    ]


def run_greedy(
    model: transformers.PreTrainedModel, prompt: list[int]
) -> tuple[list[int], torch.Tensor]:
    """Generates greedily from one prompt, alone in its batch, with the KV cache.

    Args:
      model: The model.
      prompt: Token ids.

    Returns:
      The new token ids and the float32 logits they were chosen from, [new tokens, vocabulary].
    """
    input_ids = torch.tensor([prompt])
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        use_cache=True,
        max_new_tokens=_NUM_NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[0, len(prompt) :].tolist()
    logits = torch.cat(output.logits)
    assert len(tokens) == _NUM_NEW_TOKENS
    assert logits.dtype == torch.float32 and logits.shape == (
        _NUM_NEW_TOKENS,
        model.config.vocab_size,
    )
    assert logits.argmax(-1).tolist() == tokens
    return tokens, logits


def top2_gap(logits: torch.Tensor) -> float:
    """Returns the smallest difference between the two highest logits of any row."""
    top = logits.topk(2, dim=-1).values
    return (top[:, 0] - top[:, 1]).min().item()


def _is_degenerate(tokens: list[int]) -> bool:
    return len(set(tokens)) < _MIN_DISTINCT_TOKENS


def shortest_float32(value: float) -> float:
    """Returns the number with the fewest digits that is the same float32."""
    return float(str(np.float32(value)))


def find_recording(
    case: Case,
) -> tuple[transformers.PreTrainedModel, dict[str, Any], list[torch.Tensor]]:
    """Tries seeds until every continuation is varied and clear of near ties.

    Args:
      case: The case.

    Returns:
      The model, the contents of expected.json as far as greedy decoding gives them, and the
      logits of each prompt.

    Raises:
      RuntimeError: If no seed is good enough.
    """
    for seed in range(case.first_seed, case.first_seed + _MAX_SEEDS):
        model = build_model(case, seed)
        prompts = make_prompts(model.config.vocab_size, seed)
        continuations, all_logits = [], []
        for prompt in prompts:
            tokens, logits = run_greedy(model, prompt)
            if _is_degenerate(tokens) or top2_gap(logits) < _SEARCHED_GAP:
                break
            continuations.append(tokens)
            all_logits.append(logits)
        else:
            recording = {
                "weight_seed": seed,
                "min_top2_logit_gap": shortest_float32(min(map(top2_gap, all_logits))),
                "prompts": prompts,
                "continuations": continuations,
            }
            return model, recording, all_logits
    raise RuntimeError(f"{case.name}: no good seed among {_MAX_SEEDS}")


def top_logprobs(prompt_index: int, logits: torch.Tensor) -> dict[str, Any]:
    """Returns the highest log-probabilities at each generated position of one prompt."""
    top = torch.log_softmax(logits, dim=-1).topk(_NUM_TOP, dim=-1)
    return {
        "prompt": prompt_index,
        "token_ids": top.indices.tolist(),
        "logprobs": [[shortest_float32(x) for x in row] for row in top.values.tolist()],
    }


@torch.no_grad()
def compare_with_float64(
    model: transformers.PreTrainedModel, recording: dict[str, Any], all_logits: list[torch.Tensor]
) -> float:
    """Checks the recording against the same model in float64, without a cache.

    Args:
      model: The recorded model; it is left as it is.
      recording: The contents of expected.json.
      all_logits: The recorded logits of each prompt.

    Returns:
      The largest absolute difference between the logits.
    """
    model64 = copy.deepcopy(model).to(torch.float64)
    largest = 0.0
    for prompt, tokens, logits in zip(
        recording["prompts"], recording["continuations"], all_logits, strict=True
    ):
        sequence = torch.tensor([prompt + tokens[:-1]])
        logits64 = model64(sequence, use_cache=False).logits[0, len(prompt) - 1 :]
        assert logits64.argmax(-1).tolist() == tokens
        largest = max(largest, (logits64 - logits.double()).abs().max().item())
    return largest


def to_v4_config(config: dict[str, Any]) -> dict[str, Any]:
    """Rewrites a config.json of transformers 5 in the form that transformers 4 wrote.

    Args:
      config: The contents of config.json.

    Returns:
      The contents in the older form.
    """
    old = copy.deepcopy(config)
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    old["torch_dtype"] = old.pop("dtype")
    old["transformers_version"] = "4.51.0"
    old.pop("layer_types", None)  # Not written yet by 4.51.
    return dict(sorted(old.items()))


def write_v4_config(case_dir: pathlib.Path, model_type: str) -> None:
    """Writes config_v4.json and checks that transformers reads it as the same configuration."""
    config_class = _CLASSES[model_type][0]
    config = json.loads((case_dir / "config.json").read_text())
    text = json.dumps(to_v4_config(config), indent=2) + "\n"
    old_form, new_form = config_class(**json.loads(text)), config_class(**config)
    assert old_form.rope_parameters == new_form.rope_parameters
    assert old_form.dtype == new_form.dtype
    (case_dir / "config_v4.json").write_text(text)


def dump_expected(expected: dict[str, Any]) -> str:
    """Formats a JSON file with one innermost list per line."""

    def dump(value: Any, indent: str) -> str:
        inner = indent + "  "
        if isinstance(value, dict):
            items = [f"{inner}{json.dumps(k)}: {dump(v, inner)}" for k, v in value.items()]
            return "{\n" + ",\n".join(items) + f"\n{indent}}}"
        if isinstance(value, list) and value and isinstance(value[0], (list, dict)):
            return "[\n" + ",\n".join(inner + dump(v, inner) for v in value) + f"\n{indent}]"
        return json.dumps(value, allow_nan=False)

    text = dump(expected, "") + "\n"
    assert json.loads(text) == expected
    return text


def load_model(case: Case, case_dir: pathlib.Path) -> transformers.PreTrainedModel:
    """Loads the saved model of a case.

    Args:
      case: The case.
      case_dir: Its directory.

    Returns:
      The model, in evaluation mode.
    """
    model, info = _CLASSES[case.model_type][1].from_pretrained(
        case_dir, attn_implementation="eager", local_files_only=True, output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    return model.eval()


def record(case: Case, output: pathlib.Path) -> None:
    """Records one case.

    Args:
      case: The case.
      output: Directory that receives the directory of the case, replacing an earlier one.
    """
    model, expected, all_logits = find_recording(case)
    expected["top_logprobs"] = [
        top_logprobs(i, all_logits[i]) for i in (0, len(_PROMPT_LENGTHS) - 1)
    ]
    difference = compare_with_float64(model, expected, all_logits)
    assert expected["min_top2_logit_gap"] > max(_REQUIRED_GAP, 10 * difference)
    # Two digits: enough to read, and the same from run to run.
    expected["max_float64_logit_diff"] = float(f"{difference:.1e}")

    case_dir = output / case.name
    if case_dir.exists():
        shutil.rmtree(case_dir)
    case_dir.mkdir(parents=True)
    shards = {"max_shard_size": case.max_shard_size} if case.max_shard_size else {}
    model.save_pretrained(case_dir, **shards)
    for path in case_dir.iterdir():
        path.chmod(0o644)  # safetensors are written for their owner only.
    assert (case_dir / "model.safetensors.index.json").exists() == bool(case.max_shard_size)
    if case.write_v4_config:
        write_v4_config(case_dir, case.model_type)

    # What was saved must give what was recorded.
    loaded = load_model(case, case_dir)
    for prompt, tokens in zip(expected["prompts"], expected["continuations"], strict=True):
        assert run_greedy(loaded, prompt)[0] == tokens

    # Large arrays last.
    order = ("weight_seed", "min_top2_logit_gap", "max_float64_logit_diff")
    expected = {
        "transformers_version": transformers.__version__,
        "torch_version": torch.__version__,
        **{key: expected[key] for key in order},
        **{key: value for key, value in expected.items() if key not in order},
    }
    (case_dir / "expected.json").write_text(dump_expected(expected))
    size = sum(path.stat().st_size for path in case_dir.iterdir())
    assert size <= _MAX_CASE_BYTES, f"{case.name}: {size} bytes"
    logging.info(
        "%s: %d bytes, seed %d, min gap %g, float64 difference %g",
        case.name,
        size,
        expected["weight_seed"],
        expected["min_top2_logit_gap"],
        expected["max_float64_logit_diff"],
    )


def main(argv: list[str]) -> None:
    """Records every case and writes the README of the fixtures."""
    if len(argv) > 1:
        raise app.UsageError("Unexpected arguments: " + " ".join(argv[1:]))
    torch.set_num_threads(1)  # One order of summation.
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    output = pathlib.Path(_OUTPUT.value)
    for case in CASES:
        record(case, output)
    (output / "README.md").write_text(_README)


if __name__ == "__main__":
    app.run(main)
