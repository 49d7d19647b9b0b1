# SPDX-License-Identifier: Apache-2.0
"""The recorded models' layers in sizes that kernels of accelerators take, and their steps compiled.

    python -m tests.models.lawful h100 gemma3_two_ropes gpt_oss_sinks

compiles decode steps for a GPU, whose compiler serves one target a process, and prints a JSON
object with the facts of each; names that end in "+" stand for steps of prefill and decode.
"""

import dataclasses
import json
import pathlib
import sys

from jpaged.device.compiled_step import StepFacts, compile_step
from jpaged.device.memory import FreeMemory, plan_pool
from jpaged.host.batch import StepShape
from jpaged.host.config import EngineConfig
from jpaged.models.config_json import config_from_hf
from jpaged.pallas_kernels.aot import GpuCompiler

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "hf"
# One of each kind of layer that there is, with heads as wide as the published models' are.
HEAD_DIMS = {
    "gemma2_soft_caps": 256,
    "gemma3_two_ropes": 256,
    "gpt_oss_sinks": 64,
    "llama_yarn_biases": 64,
    "ministral_some_windows": 128,
    "mistral_window": 128,
    "mixtral_experts": 128,
    "olmo2_norms_after": 128,
    "phi3_part_of_a_head": 128,
    "qwen2_biases_late_windows": 64,
    "qwen3_mha_hd80_untied_sharded": 128,
    "qwen3_moe_some_dense": 128,
    "smollm3_no_rope": 128,
}
# Each twice, so that layers are scanned over; the others repeat themselves, or nothing.
_PATTERNS = {
    "gemma2_soft_caps": ["sliding_attention", "full_attention"],
    "gpt_oss_sinks": ["sliding_attention", "full_attention"],
    "ministral_some_windows": ["sliding_attention", "sliding_attention", "full_attention"],
}
_NUM_ROWS = 8
_NUM_PAGES = 2**14


def lawful_config(case):
    """A recorded model's config with wide heads, and windows of several pages."""
    fields = json.loads((FIXTURES / case / "config.json").read_text(encoding="utf-8"))
    head_dim = HEAD_DIMS[case]
    fields |= {
        "head_dim": head_dim,
        "hidden_size": fields["num_attention_heads"] * head_dim,
        "intermediate_size": 512,
        "vocab_size": 2048,
        "max_position_embeddings": 4096,
    }
    if case in _PATTERNS:
        fields["layer_types"] = 2 * _PATTERNS[case]
        fields["num_hidden_layers"] = len(fields["layer_types"])
    if "moe_intermediate_size" in fields:
        fields["moe_intermediate_size"] = 128
    if fields.get("sliding_window"):
        fields["sliding_window"] = 128
    rope = fields["rope_parameters"]
    for name in ("short_factor", "long_factor"):
        if name in rope:
            pairs = int(rope["partial_rotary_factor"] * head_dim) // 2
            rope[name] = [rope[name][i % len(rope[name])] for i in range(pairs)]
    return config_from_hf(fields)


def compile_case(compiler, mesh, backend, case, num_tokens=_NUM_ROWS) -> StepFacts:
    """Compiles a step of eight rows in bfloat16, with a pool beside which nothing else is large."""
    config = lawful_config(case)
    settings = EngineConfig(num_pages=_NUM_PAGES, dtype="bfloat16")
    large = FreeMemory(num_bytes=2**62, name="any device", platform=backend)
    pool = plan_pool(settings, config, backend, large)
    return compile_step(compiler, mesh, config, pool, StepShape(num_tokens, _NUM_ROWS))


def main(target, *names):
    """Prints the facts of steps compiled for a GPU."""
    compiler = GpuCompiler(target)
    mesh, facts = compiler.mesh(), {}
    for name in names:
        num_tokens = 5 * _NUM_ROWS if name.endswith("+") else _NUM_ROWS
        found = compile_case(compiler, mesh, "gpu", name.rstrip("+"), num_tokens)
        facts[name] = dataclasses.asdict(found)
        print(name, found.error, file=sys.stderr, flush=True)
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
