# SPDX-License-Identifier: Apache-2.0
"""Beam search beside transformers' recorded hypotheses; see scripts/fixtures/record_hf_beams.py."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from jpaged import Engine, EngineConfig, SamplingParams

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "hf"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/beams.json"))

PAGE_SIZE = 8


def records_of(case):
    return json.loads((FIXTURES / case / "beams.json").read_text())["records"]


def params_of(record):
    return SamplingParams(
        max_tokens=record["max_tokens"],
        n=record["beam_width"],
        beam_width=record["beam_width"],
        length_penalty=record["length_penalty"],
        early_stopping=record["early_stopping"],
        stop_token_ids=record["stop_token_ids"],
    )


def pages_needed(record):
    """Pages that every beam has of its own at the end, and those of the prompt that all share."""
    shared = len(record["prompt"]) // PAGE_SIZE
    cells = len(record["prompt"]) + record["max_tokens"] - 1
    return shared + record["beam_width"] * (-(-cells // PAGE_SIZE) - shared)


def check_all(engine, records):
    """Runs all records at once, and compares tokens, scores and why hypotheses ended."""
    outputs = engine.generate([r["prompt"] for r in records], [params_of(r) for r in records])
    for output, record in zip(outputs, records, strict=True):
        beams = output.outputs
        assert [beam.token_ids for beam in beams] == record["token_ids"], record
        np.testing.assert_allclose(
            [beam.score for beam in beams], record["scores"], rtol=1e-4, atol=1e-4
        )
        assert [beam.finish_reason for beam in beams] == [
            "stop" if tokens[-1] in record["stop_token_ids"] else "length"
            for tokens in record["token_ids"]
        ]
    engine.check_invariants()


@pytest.mark.slow
class TestHuggingFace:
    """By default one, in a pool that is too small, with one padded shape: compiling takes long."""

    @pytest.mark.parametrize(
        ("case", "deterministic"),
        [
            pytest.param(CASES[0], True, marks=pytest.mark.nightly),
            *(pytest.param(case, False, marks=pytest.mark.nightly) for case in CASES),
        ],
    )
    def test_hypotheses_are_equal(self, case, deterministic):
        records = records_of(case)
        num_pages = 1 + sum(map(pages_needed, records))
        config = EngineConfig(
            page_size=PAGE_SIZE,
            num_pages=num_pages,
            max_model_len=64,
            deterministic=deterministic,
        )
        engine = Engine.load(FIXTURES / case, config)
        check_all(engine, records)
        assert engine.stats().totals.num_preemptions == 0

    @pytest.mark.parametrize(
        ("case", "preemption", "deterministic"),
        [
            (CASES[1], "swap", True),
            *(
                pytest.param(case, preemption, False, marks=pytest.mark.nightly)
                for case in CASES[:2]
                for preemption in ("recompute", "swap")
            ),
        ],
    )
    def test_hypotheses_are_equal_under_preemption(self, case, preemption, deterministic):
        records = records_of(case)
        config = EngineConfig(
            page_size=PAGE_SIZE,
            # The null page, and one more than the largest search takes.
            num_pages=2 + max(map(pages_needed, records)),
            max_num_batched_tokens=32,
            max_num_seqs=24,
            max_model_len=64,
            preemption=preemption,
            deterministic=deterministic,
        )
        engine = Engine.load(FIXTURES / case, config)
        check_all(engine, records)
        assert engine.stats().totals.num_preemptions > 0

    def test_what_the_file_asks_for(self, tmp_path):
        """The records whose results need a penalty and a way to stop that are no defaults."""
        case = CASES[0]
        records = [r for r in records_of(case) if (r["beam_width"], r["length_penalty"]) == (2, 2)]
        (record,) = (r for r in records if r["early_stopping"] is True)
        (other,) = (r for r in records if r["early_stopping"] is False)
        assert record["token_ids"] != other["token_ids"]
        for path in (FIXTURES / case).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        fields = {"length_penalty": 2.0, "early_stopping": True, "eos_token_id": []}
        (tmp_path / "generation_config.json").write_text(json.dumps(fields))
        config = EngineConfig(page_size=PAGE_SIZE, max_model_len=64, deterministic=True)
        engine = Engine.load(tmp_path, config)
        params = dataclasses.replace(params_of(record), length_penalty=None, early_stopping=None)
        (output,) = engine.generate([record["prompt"]], params)
        assert [beam.token_ids for beam in output.outputs] == record["token_ids"]


class TestFixtures:
    def test_records_cover_what_decides(self):
        """Not one record, not one parameter fewer than the tests above are meant to compare."""
        assert len(CASES) >= 2
        for case in CASES:
            records = records_of(case)
            assert {(r["beam_width"], r["length_penalty"]) for r in records} >= {
                (width, penalty) for width in (2, 4, 7) for penalty in (1.0, 0.0, 2.0, -0.5)
            }
            assert {r["early_stopping"] for r in records} == {False, True, "never"}
            assert {len(r["stop_token_ids"]) for r in records} == {0, 1, 2}
            assert {len(r["prompt"]) for r in records} == {1, 7, 16, 33}
