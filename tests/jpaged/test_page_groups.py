# SPDX-License-Identifier: Apache-2.0
"""Groups of layers with pages of their own change what memory is needed, and no output.

Engines beside others that have one table for all layers.
"""

import collections
import dataclasses
import functools

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.device import memory
from jpaged.device.replay import replay
from jpaged.host.groups import GroupKind
from jpaged.host.page_pool import PagePool
from jpaged.host.page_table import PageTable
from jpaged.host.prefix import Prefix
from jpaged.host.step_log import read_header, read_steps
from jpaged.host.viewer import draw
from jpaged.models.cache_groups import one_group
from jpaged.models.decoder import Decoder
from jpaged.placement import runner_of
from tests.jpaged.crowd import BEAMS, EXACT, FIXTURES, GREEDY, drawn, serve
from tests.jpaged.exact import everything
from tests.jpaged.expected import first_seen
from tests.jpaged.tiny import TINY, tiny_engine, tiny_params, windowed
from tests.jpaged.tiny import prompts_of as prompts_for

NIGHTLY = pytest.mark.nightly
# Layers that see everything and layers that see 5 tokens; all see 11; one sees everything, four 6.
# Groups, and pages that hold the widest search and little more.
CASES = {
    "gemma3_two_ropes": (5, 100),
    "mistral_window": (1, 20),
    "ministral_some_windows": (5, 100),
}


@functools.cache
def one_table(case):
    """The answers of an engine with one table for all layers, and pages enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            memory, "cache_groups", lambda config, max_length: one_group(config.num_layers)
        )
        engine = Engine.load(FIXTURES / case, EngineConfig(**EXACT, num_pages=400))
        assert engine.stats().num_groups == 1
        return serve(engine, case)


OPTIONS = {
    "roomy": ({}, ("num_hit_tokens", "num_page_copies")),
    "tight, no cache": (
        {"prefix_cache": False, "preemption": "recompute"},
        ("num_preemptions",),
    ),
    "tight": ({"preemption": "recompute"}, ("num_preemptions", "num_hit_tokens")),
    "tight, swapping": ({"preemption": "swap"}, ("num_swapped_pages",)),
}
# Each of the options once; the others nightly.
ALWAYS = {
    ("mistral_window", "roomy"),
    ("mistral_window", "tight"),
    ("gemma3_two_ropes", "tight, swapping"),
    ("mistral_window", "tight, no cache"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "name"),
    [
        (case, name) if (case, name) in ALWAYS else pytest.param(case, name, marks=NIGHTLY)
        for case in CASES
        for name in OPTIONS
    ],
)
def test_no_output_changes(case, name):
    options, happens = OPTIONS[name]
    num_groups, tight = CASES[case]
    num_pages = 1 + (tight if options else 300 * num_groups)
    engine = Engine.load(FIXTURES / case, EngineConfig(**EXACT, num_pages=num_pages, **options))
    assert engine.stats().num_groups == num_groups
    assert serve(engine, case) == one_table(case)
    if case == "mistral_window" and not options:
        # Once more, with pages that are known: of the window alone.
        hits = engine.stats().totals.num_hit_tokens
        assert serve(engine, case) == one_table(case)
        assert engine.stats().totals.num_hit_tokens > 2 * hits
    totals = engine.stats().totals
    assert all(getattr(totals, name) > 0 for name in happens), totals


@pytest.mark.slow
@pytest.mark.nightly
def test_more_groups_than_a_long_context_may_have():
    """Gemma 3 4B's 29 and 5 layers, each with a table of its own, in a pool that is tight."""
    seen, full = windowed(7).pattern
    model = dataclasses.replace(TINY, pattern=(*[seen] * 5, full), num_layers=34)
    params = jax.tree.map(lambda x: x * 4, Decoder(model).init(jax.random.key(0)))
    prompts = prompts_for((3, 20, 9, 40, 12, 30))
    own = [BEAMS if i == 3 else drawn(i, n=3) if i == 1 else GREEDY for i in range(6)]

    def served(num_pages):
        engine = Engine(
            model, params, EngineConfig(**EXACT, num_pages=num_pages, preemption="swap")
        )
        outputs = everything(engine.generate(prompts, own))
        engine.check_invariants()
        return outputs, engine.stats()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "cache_groups", lambda config, max_length: one_group(34))
        want, together = served(300)
    found, stats = served(760)
    assert (together.num_groups, stats.num_groups) == (1, 34)
    assert found == want
    assert stats.totals.num_swapped_pages > 0 and stats.totals.num_page_copies > 0, stats.totals


def windowed_engine(**config):
    settings = dict(deterministic=True, page_size=4, max_num_batched_tokens=32, max_num_seqs=8)
    return tiny_engine(model_config=windowed(), **settings | config)


class TestWindowedEngine:
    def test_pages_below_the_window_return_at_once(self):
        engine = windowed_engine(num_pages=60, prefix_cache=False)
        engine.add_request(prompts_for([30])[0], SamplingParams(max_tokens=40, ignore_eos=True))
        used = []
        while engine.has_unfinished_requests:
            engine.step()
            used.append(engine.stats().num_used_pages)
            engine.check_invariants()
        # The prompt has 8 pages in each group; at the end 69 tokens have 18, and the window of 12,
        # wherever it begins in a page, 4 at most.
        assert used[0] == 16
        assert max(used[2:]) <= 18 + 4
        assert max(used[-6:-1]) >= 18 + 3

    def test_a_pool_is_enough_for_what_windows_leave(self):
        """One of 69 tokens: 18 pages and at most 12 of the window and a step of 32."""
        engine = windowed_engine(num_pages=1 + 18 + 12)
        prompt, params = prompts_for([30]), SamplingParams(max_tokens=40, ignore_eos=True)
        (output,) = engine.generate(prompt, params)
        assert len(output.outputs[0].token_ids) == 40
        small = windowed_engine(num_pages=18 + 12)
        with pytest.raises(ValueError, match="need 30 pages of 4 tokens, but the pool has 29"):
            small.generate(prompt, params)
        # As many as fit, where nobody says how many.
        (output,) = small.generate(prompt, SamplingParams(ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 4 * 17 + 1 - 30

    def test_a_window_finds_its_end_of_a_prefix(self):
        engine = windowed_engine(num_pages=200)
        (prompt,) = prompts_for([61])
        engine.generate([prompt], SamplingParams(max_tokens=1))

        def hits(tokens):
            engine.reset_stats()
            cold = windowed_engine(num_pages=200, prefix_cache=False)
            params = SamplingParams(max_tokens=6, temperature=0, logprobs=3, ignore_eos=True)
            outputs = engine.generate([tokens], params)
            assert everything(outputs) == everything(cold.generate([tokens], params))
            engine.check_invariants()
            return engine.stats().totals.num_hit_tokens

        assert hits([*prompt[:60], 1, 2, 3]) == 60
        # What was below the window is kept as long as there is room.
        assert hits([*prompt[:40], 1, 2, 3]) == 40
        # Pages that only the window needs go one by one; the others are found up to there.
        cache = engine._live.pipeline.scheduler.cache
        pool = engine._live.pipeline.table.pool
        root = cache.root(None)
        lost = cache.match(root, prompt, 4).pages(60)[1][-2]
        cache.release_root(root)
        pool.forget(lost)
        cache._on_evict(lost)
        assert hits([*prompt[:60], 4, 4, 4]) == 13 * 4
        assert hits([*prompt[:60], 5, 5, 5]) == 60, "it was computed again"

    def test_forks_at_any_time(self):
        """What a fork sees is there, though steps ahead of what it knows were planned."""
        prompt = prompts_for([21])[0]
        params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
        want = windowed_engine().generate([prompt], params)[0].outputs[0].token_ids
        engine = windowed_engine(max_num_seqs=30)
        parent = engine.add_request(prompt, params)
        done, started = {}, False
        while engine.has_unfinished_requests:
            for output in engine.step():
                done[output.request_id] = output.outputs[0].token_ids
            engine.check_invariants()
            generated = engine.stats().totals.num_generated_tokens
            if parent not in done and (started or generated):
                started = True
                engine.fork(parent)
        assert len(done) > 20
        assert all(token_ids == want for token_ids in done.values())

    @pytest.mark.parametrize("preemption", ["recompute", "swap"])
    def test_recorded_steps_run_again(self, tmp_path, preemption):
        path = tmp_path / "steps.jsonl"
        engine = windowed_engine(
            record_steps=str(path), num_pages=60, max_model_len=64, preemption=preemption
        )
        prompts = prompts_for((3, 20, 9, 40, 12, 30))
        params = [drawn(i, n=3 if i == 2 else 1, max_tokens=20) for i in range(6)]
        outputs = engine.generate(prompts, params)
        assert engine.stats().totals.num_preemptions > 0
        header = read_header(path)
        assert header.num_groups == 2
        config = dataclasses.replace(engine.config, record_steps=None)
        plan = memory.plan_pool(config, windowed(), "xla")
        runner = runner_of(
            config, windowed(), tiny_params(), plan, backend="xla",
            num_host_pages=header.num_host_pages,
        )  # fmt: skip
        found = collections.defaultdict(dict)
        for step, outcome in replay(read_steps(path), runner, engine._buckets):
            for slot, row in enumerate(step.samples.rows):
                place = step.rows.starts[row] + step.samples.offsets[slot]
                key = int(step.rows.keys[row][0]), step.samples.draws[slot].sample_index
                found[key][place] = outcome.tokens[slot]
        for index, output in enumerate(outputs):
            for number, sample in enumerate(output.outputs):
                own = found[index, number]
                tokens = [own[place] for place in sorted(own)]
                assert tokens[: len(sample.token_ids)] == sample.token_ids

    def test_the_map_of_pages_says_whose_they_are(self):
        engine = windowed_engine(num_pages=60)
        engine.add_request(prompts_for([30])[0], SamplingParams(max_tokens=40, ignore_eos=True))
        for _ in range(12):
            engine.step()
        snapshot = engine.pool_snapshot()
        assert snapshot.windows == (None, 12)
        owned = [page for page in snapshot.pages if page.owners]
        assert {page.owners for page in owned} == {("0#0",)}
        counts = collections.Counter(page.group for page in owned)
        assert counts[0] == 11 and counts[1] in (3, 4)
        assert draw(snapshot, width=200).splitlines()[-1] == (
            "11 pages of a group of layers that see all tokens; "
            f"{counts[1]} pages of a group of layers that see 12 tokens"
        )

    def test_the_pool_has_the_layers_of_a_group(self):
        plan = memory.plan_pool(EngineConfig(num_pages=9, page_size=4), windowed(), "xla")
        assert plan.shape == (1, 9, 2, 4, 32)
        assert (plan.kinds, plan.num_groups) == ((GroupKind(None, 1), GroupKind(12, 1)), 2)
        alike = memory.plan_pool(EngineConfig(num_pages=9, page_size=4), TINY, "xla")
        assert alike.shape == (2, 9, 2, 4, 32)
        assert alike.page_bytes == 2 * plan.page_bytes
        # A pool that is as large as is of use: 64 sequences of 256 tokens, of which a window and
        # a step take part.
        most = memory.plan_pool(
            EngineConfig(page_size=4, max_num_batched_tokens=64), windowed(), "xla"
        )
        assert most.num_pages == 1 + 64 * (256 // 4 + 74 // 4 + 2)


def gaps_of(kinds, found, size, limit):
    """`Prefix.usable_tokens` by looking at every end."""
    ends = [e for e in range(limit + 1) if e % size == 0 or e == limit]
    usable = [0]
    for end in ends:
        if end > len(found) * size:
            continue
        needed = [
            (kind, place // size)
            for kind, each in enumerate(kinds)
            for place in range(first_seen(each.window, end), -(-end // size) * size)
        ]
        if all(found[index][kind] for kind, index in needed):
            usable.append(end)
    return max(usable)


@settings(deadline=None, max_examples=300)
@given(
    kinds=st.lists(
        st.builds(GroupKind, st.sampled_from([None, 1, 2, 5, 9]), st.just(1)),
        min_size=1,
        max_size=3,
    ),
    size=st.integers(1, 4),
    limit=st.integers(0, 40),
    data=st.data(),
)
def test_the_longest_usable_prefix(kinds, size, limit, data):
    count = data.draw(st.integers(0, 10))
    page = st.sampled_from([0, 3, 3, 3])
    found = [[data.draw(page) for _ in kinds] for _ in range(count)]
    prefix = Prefix(kinds, size, found)
    end = prefix.usable_tokens(limit)
    assert end == gaps_of(kinds, found, size, limit)
    for kind, pages in zip(kinds, prefix.pages(end), strict=True):
        assert len(pages) == -(-end // size)
        seen = first_seen(kind.window, end) // size
        assert not any(pages[:seen]) and all(pages[seen:])


def test_a_table_releases_by_hand():
    kinds = (GroupKind(None, 1), GroupKind(5, 2))
    table = PageTable(PagePool(40), 4, 9, kinds)
    seq = table.add()
    assert table.append(seq, 14) == []
    assert table.pool.num_used_pages == 4 * 3
    # A query at 13 sees 9 to 13: pages 0 and 1 go, and of page 2 the first cell is not needed.
    table.release_before(seq, 13)
    assert [table.pages(seq, group)[:2] == (0, 0) for group in range(3)] == [False, True, True]
    assert table.pool.num_used_pages == 4 + 2 * 2
    assert table.num_live_cells == 14 + 2 * (14 - 9)
    with pytest.raises(ValueError, match="released 2 pages of 4, of which a window of 5 sees some"):
        table.fork(seq, 11)
    child = table.fork(seq, 12)
    assert table.pages(child, 1) == table.pages(seq, 1)[:3]
    # A page for each group is new, and the last one of each is copied.
    assert table.pages_needed(table.fork(seq), 3) == 3 + 3
    copies = table.append(seq, 1)
    assert len(copies) == 3
    table.check_invariants()
