# SPDX-License-Identifier: Apache-2.0
"""Pages that are found again change what is computed, and nothing that comes out."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.host.page_pool import PagePool
from jpaged.host.prefix_cache import PrefixCache
from tests.jpaged.exact import EXACT, drawn, everything, run_steps, with_prefix
from tests.jpaged.tiny import TINY, prompts_of, tiny_engine, tiny_params, token_ids


class TestPrefixCache:
    def test_the_same_on_and_off_cold_and_warm(self):
        prompts = with_prefix([3, 17, 8, 1, 30])
        params = [drawn(seed) for seed in range(5)]
        off = tiny_engine(**EXACT, prefix_cache=False).generate(prompts, params)
        engine = tiny_engine(**EXACT)
        cold = engine.generate(prompts, params)
        hits = engine.stats().totals.num_hit_tokens
        warm = engine.generate(prompts, params)
        assert everything(cold) == everything(off) == everything(warm)
        # The first computes the 40 tokens, in two steps; what begins with the same waits for none.
        assert hits >= 3 * 40
        assert engine.stats().totals.num_hit_tokens - hits >= 5 * 40
        engine.check_invariants()

    def test_hits_by_hand(self):
        engine = tiny_engine(**EXACT)
        (prompt,) = prompts_of([40])
        engine.generate([prompt], drawn(max_tokens=1))
        engine.reset_stats()
        engine.generate([prompt], drawn(max_tokens=1))
        totals = engine.stats().totals
        # All five pages are known; the last token is computed again, in a copy of its page.
        assert (totals.num_lookup_tokens, totals.num_hit_tokens) == (40, 39)
        assert (totals.num_prefill_tokens, totals.num_page_copies) == (1, 1)
        engine.reset_stats()
        engine.generate([[*prompt[:20], (prompt[20] + 1) % TINY.vocab_size]], drawn(max_tokens=1))
        assert engine.stats().totals.num_hit_tokens == 16
        assert engine.stats().hit_rate == 16 / 21

    def test_an_answer_is_a_prefix_too(self):
        engine = tiny_engine(**EXACT)
        (prompt,) = prompts_of([10])
        (output,) = engine.generate([prompt], drawn(max_tokens=30))
        engine.reset_stats()
        again = prompt + output.outputs[0].token_ids + [1, 2, 3]
        engine.generate([again], drawn())
        # The last token of the answer was never attended to: 39 tokens fill four pages of 8.
        assert engine.stats().totals.num_hit_tokens == 32

    def test_off_finds_nothing(self):
        engine = tiny_engine(**EXACT, prefix_cache=False)
        engine.generate(prompts_of([40]), drawn())
        engine.generate(prompts_of([40]), drawn())
        assert engine.stats().totals.num_hit_tokens == 0
        assert engine.stats().num_cached_pages == 0

    def test_salts_keep_requests_apart(self):
        engine = tiny_engine(**EXACT)
        (prompt,) = prompts_of([24])
        hits = []
        for salt in ("a", "b", "a", None, None):
            engine.reset_stats()
            engine.add_request(prompt, drawn(), cache_salt=salt)
            run_steps(engine)
            hits.append(engine.stats().totals.num_hit_tokens)
        assert hits == [0, 0, 23, 0, 23]

    def test_what_is_kept_is_evicted_when_pages_are_needed(self):
        engine = tiny_engine(**EXACT, num_pages=14)
        prompts = prompts_of([40] * 12)
        params = [drawn(seed) for seed in range(12)]
        outputs = engine.generate(prompts, params)
        assert engine.stats().num_cached_pages > 0
        again = engine.generate(prompts, params)
        assert everything(outputs) == everything(again)
        roomy = tiny_engine(**EXACT).generate(prompts, params)
        assert everything(outputs) == everything(roomy)
        engine.check_invariants()

    def test_new_weights_need_new_pages(self):
        engine = tiny_engine(**EXACT)
        prompts = prompts_of([40])
        engine.generate(prompts, drawn())
        engine._runner.params = tiny_params(seed=1)
        engine.reset_prefix_cache()
        assert engine.stats().num_cached_pages == 0
        fresh = tiny_engine(**EXACT, prefix_cache=False)
        fresh._runner.params = tiny_params(seed=1)
        want = everything(fresh.generate(prompts, drawn()))
        assert everything(engine.generate(prompts, drawn())) == want

    def test_pages_in_use_cannot_be_forgotten(self):
        engine = tiny_engine(**EXACT)
        request_id = engine.add_request(prompts_of([20])[0], drawn())
        engine.step()
        with pytest.raises(RuntimeError, match="2 addressed pages are in use: finish or abort"):
            engine.reset_prefix_cache()
        engine.abort(request_id)
        engine.reset_prefix_cache()

    def test_pages_that_were_never_computed_are_not_found(self, monkeypatch):
        """A step that is planned but waits for a compilation is dropped with its last request."""
        engine = tiny_engine(page_size=8, max_num_batched_tokens=16)
        first, second = prompts_of([4, 40])
        want = tiny_engine(page_size=8).generate([second], drawn())
        one = engine.add_request(first, drawn())
        engine.step()
        two = engine.add_request(second, drawn())
        monkeypatch.setattr(engine._runner, "is_compiled", lambda batch: False)
        engine.step()
        assert engine._live.pipeline._planned is not None
        assert engine._live.by_id[two].sequences[0].num_addressed_pages
        engine.abort(one)
        engine.abort(two)
        monkeypatch.undo()
        assert token_ids(engine.generate([second], drawn())) == token_ids(want)
        engine.check_invariants()

    def test_an_error_in_a_step_forgets_all_pages(self, monkeypatch):
        engine = tiny_engine(**EXACT)
        (prompt,) = prompts_of([40])
        want = everything(tiny_engine(**EXACT).generate([prompt], drawn()))

        def fail(*_):
            raise RuntimeError("device lost")

        monkeypatch.setattr(engine._runner, "run", fail)
        with pytest.raises(RuntimeError, match="device lost"):
            engine.generate([prompt], drawn())
        monkeypatch.undo()
        assert engine.stats().num_cached_pages == 0
        assert everything(engine.generate([prompt], drawn())) == want
        assert engine.stats().totals.num_hit_tokens == 0


class TestSalts:
    def test_a_salt_a_request_leaves_nothing(self):
        engine = tiny_engine(**EXACT, num_pages=6)
        for number in range(40):
            engine.add_request(prompts_of([20])[0], drawn(max_tokens=1), cache_salt=f"user{number}")
            run_steps(engine)
            assert len(engine._live.pipeline.scheduler.cache._roots) <= 5
        engine.reset_prefix_cache()
        assert not engine._live.pipeline.scheduler.cache._roots

    def test_a_live_request_keeps_its_root_and_an_aborted_one_does_not(self):
        engine = tiny_engine(**EXACT)
        (prompt,) = prompts_of([5])  # less than a page
        first = engine.add_request(prompt, drawn(), cache_salt="a")
        engine.step()
        (fork,) = engine.fork(first)
        assert list(engine._live.pipeline.scheduler.cache._roots) == ["a"]
        engine.abort(first)
        assert list(engine._live.pipeline.scheduler.cache._roots) == ["a"]
        engine.check_invariants()
        engine.abort(fork)
        assert not engine._live.pipeline.scheduler.cache._roots
        engine.check_invariants()

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.data())
    def test_beside_a_model_that_looks_at_everything(self, data):
        """Salts that have a root are those of live requests, and of prefixes that begin there."""
        pool = PagePool(7)
        cache = PrefixCache(pool)
        live: list[tuple[str, int, list[int]]] = []  # salt, root, pages in use
        nodes: dict[int, int] = {}  # of pages
        firsts: dict[int, str] = {}  # addressed first pages, with their salt
        pool_evicts = pool.on_evict

        def on_evict(page):
            firsts.pop(page, None)
            pool_evicts(page)

        pool.on_evict = on_evict
        for _ in range(data.draw(st.integers(1, 25))):
            action = data.draw(st.sampled_from(("begin", "grow", "end", "clear")))
            if action == "begin":
                salt = data.draw(st.sampled_from("abc"))
                live.append((salt, cache.root(salt), []))
            elif action == "grow" and live and pool.num_free_pages:
                salt, root, pages = data.draw(st.sampled_from(live))
                (page,) = pool.allocate(1)
                before = nodes[pages[-1]] if pages else root
                node = cache.add(before, (data.draw(st.integers(0, 1)),), [page])
                (known,) = cache.pages_of(node)
                nodes[known] = node
                if known != page:
                    pool.share([known])
                    pool.release(page)
                elif not pages:
                    firsts[page] = salt
                pages.append(known)
            elif action == "end" and live:
                salt, root, pages = live.pop(data.draw(st.integers(0, len(live) - 1)))
                for page in reversed(pages):
                    pool.release(page)
                cache.release_root(root)
            elif action == "clear" and not any(pages for _, _, pages in live):
                cache.clear()
                firsts.clear()
                # Live requests keep roots that nobody else gets.
                live = [(salt, root, pages) for salt, root, pages in live]
                gone = {root for _, root, _ in live}
                assert not gone & set(cache._roots.values())
                for _, root, _ in live:
                    cache.release_root(root)
                live.clear()
            cache.check_invariants()
            cache.check_roots(root for _, root, _ in live)
            assert set(cache._roots) == {salt for salt, *_ in live} | set(firsts.values())
            of_salt = collections.defaultdict(set)
            for salt, root, _ in live:
                of_salt[salt].add(root)
            assert all(len(roots) == 1 for roots in of_salt.values())
