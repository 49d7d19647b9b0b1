# SPDX-License-Identifier: Apache-2.0
"""Every family beside what transformers computed; see scripts/fixtures/record_hf_fixtures.py."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.host.groups import GroupKind, most_pages
from jpaged.models import checkpoint
from jpaged.models.cache_groups import cache_groups
from jpaged.models.config_json import config_from_hf
from jpaged.models.decoder import Decoder, num_repetitions, stack_layers
from jpaged.models.families import FAMILIES
from tests import tolerances

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "hf"
CASES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
# Windows and sequences end inside pages, and of a crowd some are preempted. One shape to compile.
TIGHT = dict(
    max_model_len=96, num_pages=24, page_size=7, max_num_batched_tokens=24, max_num_seqs=6,
    deterministic=True,
)  # fmt: skip


def config_of(case, **options):
    """Settings for a case; where windows let go of pages, with too few for a crowd all the same."""
    fields = json.loads((FIXTURES / case / "config.json").read_text())
    groups = cache_groups(config_from_hf(fields), TIGHT["max_model_len"])
    pages = {}
    if groups.windows != (None,):
        longest = max(map(len, expected(case)["prompts"])) + 24
        kinds = [GroupKind(*kind) for kind in groups.kinds]
        least = sum(k.num_groups * most_pages(k, 7, longest, 24) for k in kinds)
        pages = {"num_pages": 1 + least + groups.num_groups}
    return EngineConfig(**TIGHT | pages | options)


def expected(case):
    return json.loads((FIXTURES / case / "expected.json").read_text())


def test_every_family_is_recorded():
    recorded = {
        json.loads((FIXTURES / c / "config.json").read_text())["architectures"][0] for c in CASES
    }
    assert recorded == set(FAMILIES)


NIGHTLY = (pytest.mark.nightly, pytest.mark.slow)
# By default their tokens are those of tests/jpaged/test_engine.py.
ELSEWHERE = {"llama3_rope_hd80_tied", "qwen3_mha_hd80_untied_sharded"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=NIGHTLY) if case in ELSEWHERE else case for case in CASES],
)
@pytest.mark.parametrize(
    "scan_layers", [True, pytest.param(False, marks=NIGHTLY)], ids=["scanned", "unrolled"]
)
class TestGeneration:
    def test_tokens_and_log_probabilities(self, case, scan_layers):
        record = expected(case)
        engine = Engine.load(FIXTURES / case, config_of(case, scan_layers=scan_layers))
        params = SamplingParams(max_tokens=24, temperature=0, logprobs=5)
        outputs = engine.generate(record["prompts"], params)
        assert [output.outputs[0].token_ids for output in outputs] == record["continuations"]
        for recorded in record["top_logprobs"]:
            found = outputs[recorded["prompt"]].outputs[0].logprobs
            for mine, ids, values in zip(
                found, recorded["token_ids"], recorded["logprobs"], strict=True
            ):
                np.testing.assert_allclose([mine[i] for i in ids], values, atol=tolerances.LOGPROB)
        assert engine.stats().totals.num_preemptions > 0
        engine.check_invariants()


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_dense_log_probabilities(case):
    """Of whole sequences at once, without pages."""
    config, params = checkpoint.load(FIXTURES / case, jnp.float32)
    record = expected(case)
    for recorded in record["top_logprobs"]:
        number = recorded["prompt"]
        prompt, answer = record["prompts"][number], record["continuations"][number]
        tokens = jnp.asarray([[*prompt, *answer[:-1]]], jnp.int32)
        decoder = Decoder(config, max_length=TIGHT["max_model_len"])
        logits = jax.jit(decoder.apply_dense)(params, tokens)[0, len(prompt) - 1 :]
        found = np.take_along_axis(
            np.asarray(jax.nn.log_softmax(logits)), np.array(recorded["token_ids"]), axis=-1
        )
        np.testing.assert_allclose(found, recorded["logprobs"], atol=tolerances.LOGPROB, rtol=0)


@pytest.mark.parametrize("case", CASES)
class TestParams:
    def test_the_tree_is_the_decoders(self, case):
        config, params = checkpoint.load(FIXTURES / case, jnp.bfloat16)
        decoder = Decoder(config)
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
        want = jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), decoder.abstract_params(jnp.bfloat16)
        )
        assert shapes == want
        assert decoder.num_params == sum(leaf.size for leaf in jax.tree.leaves(params))

    def test_layers_that_are_stacked(self, case):
        """Each is where its place in the pattern says, and what is left over stays."""
        config, params = checkpoint.load(FIXTURES / case, jnp.float32)
        stacked = stack_layers(params, config)
        period, repetitions = len(config.pattern), num_repetitions(config)
        scanned = Decoder(config, scan_layers=True).abstract_params()
        assert jax.tree.structure(stacked) == jax.tree.structure(scanned)
        for number in range(config.num_layers):
            repetition, place = divmod(number, period)
            if repetition < repetitions:
                layer = jax.tree.map(lambda x, r=repetition: x[r], stacked["layers"][str(place)])
            else:
                layer = stacked[f"layers_{number}"]
            jax.tree.map(np.testing.assert_array_equal, layer, params[f"layers_{number}"])

    def test_orbax(self, case, tmp_path):
        config, params = checkpoint.load(FIXTURES / case, jnp.float32)
        checkpoint.save_orbax(tmp_path, config, params)
        again, restored = checkpoint.load(tmp_path, jnp.float32)
        assert again == config
        jax.tree.map(np.testing.assert_array_equal, restored, params)
