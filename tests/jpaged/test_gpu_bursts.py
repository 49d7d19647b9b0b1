# SPDX-License-Identifier: Apache-2.0
"""Bursts as loops of CUDA graphs, which no interpreter has.

JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu, or scripts/device_check.sh.
"""

import jax
import pytest

from jpaged import SamplingParams
from tests.jpaged.tiny import prompts_of, tiny_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="jax sees no GPU"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_burst_draws_what_single_steps_do(count, temperature):
    """Of one row, each burst once found that the one before it had ended."""
    found = []
    for decode_steps in (1, 8):
        with jax.default_matmul_precision("highest"):
            engine = tiny_engine(decode_steps=decode_steps)
            params = SamplingParams(max_tokens=40, temperature=temperature, seed=3, ignore_eos=True)
            outputs = engine.generate(prompts_of(range(9, 9 + count)), params)
        samples = [output.outputs[0] for output in outputs]
        assert [sample.error for sample in samples] == [None] * count
        found.append([sample.token_ids for sample in samples])
    assert found[0] == found[1] and all(len(tokens) == 40 for tokens in found[0])
