# SPDX-License-Identifier: Apache-2.0
"""The shapes of a job, by hand; what is not planned is refused, and what is compiles once."""

import pytest

from jpaged import EngineConfig, SamplingParams
from jpaged.host.admission import SchedulerConfig
from jpaged.host.batch import ShapeBuckets, StepShape
from jpaged.host.compile_plan import (
    CompilePlan,
    JobSteps,
    PlannedShape,
    StepSize,
    UnplannedProgramError,
    fewest_shapes,
)
from jpaged.host.logprobs import likeliest_counts
from jpaged.host.warm_up import warm_up_plan
from jpaged.simulation import Item, PagedSimulator
from jpaged.simulation.job_steps import job_steps
from tests.jpaged.tiny import prompts_of, tiny_engine, token_ids

# Two prompts, of 5 and 20 tokens, that get 3 and 2: both are read in a step, which gives each a
# token; the next gives the second its last, and the third is the first's alone.
SMALL = {"step_shapes": "16x4,4x4", "max_num_batched_tokens": 16, "max_num_seqs": 4}
ITEMS = [Item([1] * 5, 3), Item([2] * 20, 2)]
SIZES = {StepSize(25, 2): 1, StepSize(2, 2): 1, StepSize(1, 1): 1}


def simulator(num_pages=9, **budgets):
    budgets = dict(max_num_batched_tokens=64, max_num_seqs=8, max_model_len=64) | budgets
    return PagedSimulator(SchedulerConfig(**budgets), num_pages, 16)


class TestJobSteps:
    def test_by_hand(self):
        # 25 tokens of prompts are the most that there is to compute, with two rows.
        assert job_steps(simulator(), ITEMS) == JobSteps(StepSize(25, 2), SIZES)

    def test_budgets_bound_a_step(self):
        # 16 of the 25 tokens, then the rest; one after the other where there is one row.
        found = job_steps(simulator(max_num_batched_tokens=16), ITEMS)
        assert found.most == StepSize(16, 2)
        assert found.sizes == {StepSize(16, 2): 1, StepSize(10, 2): 1, StepSize(2, 2): 1}
        assert job_steps(simulator(max_num_seqs=1), ITEMS).most == StepSize(25, 1)

    def test_who_may_lose_pages_computes_more(self):
        # 8 and 22 cells are 1 + 2 pages; with two, what was generated may be computed again.
        assert job_steps(simulator(num_pages=4), ITEMS).most == StepSize(25, 2)
        assert job_steps(simulator(num_pages=3), ITEMS).most == StepSize(30, 2)

    def test_samples_are_rows(self):
        found = job_steps(simulator(), [Item([1] * 3, 2, num_samples=4)])
        assert found == JobSteps(StepSize(4, 4), {StepSize(3, 4): 1, StepSize(4, 4): 1})


class TestPlan:
    def test_by_hand(self):
        plan = CompilePlan.of(ShapeBuckets(64, 8), JobSteps(StepSize(25, 2), SIZES))
        assert plan.shapes == (
            PlannedShape(StepShape(1, 1), 1, 1),
            PlannedShape(StepShape(2, 2), 1, 2),
            PlannedShape(StepShape(16, 4)),  # if fewer than 17 tokens are left to read at once
            PlannedShape(StepShape(32, 4), 1, 25),
        )
        assert plan.padded_tokens == 1 + 2 + 32
        timed = plan.timed({StepShape(32, 4): 1.5, StepShape(1, 1): 0.25})
        assert [" ".join(line.split()) for line in timed.table()][1:] == [
            "1 x 1 1 1 0.0% 0.25 s",
            "2 x 2 1 2 0.0% -",
            "16 x 4 0 0 - -",
            "32 x 4 1 25 21.9% 1.50 s",  # 7 of 32
            "4 shapes 3 28 20.0% 1.75 s",  # 7 of 35
        ]

    def test_no_job_is_every_shape(self):
        buckets = ShapeBuckets(64, 8)
        plan = CompilePlan.of(buckets, JobSteps(StepSize(64, 8)))
        assert [each.shape for each in plan.shapes] == buckets.all_shapes()

    @pytest.mark.parametrize(
        ("added", "shapes"),
        [
            # By the ladder 35 tokens. Leaving out 1x1 adds 1, 2x2 then 2 * 30: to 32x4.
            (0.0, [(1, 1), (2, 2), (32, 4)]),
            (0.03, [(2, 2), (32, 4)]),
            (1.7, [(2, 2), (32, 4)]),
            (1.75, [(32, 4)]),
        ],
    )
    def test_few_shapes_by_hand(self, added, shapes):
        job = JobSteps(StepSize(25, 2), SIZES)
        found = fewest_shapes(ShapeBuckets(64, 8), job, added)
        assert found.all_shapes() == [StepShape(*shape) for shape in shapes]
        # A job that goes another way still finds room.
        assert found.shape(17, 1, 1) == StepShape(32, 4)


class TestGivenShapes:
    def test_the_smallest_that_holds_a_step(self):
        buckets = ShapeBuckets.of(
            EngineConfig(step_shapes="64x4,8x8,4x4", max_num_batched_tokens=64, max_num_seqs=8)
        )
        assert buckets.all_shapes() == [StepShape(4, 4), StepShape(8, 8), StepShape(64, 4)]
        for step, shape in (
            ((1, 1, 1), (4, 4)),
            ((5, 5, 5), (8, 8)),
            ((5, 1, 1), (8, 8)),  # no decode, but it fits
            ((9, 3, 3), (64, 4)),
            ((9, 5, 5), (16, 8)),  # none holds it: the ladder's
        ):
            assert buckets.shape(*step) == StepShape(*shape)

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            ("16", "step_shapes='16' must be TOKENSxROWS"),
            ("", "step_shapes='' must be TOKENSxROWS"),
            ("16x4,", "must be TOKENSxROWS"),
            ("0x4", "must be TOKENSxROWS"),
            ("65x4", "step_shapes has 65x4, .* max_num_batched_tokens=64"),
            ("16x9", "step_shapes has 16x9, .* max_num_seqs=8"),
        ],
    )
    def test_wrong_ones(self, shapes, message):
        with pytest.raises(ValueError, match=message):
            EngineConfig(step_shapes=shapes, max_num_batched_tokens=64, max_num_seqs=8)

    def test_not_beside_one_shape(self):
        with pytest.raises(ValueError, match="step_shapes='16x4' and deterministic"):
            EngineConfig(step_shapes="16x4", deterministic=True)


class TestWhatRequestsAskFor:
    @pytest.mark.parametrize(
        ("most", "vocab_size", "counts"),
        [
            (0, 50_000, []),
            (1, 50_000, [16]),
            (16, 50_000, [16]),
            (17, 50_000, [16, 128]),
            (1025, 50_000, [16, 128, 1024, 8192]),
            (50_000, 50_000, [16, 128, 1024, 8192, 50_000]),
            (60, 97, [16, 97]),
            (1, 10, [10]),
        ],
    )
    def test_numbers_of_likeliest_tokens_by_hand(self, most, vocab_size, counts):
        assert likeliest_counts(most, vocab_size) == counts

    def test_a_plan_has_what_smaller_requests_ask_for_too(self):
        params = SamplingParams(logprobs=200, logprobs_mode="filters", prompt_logprobs=17)
        plan = warm_up_plan(ShapeBuckets(64, 8), 50_000, (), SamplingParams(), 64, params=[params])
        assert plan.shapes == tuple(ShapeBuckets(64, 8).all_shapes())
        assert plan.bursts == tuple(StepShape(2**i, 2**i) for i in range(4))
        assert sorted(plan.likeliest) == [16, 128] and sorted(plan.modes) == [16, 128, 1024]
        assert plan.scores and not plan.beams and not plan.processors


class TestStrict:
    def test_what_is_not_planned_is_refused_before_it_compiles(self):
        params = SamplingParams(max_tokens=3, temperature=0)
        short, long = prompts_of([9, 20])
        want = token_ids(tiny_engine().generate([short], params))
        engine = tiny_engine(step_shapes="16x4,1x1", strict_shapes=True)
        compiled = engine.stats().num_compilations
        assert compiled
        message = (
            r"a step of 20 tokens of 1 sequences: 32x4, tokens x rows, is not compiled; add it to "
            "step_shapes"
        )
        with pytest.raises(UnplannedProgramError, match=message):
            engine.generate([long], params)
        assert engine.stats().num_compilations == compiled
        # It serves on, and the same.
        assert token_ids(engine.generate([short], params)) == want
        engine.check_invariants()
        # What is warmed up later is planned.
        engine.warm_up([StepShape(32, 4)])
        assert engine.generate([long], params)[0].finished
        assert engine.stats().num_unplanned_compilations == 0

    def test_all_that_a_job_asks_for_is_compiled_whichever_requests_share_a_step(self):
        """Each count of likeliest tokens is the largest of some step, each kind alone in one."""
        every = [
            SamplingParams(max_tokens=3, seed=1, **own)
            for own in (
                {"logprobs": 1}, {"logprobs": 60}, {"prompt_logprobs": 0}, {"prompt_logprobs": 5},
                {"logprobs": 0, "logprobs_mode": "temperature"},
                {"logprobs": 20, "logprobs_mode": "filters"},
                {"frequency_penalty": 1.0}, {"logit_bias": {3: 1.0, 9: 2.0}}, {"beam_width": 2},
                {"beam_width": 3, "repetition_penalty": 1.2, "logprobs": 2}, {"n": 3},
            )
        ]  # fmt: skip
        prompts = prompts_of([9, 5, 7, 20, 3, 8, 12, 6, 4, 10, 11])
        want = tiny_engine(**SMALL).generate(prompts, every)
        engine = tiny_engine(strict_shapes=True, **SMALL)
        for own in every:  # one after the other: beams are compiled with what came before, too
            engine.warm_up(params=[own])
        compiled = engine.stats().num_compilations
        outputs = engine.generate(prompts, every)
        outputs += [engine.generate([p], own)[0] for p, own in zip(prompts, every, strict=True)]
        assert engine.stats().num_compilations == compiled
        assert engine.stats().num_unplanned_compilations == 0
        assert token_ids(outputs) == 2 * token_ids(want)

        def counts(output):
            places = [output.prompt_logprobs, *(sample.logprobs for sample in output.outputs)]
            return [[len(found or ()) for found in place or ()] for place in places]

        assert [counts(output) for output in outputs] == 2 * [counts(output) for output in want]

    def test_few_programs_report_any_number_of_likeliest_tokens(self):
        engine = tiny_engine(**SMALL | {"step_shapes": "16x4"})
        (prompt,) = prompts_of([9])
        compiled = []
        for count in (1, 2, 5, 16, 17, 60, 97):
            params = SamplingParams(max_tokens=1, temperature=0, logprobs=count)
            (output,) = engine.generate([prompt], params)
            (found,) = output.outputs[0].logprobs
            assert len(found) == count
            compiled.append(engine.stats().num_compilations)
        # 16 of them, or the vocabulary's 97, where powers of 8 above 16 are more.
        assert compiled[3] == compiled[0] and compiled[6] == compiled[4] == compiled[3] + 1

    @pytest.mark.parametrize(
        ("own", "message"),
        [
            ({"logprobs": 17}, r"logprobs=17 needs .*\(likeliest tokens: 97; compiled: 16\)"),
            ({"prompt_logprobs": 2}, r"prompt_logprobs=2 .*\(scores: given tokens; compiled: none"),
            (
                {"logprobs": 2, "logprobs_mode": "filters"},
                r"logprobs=2, logprobs_mode='filters' needs .* modes than raw: 16; compiled: none",
            ),
            ({"beam_width": 3}, r"beam_width=3 needs .*\(\(beams, candidates\): \(3, 6\); comp"),
            (
                {"presence_penalty": 0.5},
                r"presence_penalty=0.5, max_tokens=9 needs .* changes logits: 0; compiled: none",
            ),
        ],
    )
    def test_what_is_not_compiled_is_refused_when_it_is_added(self, own, message):
        engine = tiny_engine(strict_shapes=True, **SMALL)
        engine.warm_up(num_logprobs=1)
        prompt, other = prompts_of([9, 5])
        good, bad = SamplingParams(max_tokens=4, logprobs=9), SamplingParams(max_tokens=9, **own)
        with pytest.raises(ValueError, match=f"request '1': strict_shapes: {message}"):
            engine.generate([prompt, other], [good, bad])
        live = engine.add_request(prompt, good)
        with pytest.raises(ValueError, match=message):
            engine.add_request(other, bad)
        assert engine.stats().totals.num_steps == 0  # nothing has begun
        while engine.has_unfinished_requests:
            (*_, last) = engine.step() or [None]
        assert last.request_id == live and last.outputs[0].finish_reason == "length"
        engine.warm_up(params=[bad])
        assert engine.generate([other], bad)[0].finished
        assert engine.stats().num_unplanned_compilations == 0

    def test_bursts_have_shapes_that_are_not_of_decode_where_no_others_are_given(self):
        params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
        prompts = prompts_of([9, 5])
        want = token_ids(tiny_engine().generate(prompts, params))
        engine = tiny_engine(strict_shapes=True, decode_steps=4, **SMALL | {"step_shapes": "16x4"})
        compiled = engine.stats().num_compilations
        assert token_ids(engine.generate(prompts, params)) == want
        totals = engine.stats().totals
        assert totals.num_dispatches < totals.num_steps
        assert engine.stats().num_compilations == compiled

    def test_what_no_request_can_have_is_not_compiled(self):
        engine = tiny_engine(strict_shapes=True, **SMALL)
        compiled = engine.stats().num_compilations
        for own, message in (
            ({"beam_width": 5}, "params has beam_width=5, above 4"),
            ({"logprobs": 98}, "params has logprobs=98, above 97"),
            ({"prompt_logprobs": 98}, "params has prompt_logprobs=98, above 97"),
        ):
            with pytest.raises(ValueError, match=message):
                engine.warm_up(params=[SamplingParams(max_tokens=4, **own)])
        assert engine.stats().num_compilations == compiled

    def test_it_stays_so_where_warming_up_fails(self, monkeypatch):
        engine = tiny_engine(step_shapes="16x4,1x1", strict_shapes=True)

        def failing(*_):
            raise RuntimeError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "_idle_batches", failing)
            with pytest.raises(RuntimeError, match="no memory"):
                engine.warm_up([StepShape(32, 4)])
        with pytest.raises(UnplannedProgramError, match="32x4"):
            engine.generate(prompts_of([20]), SamplingParams(max_tokens=3))

    def test_forks_are_held_to_it_too(self):
        engine = tiny_engine(strict_shapes=True, **SMALL)
        (prompt,) = prompts_of([9])
        live = engine.add_request(prompt, SamplingParams(max_tokens=4))
        engine.step()
        with pytest.raises(ValueError, match=r"frequency_penalty=1.0, max_tokens=4 needs programs"):
            engine.fork(live, params=SamplingParams(max_tokens=4, frequency_penalty=1.0))
        engine.abort(live)
