# SPDX-License-Identifier: Apache-2.0
"""Steps of every family, compiled for a TPU and a GPU that are not there: the pool in place."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from jpaged.device.compiled_step import StepFacts
from jpaged.models.families import FAMILIES
from jpaged.pallas_kernels.aot import find_cuda_compiler
from tests.models.lawful import HEAD_DIMS, compile_case, lawful_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of what a kernel or a layer can be, this has most: windows, sinks, experts, biases, layers that
# differ.
ALWAYS = ["gpt_oss_sinks"]
NIGHTLY = [case for case in HEAD_DIMS if case not in ALWAYS]
# What may be done to a pool on a GPU: the scatter of the token write, in place.
SCATTERS = {"scatter", "fusion"}


def check(facts, pool_ops):
    assert facts.error is None
    assert facts.alias_bytes == facts.pool_bytes
    assert set(facts.pool_ops) <= pool_ops
    # No copy of the pool, and none of all weights.
    assert facts.temp_bytes < 0.05 * facts.pool_bytes
    assert facts.temp_bytes < 0.5 * (facts.argument_bytes - facts.pool_bytes)
    assert facts.collectives == {}


def test_every_family_is_there():
    assert {lawful_config(case).family for case in HEAD_DIMS} == set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "num_tokens"),
    [
        *((case, 8) for case in ALWAYS),
        *(pytest.param(case, 8, marks=pytest.mark.nightly) for case in NIGHTLY),
        *(pytest.param(case, 40, marks=pytest.mark.nightly) for case in HEAD_DIMS),
    ],
)
def test_a_tpu_keeps_the_pool_in_place(tpu_compiler, case, num_tokens):
    check(compile_case(tpu_compiler, tpu_compiler.mesh("v5e"), "tpu", case, num_tokens), set())


@pytest.mark.slow
@pytest.mark.skipif(
    find_cuda_compiler() is None, reason="no compiler for NVIDIA GPUs: make cuda-compiler"
)
@pytest.mark.parametrize(
    "names",
    [
        *(pytest.param([case], marks=pytest.mark.nightly) for case in HEAD_DIMS),
        *(pytest.param([f"{case}+"], marks=pytest.mark.nightly) for case in HEAD_DIMS),
    ],
    ids=" ".join,
)
def test_a_gpu_keeps_the_pool_in_place(names):
    """By default one of Llama does: see tests/scripts/kernels/test_gpu_kernels.py."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.lawful", "h100", *names],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert list(facts) == names
    for own in facts.values():
        check(StepFacts(**own), SCATTERS)
