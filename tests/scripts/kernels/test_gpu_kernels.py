# SPDX-License-Identifier: Apache-2.0
"""The kernels that the GPU compilers make of our code, for chips that are not there.

Nothing runs: these say that it compiles, what it takes, and what the compiled program does not do.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from jpaged.pallas_kernels.aot import GPU_TARGETS, GpuCompiler, find_cuda_compiler

ROOT = pathlib.Path(__file__).resolve().parents[3]
compiles = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_cuda_compiler() is None,
        reason="no compiler for NVIDIA GPUs: make cuda-compiler",
    ),
]
# One for two targets, and for each every kind of case nightly, for some target; all: `gpu_kernels`.
ALWAYS = {
    "a100": ["head_dim 64, int8 pages"],
    "h100": ["usual"],
}
NIGHTLY = {
    "a100": [
        "usual",
        "head_dim 96, page_size 8",
        "head_dim 128, float32 pages",
        "head_dim 64, float8_e4m3fn pages",
        "131,072 tokens",
    ],
    "h100": [
        "sinks",
        "head_dim 256, int8 pages",
        "head_dim 64, page_size 8",
        "9 query heads, 3 KV heads",
        "head_dim 96, page_size 256",
        "head_dim 128, float8_e4m3fn pages",
        "head_dim 64, float32 pages",
        "both",
        "512 rows of 131,072 tokens",
    ],
    "b200": [
        "usual",
        "head_dim 64, page_size 64",
        "head_dim 256, int8 pages",
        "head_dim 80, page_size 128",
        "16 query heads, 1 KV heads",
        "131,072 tokens in pages of 8",
        "both",
        "sinks, 1 row",
    ],
}


@functools.cache
def run(*flags):
    """Compiles in a process of its own: one compiles for one target."""
    return subprocess.run(
        [sys.executable, "-m", "jpaged.scripts.kernels.gpu_kernels", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )


class TestCompiled:
    pytestmark = compiles

    @pytest.mark.parametrize(
        ("target", "cases"),
        [
            *ALWAYS.items(),
            *(pytest.param(*item, marks=pytest.mark.nightly) for item in NIGHTLY.items()),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_the_kernels_are_made_for_compiles(self, target, cases):
        done = run(f"--target={target}", f"--cases={_quoted(cases)}")
        assert done.returncode == 0, done.stdout[-3000:]
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["target"] == target
        assert list(report["facts"]) == cases
        for name, facts in report["facts"].items():
            assert set(facts) == {"decode", "mixed", "write", "copy"}
            for kernel, fact in facts.items():
                assert fact["error"] is None
                # The one thing of these that a chip cannot do.
                no_float8 = target == "a100" and "float8" in name and kernel in ("decode", "mixed")
                assert (fact["refused"] is not None) == no_float8
            assert facts["write"]["temp_bytes"] == 0

    def test_the_usual_kernels_spill_no_registers(self):
        done = run("--target=h100", "--cases=usual")
        assert done.returncode == 0, done.stdout[-3000:]
        usual = json.loads(done.stdout.splitlines()[-1])["facts"]["usual"]
        assert {usual[kernel]["spill_bytes"] for kernel in ("decode", "mixed")} == {0}

    @pytest.mark.parametrize(
        ("target", "layers"),
        [
            ("h100", 4),
            *(
                pytest.param(target, layers, marks=pytest.mark.nightly)
                for target, layers in (("h100", 16), ("a100", 4), ("b200", 4))
            ),
        ],
    )
    def test_a_step_moves_neither_its_pool_nor_a_weight_on_one_gpu_and_on_two(self, target, layers):
        flags = ["--cases=none", "--steps=llama-3.2-1b", f"--layers={layers}"]
        done = run(f"--target={target}", *flags)
        assert done.returncode == 0, done.stdout[-3000:]
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["facts"] == {}
        steps = report["steps"]["llama-3.2-1b"]
        assert {size: step["collectives"] for size, step in steps.items()} == {
            "1": {},
            # After attention and MLP of each layer, and after the embedding.
            "2": {"all-reduce": 2 * layers + 1},
        }
        for step in steps.values():
            assert step["weight_copies"] == 0
            assert step["attention_kernels"] == 1  # however many layers call it
            assert step["temp_bytes"] < 5e6
            assert step["compile_s"] > 0
        # Four products; two norms, the activation, attention with what is before and after it, and
        # the token write. Nothing that lengths alone decide, and nothing that grows with depth.
        assert steps["1"]["kernels_per_layer"] < 12
        # Weights stay apart where they are split over devices.
        assert steps["2"]["kernels_per_layer"] >= 14

    @pytest.mark.nightly
    def test_the_time_to_compile_does_not_grow_with_depth(self):
        """Were each layer to compile an attention kernel of its own, 16 would take 10 times 2."""
        seconds = []
        for layers in (2, 16):
            flags = "--cases=none", "--steps=llama-3.2-1b", f"--layers={layers}"
            done = run("--target=h100", *flags)
            assert done.returncode == 0, done.stdout[-3000:]
            steps = json.loads(done.stdout.splitlines()[-1])["steps"]["llama-3.2-1b"]
            # The second in its process, which finds compiler and Python's modules at work.
            seconds.append(steps["2"]["compile_s"])
        assert seconds[1] < 5 * seconds[0], seconds

    def test_a_step_of_one_row_copies_no_embedding_to_another_gpu(self):
        flags = ["--cases=none", "--steps=llama-3.2-1b", "--layers=2", "--rows=1"]
        done = run("--target=h100", *flags)
        assert done.returncode == 0, done.stdout[-3000:]
        steps = json.loads(done.stdout.splitlines()[-1])["steps"]["llama-3.2-1b"]
        assert steps["2"]["collectives"] == {"all-reduce": 2 * 2 + 1}
        for size, step in steps.items():
            assert step["weight_copies"] == 0 and step["attention_kernels"] == 1
            # Beside logits of 8 rows, which a step of one is padded to.
            assert step["temp_bytes"] < 5e6 + 8 * 128_256 * 4 / int(size)

    @pytest.mark.parametrize(
        ("rows", "more_kernels"), [(1, 3), pytest.param(64, 0, marks=pytest.mark.nightly)]
    )
    def test_nor_does_a_burst(self, rows, more_kernels):
        """Of one row too: its products are others, and it once copied the head in every step."""
        flags = ["--cases=none", "--steps=llama-3.2-1b", "--layers=4", "--decode_steps=8"]
        done = run("--target=h100", f"--rows={rows}", *flags)
        assert done.returncode == 0, done.stdout[-3000:]
        step = json.loads(done.stdout.splitlines()[-1])["steps"]["llama-3.2-1b"]["1"]
        assert step["alias_bytes"] == step["pool_bytes"] and step["weight_copies"] == 0
        assert step["attention_kernels"] == 1
        assert step["blind_loops"] == 0
        # Logits, of 8 rows at least, while they are drawn from.
        logits = max(rows, 8) * 128_256 * 4
        assert step["temp_bytes"] < 5e6 + (1 if rows == 1 else 4) * logits
        # With those of the sampler, and of what lengths decide, shared out to 4 layers.
        assert step["kernels_per_layer"] < 12 + more_kernels + 8

    @pytest.mark.nightly
    @pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
    @pytest.mark.parametrize("tokens", [64, 256], ids=["decode", "mixed"])
    def test_nor_does_one_with_pages_of_eight_bits(self, kv_dtype, tokens):
        flags = ["--cases=none", "--steps=llama-3.2-1b", "--layers=2", f"--tokens={tokens}"]
        done = run("--target=h100", f"--kv_dtype={kv_dtype}", *flags)
        assert done.returncode == 0, done.stdout[-3000:]
        for step in json.loads(done.stdout.splitlines()[-1])["steps"]["llama-3.2-1b"].values():
            assert step["alias_bytes"] == step["pool_bytes"] and step["weight_copies"] == 0
            assert step["attention_kernels"] == 1
            # Beside hidden states, whose number is that of the step's tokens.
            assert step["temp_bytes"] < 5e6 * tokens / 64

    def test_the_compiler_refuses_too_much_shared_memory(self):
        """Ours plans for more than the chip has, and is stopped."""
        program = (
            "import jax, jax.numpy as jnp, dataclasses\n"
            "from jpaged.pallas_kernels import paged_attention\n"
            "from jpaged.pallas_kernels.aot import GpuCompiler\n"
            "from jpaged.pallas_kernels.gpu import chip, mosaic\n"
            "chip._SMEM_BYTES[9, 0] = 2**20\n"
            "mosaic._MAX_STAGES = 16\n"
            "compiler = GpuCompiler('h100')\n"
            "S, i = jax.ShapeDtypeStruct, jnp.int32\n"
            "compiler.compile(compiler.mesh(), lambda *a: paged_attention(*a, backend='gpu'),\n"
            "  S((8, 8, 128), jnp.bfloat16), S((1, 99, 1, 16, 256), jnp.bfloat16),\n"
            "  S((8, 9), i), S((8,), i), S((9,), i), S((1,), i))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        assert "exceeds available shared memory" in done.stderr


def _quoted(names):
    """As --cases takes names that have commas in them."""
    return ",".join(f'"{name}"' if "," in name else name for name in names)


def test_unknown_cases_are_refused():
    done = run("--cases=usual,unusual")
    assert done.returncode == 2
    assert "--cases=unusual: choose among usual, " in done.stderr


def test_targets_are_those_of_the_lowerings():
    assert {gpu.capability for gpu in GPU_TARGETS.values()} == {(8, 0), (9, 0), (10, 0)}


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("jpaged.pallas_kernels.aot.gpu.find_cuda_compiler", lambda: None)
    with pytest.raises(RuntimeError, match="make cuda-compiler"):
        GpuCompiler("h100")
