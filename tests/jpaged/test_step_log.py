# SPDX-License-Identifier: Apache-2.0
"""Recorded steps: what is written is read, and run again it gives the same."""

import errno
import gzip
import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.device.memory import plan_pool
from jpaged.device.replay import replay
from jpaged.device.runner import ModelRunner
from jpaged.host.batch import ShapeBuckets
from jpaged.host.logits_processors import Processing
from jpaged.host.step import Draw, Rows, Samples, Scores, Search, StepPlan
from jpaged.host.step_log import StepLog, StepLogHeader, read_header, read_steps
from jpaged.host.token_biases import BiasEntries, CountEntries
from jpaged.pallas_kernels.dispatch import resolve_backend
from jpaged.placement import runner_of
from tests.jpaged.exact import EXACT, drawn, run_steps
from tests.jpaged.tiny import TINY, prompts_of, tiny_engine, tiny_params

HEADER = StepLogHeader(
    page_size=4, num_pages=9, max_num_seqs=3, max_num_batched_tokens=16, max_model_len=14,
    deterministic=True, num_host_pages=5,
)  # fmt: skip


def same(left, right):
    """Equality that looks into the arrays of a plan."""
    if isinstance(left, np.ndarray):
        same_type = isinstance(right, np.ndarray) and left.dtype == right.dtype
        return same_type and np.array_equal(left, right)
    if isinstance(left, tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return left == right and type(left) is type(right)


def same_plans(left, right):
    return all(same(a, b) for a, b in zip(vars(left).values(), vars(right).values(), strict=True))


tokens = st.integers(0, 2**31 - 1)
pairs = st.lists(st.tuples(tokens, tokens), max_size=3).map(tuple)
bitmaps = st.none() | st.binary(min_size=3, max_size=3).map(lambda b: np.frombuffer(b, np.uint8))
floats = st.floats(allow_nan=False, width=32)


def arrays(values, dtype):
    return st.lists(values, max_size=3).map(lambda found: np.array(found, dtype))


processings = st.builds(
    Processing,
    num_bytes=tokens,
    newest=tokens,
    repetition_penalty=floats,
    seen=bitmaps,
    blocked=bitmaps,
    bias=st.none()
    | st.builds(
        BiasEntries,
        arrays(tokens, np.int32),
        arrays(st.integers(-1, 9), np.int32),
        arrays(floats, np.float32),
    ),
    presence_penalty=floats,
    frequency_penalty=floats,
    counts=st.none() | st.builds(CountEntries, arrays(tokens, np.int32), arrays(tokens, np.int32)),
    renormalized=st.booleans(),
)


@st.composite
def plans(draw):
    count = draw(st.integers(0, 3))
    column = lambda values: tuple(draw(values) for _ in range(count))  # noqa: E731
    num_tokens = column(st.integers(1, 5))
    rows = Rows(
        column(st.tuples(st.text(max_size=3), st.integers(0, 9))),
        tuple(draw(st.permutations(range(5)))[:count]),
        column(st.integers(0, 9)),
        num_tokens,
        column(st.lists(tokens, max_size=3)),
        column(st.integers(-1, 2)),
    )
    draws = st.builds(
        Draw, floats, tokens, floats, floats, st.integers(0, 2**32 - 1), tokens, tokens
    )
    samples = Samples(
        column(st.integers(0, 2)),
        column(st.integers(0, 4)),
        column(draws),
        column(st.none() | processings),
    )
    searches = st.builds(Search, tokens, st.lists(floats, max_size=3).map(tuple), tokens, tokens)
    scores = zip(
        *draw(st.lists(st.tuples(tokens, tokens, tokens, tokens), max_size=3)), strict=True
    )
    return StepPlan(
        rows, samples, draw(st.lists(searches, max_size=2).map(tuple)), draw(pairs), draw(pairs),
        draw(pairs), *(draw(tokens) for _ in range(6)), Scores(*scores),
    )  # fmt: skip


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first text reads Unicode's tables
@given(
    st.lists(plans(), max_size=6), st.randoms(use_true_random=False), st.sampled_from(["", ".gz"])
)
def test_what_is_written_is_read(tmp_path_factory, steps, random, suffix):
    path = tmp_path_factory.mktemp("log") / f"steps.jsonl{suffix}"
    log, tables, arrays = StepLog(path, HEADER), {}, []
    for plan in steps:
        array = np.zeros((plan.num_rows + 2, HEADER.pages_per_seq), np.int32)
        for row, table_id in enumerate(plan.rows.table_ids):
            before = tables.get(table_id, [])
            pages = before[: random.randint(0, 4)] + [random.randint(1, 8) for _ in range(4)]
            length = -(-(plan.rows.starts[row] + plan.rows.num_tokens[row]) // HEADER.page_size)
            tables[table_id] = array[row, :length] = pages[:length]
        arrays.append(array[: plan.num_rows])
        log.write(plan, array)
    log.close()
    assert read_header(path) == HEADER
    read = list(read_steps(path))
    assert len(read) == len(steps)
    for step, plan, array in zip(read, steps, arrays, strict=True):
        assert same_plans(step.plan, plan)
        found = step.snapshot(plan.rows.table_ids, plan.num_rows + 1)
        np.testing.assert_array_equal(found, np.pad(array, ((0, 1), (0, 0))))


@pytest.fixture
def recorded(tmp_path):
    """A file of three steps."""
    path = tmp_path / "steps.jsonl"
    log = StepLog(path, HEADER)
    for start in range(3):
        rows = Rows((("a", 0),), (0,), (start,), (1,), ([5],), (-1,))
        log.write(StepPlan(rows), np.array([[7, 0, 0, 0]], np.int32))
    return path  # not closed: every line is there


class TestFiles:
    def test_a_cut_off_line_is_left_out(self, recorded):
        text = recorded.read_text()
        for cut in (1, 20):
            recorded.write_text(text[:-cut])
            assert len(list(read_steps(recorded))) == 2

    def test_a_cut_off_compressed_file(self, recorded, tmp_path):
        path = tmp_path / "steps.gz"
        path.write_bytes(gzip.compress(recorded.read_bytes())[:-12])
        assert len(list(read_steps(path))) <= 3

    @pytest.mark.parametrize(
        "text", ["", "{}\n", "[]\n", "steps\n", '{"format": "jpaged steps", "version": 99}\n']
    )
    def test_no_log(self, tmp_path, text):
        path = tmp_path / "steps.jsonl"
        path.write_text(text)
        for read in (read_header, lambda path: list(read_steps(path))):
            with pytest.raises(ValueError, match=r"steps\.jsonl holds no steps of this version"):
                read(path)

    @pytest.mark.parametrize("line", ["{}", "[", '{"rows": 5}'])
    def test_a_damaged_line_is_named(self, recorded, line):
        lines = recorded.read_text().splitlines()
        lines[2] = line
        recorded.write_text("\n".join(lines) + "\n")
        steps = read_steps(recorded)
        next(steps)
        with pytest.raises(ValueError, match="line 3 is no step"):
            next(steps)

    def test_a_file_that_cannot_be_made(self, tmp_path):
        for path in (tmp_path, tmp_path / "no" / "steps"):
            with pytest.raises(ValueError, match=r"record_steps='.*' cannot be written: "):
                tiny_engine(record_steps=str(path), num_pages=4)

    def test_a_full_disk_ends_the_record_and_not_the_run(self, monkeypatch, tmp_path, caplog):
        class Full:
            def write(self, line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        engine = tiny_engine(record_steps=str(tmp_path / "steps"), **EXACT)
        monkeypatch.setattr(engine._log, "_file", Full())
        (output,) = engine.generate([[1, 2]], SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 3
        (record,) = caplog.records
        assert "recording of steps ends: No space left on device" in record.getMessage()


class TestReplay:
    REQUESTS = (
        *(drawn(seed) for seed in range(3)),
        drawn(7, n=3),
        SamplingParams(beam_width=3, n=3, max_tokens=9),
        drawn(8, repetition_penalty=1.7, min_tokens=4, suppress_tokens=(3, 5)),
        drawn(9, n=2, presence_penalty=0.5, logit_bias={5: 3.0}, bad_words_ids=[[5, 5], [6, 7]]),
    )

    @pytest.mark.parametrize("preemption", ["recompute", "swap"])
    def test_the_same_tokens(self, tmp_path, monkeypatch, preemption):
        """Samples, beams, processors, preemption and page copies; every number that was found."""
        path = tmp_path / "steps.jsonl"
        config = EngineConfig(
            **EXACT, num_pages=14, max_model_len=64, preemption=preemption, record_steps=str(path)
        )
        engine, dispatched = Engine(TINY, tiny_params(), config), []
        run = ModelRunner.run
        with monkeypatch.context() as patch:

            def noted(self, *args):
                dispatched.append(run(self, *args))
                return dispatched[-1]

            patch.setattr(ModelRunner, "run", noted)
            for prompt, params in zip(
                prompts_of((3, 20, 9, 17, 12, 8, 11)), self.REQUESTS, strict=True
            ):
                engine.add_request(prompt, params)
            done = run_steps(engine)
        assert engine.stats().totals.num_preemptions > 0

        header = read_header(path)
        buckets = ShapeBuckets(
            header.max_num_batched_tokens, header.max_num_seqs, single=header.deterministic
        )
        backend = resolve_backend(config.backend)
        plan = plan_pool(config, TINY, backend)
        runner = runner_of(
            config, TINY, tiny_params(), plan, backend=backend, num_host_pages=header.num_host_pages
        )
        again = list(replay(read_steps(path), runner, buckets))
        read = [found for result in dispatched for found in result.outcomes()]
        assert [outcome for _, outcome in again] == read
        # And they are the answers, which were read by another way.
        found = {}
        for step, outcome in again:
            searched = {
                slot
                for search in step.searches
                for slot in range(search.first_sample, search.first_sample + len(search.scores))
            }
            for slot, row in enumerate(step.samples.rows):
                if slot not in searched:
                    # One that was preempted meanwhile is drawn again, and is the same.
                    place = step.rows.starts[row] + step.samples.offsets[slot] + 1
                    token = outcome.tokens[slot]
                    key = step.rows.keys[row][0], step.samples.draws[slot].sample_index
                    own = found.setdefault(key, {})
                    assert own.setdefault(place, token) == token
        answers = {
            (request_id, index): completion.token_ids
            for request_id, output in done.items()
            if output.outputs[0].score is None
            for index, completion in enumerate(output.outputs)
        }
        assert answers
        for key, token_ids in answers.items():
            assert [found[key][place] for place in sorted(found[key])][
                : len(token_ids)
            ] == token_ids
        assert any(step.searches for step, _ in again)
        assert any(step.copies for step, _ in again)
        assert any(step.swap_outs for step, _ in again) == (preemption == "swap")

    def test_a_step_with_another_page_differs(self, tmp_path):
        """What the comparison above rests on."""
        path = tmp_path / "steps.jsonl"
        config = EngineConfig(**EXACT, num_pages=14, max_model_len=64, record_steps=str(path))
        Engine(TINY, tiny_params(), config).generate(prompts_of((20, 9)), drawn(1))
        lines = path.read_text().splitlines()
        plan = plan_pool(config, TINY, "xla")
        buckets = ShapeBuckets(config.max_num_batched_tokens, config.max_num_seqs, single=True)

        def tokens_of():
            runner = runner_of(config, TINY, tiny_params(), plan, backend="xla", num_host_pages=0)
            return [outcome.tokens for _, outcome in replay(read_steps(path), runner, buckets)]

        same = tokens_of()
        fields = json.loads(lines[-3])
        fields["pages"] = [[0, [13] * (kept + len(new))] for kept, new in fields["pages"]]
        path.write_text("\n".join([*lines[:-3], json.dumps(fields), *lines[-2:]]) + "\n")
        assert tokens_of() != same
