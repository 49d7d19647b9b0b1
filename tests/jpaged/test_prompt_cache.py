# SPDX-License-Identifier: Apache-2.0
"""Pages that are kept on disk change what is computed, and nothing that comes out."""

import collections
import functools
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged import EngineConfig
from jpaged.host import page_files
from jpaged.models.merged import merge_projections
from tests.jpaged.exact import EXACT, drawn, everything, run_steps, with_prefix
from tests.jpaged.tiny import TINY, prompts_of, tiny_engine, tiny_params, windowed

NIGHTLY = pytest.mark.nightly
HEAD = 40  # tokens that prompts begin with alike: 5 pages


@pytest.fixture
def kept(tmp_path):
    """Makes engines that share a directory."""
    return functools.partial(
        tiny_engine, **EXACT, prompt_cache=str(tmp_path), prompt_cache_min_pages=2
    )


@functools.cache
def without(kind="full", **params):
    """The prompts, and what they come to where nothing is kept or shared."""
    prompts = with_prefix([3, 17, 8], HEAD)
    own = [drawn(seed, **params) for seed in range(3)]
    model = {"full": TINY, "windows": windowed()}[kind]
    engine = tiny_engine(model_config=model, **EXACT, prefix_cache=False)
    return prompts, own, everything(engine.generate(prompts, own))


def found(engine):
    """Tokens that were found on disk since the last call."""
    count = engine.stats().totals.num_disk_tokens
    engine.reset_stats()
    return count


def pages_in(tmp_path):
    return sorted(pathlib.Path(tmp_path).rglob("*.kv"))


def settle(engine):
    """Waits for what was begun to be written, as the end of Python does."""
    engine._prompts.flush()


class TestRuns:
    def test_the_same_with_and_without(self, kept, tmp_path):
        prompts, params, want = without()
        first = kept()
        assert everything(first.generate(prompts, params)) == want and found(first) == 0
        settle(first)
        # What the second and third began with; what each has alone was seen once.
        assert len(pages_in(tmp_path)) == HEAD // 8
        second = kept()
        assert everything(second.generate(prompts, params)) == want
        # The first reads them; the others find them in memory.
        assert found(second) == HEAD
        assert everything(second.generate(prompts, params)) == want and found(second) == 0
        second.check_invariants()

    def test_a_prompt_alone_is_kept_at_the_end(self, kept, tmp_path):
        prompts, params, want = without()
        first = kept()
        first.generate(prompts[1:2], params[1:2])
        settle(first)
        assert not pages_in(tmp_path)
        first.save_prompts()
        # 57 tokens are 7 pages; the answer's are not kept.
        assert len(pages_in(tmp_path)) == 7
        second = kept()
        assert everything(second.generate(prompts[1:2], params[1:2])) == want[1:2]
        assert found(second) == 56
        first.save_prompts()
        assert len(pages_in(tmp_path)) == 7

    @NIGHTLY
    def test_a_whole_prompt_leaves_a_page_to_compute(self, kept):
        """The last token is computed in any case, and its page with it."""
        (prompt,) = prompts_of([HEAD])
        want = everything(tiny_engine(**EXACT).generate([prompt], drawn()))
        first = kept()
        first.generate([prompt], drawn())
        first.save_prompts()
        second = kept()
        assert everything(second.generate([prompt], drawn())) == want and found(second) == 32

    @pytest.mark.parametrize(("least", "pages"), [(5, 5), pytest.param(6, 0, marks=NIGHTLY)])
    def test_short_prefixes_are_not_worth_it(self, kept, tmp_path, least, pages):
        prompts, params, _ = without()
        engine = kept(prompt_cache_min_pages=least)
        engine.generate(prompts, params)
        settle(engine)
        assert len(pages_in(tmp_path)) == pages
        engine = kept()
        engine.generate(prompts, params)
        settle(engine)
        engine = kept(prompt_cache_min_pages=least)
        # The first two have 43 and 57 tokens.
        engine.generate(prompts[:1], params[:1])
        assert found(engine) == (HEAD if least == 5 else 0)

    def test_what_one_adds_must_be_worth_it_too(self, kept, tmp_path):
        prompts, params, _ = without()
        engine = kept()
        engine.generate(prompts, params)
        engine.save_prompts()
        # Behind the 5 pages the second has 2 of its own, the others one or none.
        assert len(pages_in(tmp_path)) == 5 + 2

    def test_memory_goes_on_where_it_ends(self, kept):
        prompts, params, want = without()
        first = kept()
        first.generate(prompts[1:2], params[1:2])
        first.save_prompts()
        second = kept()
        second.generate([prompts[1][:24]], drawn())
        assert found(second) == 16
        assert everything(second.generate(prompts[1:2], params[1:2])) == want[1:2]
        assert found(second) == 56 - 24
        second.check_invariants()

    @pytest.mark.parametrize(
        "params",
        [pytest.param({"n": 3}, marks=NIGHTLY), {"beam_width": 3, "temperature": 1.0}],
    )
    def test_samples_and_beams(self, kept, params):
        params = dict(params, logprobs=None)
        prompts, own, want = without(**params)
        for expected in (0, HEAD):
            engine = kept()
            outputs = engine.generate(prompts, own)
            assert everything(outputs) == want and found(engine) == expected
            engine.check_invariants()
            settle(engine)

    def test_salts_stay_in_memory(self, kept, tmp_path):
        prompts, params, want = without()
        for salt, expected in ((None, 0), ("a", 0), (None, HEAD)):
            engine = kept()
            ids = [
                engine.add_request(p, own, cache_salt=salt)
                for p, own in zip(prompts, params, strict=True)
            ]
            done = run_steps(engine)
            assert everything(done[request_id] for request_id in ids) == want
            assert found(engine) == expected
            if salt is not None:
                engine.save_prompts()
                assert len(pages_in(tmp_path)) == HEAD // 8
            settle(engine)

    @NIGHTLY
    def test_preempted_requests_were_not_seen_twice(self, kept, tmp_path):
        prompts = prompts_of([24] * 6)
        params = [drawn(seed, max_tokens=40) for seed in range(6)]
        want = everything(tiny_engine(**EXACT, prefix_cache=False).generate(prompts, params))
        engine = kept(num_pages=24, preemption="recompute")
        assert everything(engine.generate(prompts, params)) == want
        assert engine.stats().totals.num_preemptions and engine.stats().totals.num_hit_tokens
        settle(engine)
        assert not pages_in(tmp_path)

    @pytest.mark.parametrize("kv_dtype", [pytest.param("bfloat16", marks=NIGHTLY), "int8"])
    def test_pages_of_other_dtypes(self, kept, kv_dtype):
        prompts, params, _ = without()
        engine = kept(kv_dtype=kv_dtype)
        want = everything(engine.generate(prompts, params))
        settle(engine)
        engine = kept(kv_dtype=kv_dtype)
        assert everything(engine.generate(prompts, params)) == want and found(engine) == HEAD

    @NIGHTLY
    def test_all_that_is_compiled_was_planned(self, kept):
        prompts, params, want = without(logprobs=None)
        for _ in range(2):
            engine = kept(strict_shapes=True, swap_bytes=0)
            assert everything(engine.generate(prompts, params)) == want
            engine.save_prompts()
            assert engine.stats().num_unplanned_compilations == 0
            compiled = engine.stats().num_compilations
        # Of the second prompt, 2 pages more, as the run before said that it ended.
        assert found(engine) == HEAD + 16
        engine.generate(prompts, params)
        assert engine.stats().num_compilations == compiled


class TestWindows:
    """Two groups of layers, one of which sees 12 tokens: two pages of 8, or three."""

    def test_the_same_with_and_without(self, kept, tmp_path):
        prompts, params, want = without("windows")
        for expected in (0, HEAD):
            engine = kept(model_config=windowed())
            assert everything(engine.generate(prompts, params)) == want
            assert found(engine) == expected
            engine.check_invariants()
            settle(engine)
        by_kind = collections.Counter(path.name[65:] for path in pages_in(tmp_path))
        assert by_kind == {"0.kv": 5, "1.kv": 5}

    @pytest.mark.parametrize(
        ("lost", "expected"),
        [
            *(((1, 4), 32), ((0, 3), 24)),
            *(pytest.param((1, i), end, marks=NIGHTLY) for i, end in ((0, 40), (2, 40), (3, 24))),
            pytest.param((0, 0), 0, marks=NIGHTLY),
        ],
    )
    def test_what_is_lost(self, kept, tmp_path, lost, expected):
        """A window needs its last pages only, and another end where one of them is missing."""
        prompts, params, want = without("windows")
        first = kept(model_config=windowed())
        first.generate(prompts, params)
        settle(first)
        kind, index = lost
        root = first._prompts._context
        address = list(page_files.page_addresses(root, prompts[0], 8))[index]
        pathlib.Path(first._prompts._files._file(address, kind)).unlink()
        engine = kept(model_config=windowed())
        assert everything(engine.generate(prompts[:1], params[:1])) == want[:1]
        assert found(engine) == expected
        engine.check_invariants()

    @NIGHTLY
    def test_of_every_layer(self, kept):
        """There is no page that every end needs."""
        (layer,) = {windowed().pattern[0]}
        model = windowed().__class__(**{**vars(TINY), "pattern": (layer,)})
        prompts, params, _ = without()
        off = tiny_engine(model_config=model, **EXACT, prefix_cache=False)
        want = everything(off.generate(prompts, params))
        first = kept(model_config=model)
        first.generate(prompts, params)
        settle(first)
        for address in list(page_files.page_addresses(first._prompts._context, prompts[0], 8))[:3]:
            pathlib.Path(first._prompts._files._file(address, 0)).unlink()
        engine = kept(model_config=model)
        assert everything(engine.generate(prompts, params)) == want and found(engine) == HEAD
        engine.check_invariants()


class TestTrouble:
    @pytest.mark.parametrize(
        "at", [pytest.param(0, marks=NIGHTLY), 2, pytest.param(4, marks=NIGHTLY)]
    )
    def test_a_damaged_page_is_computed_again(self, kept, tmp_path, at, caplog):
        prompts, params, want = without()
        first = kept()
        first.generate(prompts, params)
        settle(first)
        address = list(page_files.page_addresses(first._prompts._context, prompts[0], 8))[at]
        path = pathlib.Path(first._prompts._files._file(address, 0))
        content = bytearray(path.read_bytes())
        content[200] ^= 4
        path.write_bytes(content)
        engine = kept()
        assert everything(engine.generate(prompts, params)) == want
        assert found(engine) == at * 8
        assert f"{path} is damaged" in caplog.text
        engine.check_invariants()
        settle(engine)
        # The rest is there, so that it is whole again.
        engine = kept()
        assert everything(engine.generate(prompts, params)) == want and found(engine) == HEAD

    def test_a_full_disk(self, kept, tmp_path, monkeypatch, caplog):
        prompts, params, want = without()
        engine = kept()

        def full(fd, data):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(page_files.os, "write", full)
            assert everything(engine.generate(prompts, params)) == want
            engine.save_prompts()
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        assert caplog.text.count("No space left on device") == 1
        assert everything(engine.generate(prompts, params)) == want
        engine.save_prompts()
        assert len(pages_in(tmp_path)) >= HEAD // 8

    def test_a_device_without_room_for_copies(self, kept, tmp_path, monkeypatch, caplog):
        prompts, params, want = without()
        engine = kept()

        def no_memory(pages):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

        monkeypatch.setattr(engine._runner, "read_pages", no_memory)
        assert everything(engine.generate(prompts, params)) == want
        engine.save_prompts()
        assert not pages_in(tmp_path) and "prompts are not saved" in caplog.text
        assert everything(engine.generate(prompts, params)) == want

    def test_what_is_not_finite_is_not_kept(self, kept, tmp_path):
        prompts, params, _ = without()
        engine = kept()
        read_pages = engine._runner.read_pages

        def damaged(pages):
            content = read_pages(pages).copy()
            content[2, 0, 0, 0, 0] = np.nan
            return content

        engine._runner.read_pages = damaged
        engine.generate(prompts, params)
        settle(engine)
        assert len(pages_in(tmp_path)) == HEAD // 8 - 1
        engine = kept()
        engine.generate(prompts, params)
        assert found(engine) == 16

    @pytest.mark.parametrize("files", [3, 0.5])
    def test_no_more_than_may_be(self, kept, tmp_path, files):
        prompts, params, want = without()
        size = 24 + 32 + 4 * 8 + 4096 + 32
        for _ in range(2):
            engine = kept(prompt_cache_bytes=int(files * size))
            assert everything(engine.generate(prompts, params)) == want
            engine.save_prompts()
            assert len(pages_in(tmp_path)) == int(files)
        # What a sequence begins with stays.
        assert found(engine) == 8 * int(files)

    @pytest.mark.parametrize(
        "num_pages", [11, *(pytest.param(count, marks=NIGHTLY) for count in (14, 20))]
    )
    def test_a_pool_with_little_room(self, kept, num_pages):
        prompts, params, want = without()
        first = kept()
        first.generate(prompts, params)
        first.save_prompts()
        engine = kept(num_pages=num_pages)
        ids = [engine.add_request(p, own) for p, own in zip(prompts, params, strict=True)]
        done = run_steps(engine)
        assert everything(done[request_id] for request_id in ids) == want
        assert found(engine) >= HEAD

    def test_settings_that_exclude_it(self, tmp_path):
        with pytest.raises(ValueError, match="needs the prefix cache"):
            EngineConfig(prompt_cache="x", prefix_cache=False)
        with pytest.raises(ValueError, match="needs the prefix cache"):
            EngineConfig(prompt_cache="x", reservation="max")
        with pytest.raises(ValueError, match="record_steps exclude each other"):
            EngineConfig(prompt_cache="x", record_steps="y")
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="name another directory"):
            tiny_engine(prompt_cache=str(tmp_path / "file"))

    def test_saving_waits_for_the_end(self, kept):
        tiny_engine(**EXACT).save_prompts()  # nothing to do
        engine = kept()
        engine.add_request(prompts_of([30])[0], drawn())
        engine.step()
        with pytest.raises(RuntimeError, match="1 requests are live: save when they have ended"):
            engine.save_prompts()
        run_steps(engine)
        engine.save_prompts()


class TestContext:
    def test_other_weights_have_other_pages(self, kept):
        prompts, params, want = without()
        first = kept()
        first.generate(prompts, params)
        settle(first)
        engine = kept()
        engine._runner.params = tiny_params(seed=1)
        engine.reset_prefix_cache()
        other = tiny_engine(**EXACT, prefix_cache=False)
        other._runner.params = tiny_params(seed=1)
        assert everything(engine.generate(prompts, params)) == everything(
            other.generate(prompts, params)
        )
        assert found(engine) == 0
        settle(engine)
        # And both are there.
        engine._runner.params = merge_projections(tiny_params())  # as the first engine has them
        engine.reset_prefix_cache()
        assert everything(engine.generate(prompts, params)) == want and found(engine) == HEAD


@NIGHTLY
@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 45), st.integers(0, 2)), max_size=5),
        min_size=2,
        max_size=5,
    ),
    st.sampled_from([16, 30, None]),
    st.booleans(),
    st.integers(0, 100),
)
def test_any_runs(tmp_path_factory, runs, num_pages, windows, lost):
    """Prompts that are the beginnings of three, in processes one after the other."""
    tmp_path = tmp_path_factory.mktemp("prompts")
    model = windowed() if windows else TINY
    sources = with_prefix([30, 30, 30], 20)
    off = tiny_engine(model_config=model, **EXACT, prefix_cache=False)
    for run in runs:
        prompts = [sources[source][:length] for source, length, _ in run]
        params = [drawn(seed) for _, _, seed in run]
        engine = tiny_engine(
            model_config=model, **EXACT, num_pages=num_pages, prompt_cache=str(tmp_path),
            prompt_cache_min_pages=1,
        )  # fmt: skip
        outputs = engine.generate(prompts, params)
        assert everything(outputs) == everything(off.generate(prompts, params))
        engine.check_invariants()
        engine.save_prompts()
        pages = pages_in(tmp_path)
        if pages and lost % 3 == 0:
            pages[lost % len(pages)].unlink()
