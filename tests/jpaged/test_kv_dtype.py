# SPDX-License-Identifier: Apache-2.0
"""Engines whose pages have a dtype of their own: more sequences in the same memory."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.device.kv_scales import calibrate, read_kv_scales, write_kv_scales
from jpaged.device.memory import FreeMemory, plan_pool
from jpaged.device.replay import replay
from jpaged.host.step_log import read_header, read_steps
from jpaged.models.decoder import Decoder
from jpaged.models.shapes import SHAPES
from jpaged.placement import decoder_of, read_model, runner_of
from jpaged.planning import make_plan, memory_of
from tests.jpaged.exact import EXACT, drawn, everything
from tests.jpaged.tiny import TINY, prompts_of, tiny_engine, tiny_params, windowed
from tests.models.test_kv_scales import named, stored

# Layers that see 12 tokens and layers that see all, each with pages of their own.
WINDOWED = windowed(12)
PROMPTS = [[*prompts_of([12])[0], *tail] for tail in prompts_of([1, 9, 30, 14, 20])]
CROWD = [
    *(drawn(seed, max_tokens=20) for seed in range(3)),
    drawn(5, n=3, max_tokens=20),
    SamplingParams(max_tokens=16, beam_width=3, n=3, logprobs=2),
]


class TestMemory:
    @pytest.mark.parametrize(
        ("platform", "times"), [("gpu", 2), ("cpu", 4)], ids=["bfloat16", "float32"]
    )
    @pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
    def test_the_same_bytes_hold_more_pages(self, platform, times, kv_dtype):
        free = FreeMemory(num_bytes=2**22, name="free", platform=platform)
        plain = plan_pool(EngineConfig(), TINY, "xla", free)
        plan = plan_pool(EngineConfig(kv_dtype=kv_dtype), TINY, "xla", free)
        assert plan.num_pages == times * plain.num_pages
        assert plan.page_bytes * times == plain.page_bytes == 16 * 2 * 2 * 32 * 2 * times // 2
        assert plan.num_host_pages(EngineConfig(swap_bytes=2**20)) == 2**20 // plan.page_bytes

    def test_plans_count_them(self):
        asked = dict(device=memory_of("h100"), prompt_len=1000, output_len=300)
        model, small = SHAPES["llama-3.2-1b"], EngineConfig(memory_fraction=0.02)
        plain = make_plan(model, small, **asked)
        plan = make_plan(model, dataclasses.replace(small, kv_dtype="int8"), **asked)
        assert (plain.kv_dtype, plan.kv_dtype) == ("bfloat16", "int8")
        # 16 layers, 8 heads of 64 lanes, keys and values.
        assert plan.token_bytes * 2 == plain.token_bytes == 16 * 8 * 128 * 2
        assert plan.num_pages - 2 * plain.num_pages in (0, 1)
        assert plan.seqs_at_end - 2 * plain.seqs_at_end in (0, 1)
        # It is among what helps where pages do not suffice.
        assert plain.problems and f"--kv_dtype=int8 ({plan.num_pages - 1:,} pages)" not in (
            plain.changes
        )
        enough = dataclasses.replace(small, max_model_len=plain.longest + 1)
        (change,) = (c for c in make_plan(model, enough, **asked).changes if "kv_dtype" in c)
        assert change == f"--kv_dtype=int8 ({plan.num_pages - 1:,} pages)"

    def test_engines_have_them(self, monkeypatch):
        """A quarter of 256 KiB: 16 pages of float32, 64 of int8."""
        available = psutil.virtual_memory()._replace(available=2**18)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
        sizes = dict(page_size=16, max_num_seqs=40, max_num_batched_tokens=64, swap_bytes=0)
        engines = [tiny_engine(kv_dtype=name, **sizes) for name in (None, "int8")]
        assert [engine.stats().num_usable_pages + 1 for engine in engines] == [8, 32]
        assert engines[0]._runner._kv_pages.nbytes == engines[1]._runner._kv_pages.nbytes == 2**16


class TestSchedules:
    """What comes out does not depend on the schedule, in pages of eight bits too."""

    @staticmethod
    def engine(kv_dtype, **config):
        config = dict(max_model_len=96, kv_dtype=kv_dtype) | EXACT | config
        return Engine(WINDOWED, tiny_params(), EngineConfig(**config))

    @pytest.mark.parametrize(
        ("kv_dtype", "preemption"),
        [
            ("int8", "swap"),
            *(
                pytest.param(*case, marks=pytest.mark.nightly)
                for case in (
                    ("int8", "recompute"),
                    ("float8_e4m3fn", "swap"),
                    ("float8_e4m3fn", "recompute"),
                )
            ),
        ],
    )
    def test_no_output_changes(self, kv_dtype, preemption):
        roomy = self.engine(kv_dtype)
        assert roomy.stats().num_groups == 2
        want = everything(roomy.generate(PROMPTS, CROWD))
        assert roomy.stats().totals.num_page_copies > 0
        # Known prefixes, found.
        assert everything(roomy.generate(PROMPTS, CROWD)) == want
        assert roomy.stats().totals.num_hit_tokens > 100
        tight = self.engine(kv_dtype, num_pages=26, preemption=preemption)
        assert everything(tight.generate(PROMPTS, CROWD)) == want
        totals = tight.stats().totals
        assert totals.num_preemptions > 0
        assert (totals.num_swapped_pages > 0) == (preemption == "swap")
        tight.check_invariants()

    @pytest.mark.nightly
    def test_recorded_steps_give_their_tokens_again(self, tmp_path):
        path = tmp_path / "steps.jsonl"
        sizes = dict(num_pages=26, preemption="swap")
        engine = self.engine("int8", **sizes, record_steps=str(path))
        want = everything(engine.generate(PROMPTS, CROWD))
        plain = everything(self.engine(None).generate(PROMPTS, CROWD))
        assert [c[0] for c in plain[0]] != [c[0] for c in want[0]], "nothing was rounded"
        config = self.engine("int8", **sizes).config
        runner = runner_of(
            config, WINDOWED, tiny_params(), plan_pool(config, WINDOWED, "xla"), backend="xla",
            num_host_pages=read_header(path).num_host_pages,
        )  # fmt: skip
        found = {}
        for step, outcome in replay(read_steps(path), runner, engine._buckets):
            for slot, row in enumerate(step.samples.rows):
                if step.rows.keys[row][0] == "1":
                    place = step.rows.starts[row] + step.samples.offsets[slot]
                    found[place] = outcome.tokens[slot]
        tokens = [found[place] for place in sorted(found)]
        assert tokens[: len(want[1][0][0])] == want[1][0][0]

    def test_chunks_of_a_prompt_see_what_later_steps_see(self):
        """Greedy, and of other padded shapes: the last bits of logits may differ."""
        params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        outputs = [
            everything(
                self.engine("int8", deterministic=False, **sizes).generate(PROMPTS[2:], params)
            )
            for sizes in (dict(max_num_batched_tokens=9), dict(page_size=16))
        ]
        assert outputs[0] == outputs[1]


class TestScales:
    def test_calibration_finds_the_largest(self):
        """Beside what lies in float32 pages after a step by hand, with page 0 left aside."""
        (prompt,) = prompts_of([37])
        decoder = Decoder(TINY, backend="xla")
        options = dict(page_size=8, pool_dtype=np.dtype(np.float32))
        scales = calibrate(decoder, tiny_params(), [prompt, prompt[:3]], "int8", **options)
        engine = tiny_engine(page_size=8, num_pages=20)
        engine.generate([[*prompt]], SamplingParams(max_tokens=1))
        pages = np.asarray(engine._runner._kv_pages)[:, 1:]
        largest = np.abs(pages.reshape(2, -1, 2, 16)).max(axis=(1, 3))
        np.testing.assert_allclose(scales, largest / 127, rtol=1e-5)
        floats = calibrate(decoder, tiny_params(), [prompt], "float8_e4m3fn", **options)
        np.testing.assert_allclose(floats, largest / 224, rtol=1e-5)

    def test_a_file_gives_them_back(self, tmp_path):
        scales = np.array([[0.1, 3e-5], [1 / 3, 7.0]], np.float32)
        path = tmp_path / "scales.json"
        write_kv_scales(path, scales, "int8")
        np.testing.assert_array_equal(read_kv_scales(path, 2, "int8"), scales)
        engine = tiny_engine(kv_dtype="int8", kv_scales=str(path), num_pages=20)
        np.testing.assert_array_equal(engine._runner.params["kv_scales"], scales)
        # Those of a tree of parameters count where no file is given.
        params = tiny_params() | {"kv_scales": scales + 1}
        config = EngineConfig(max_model_len=64, kv_dtype="int8", num_pages=20)
        engine = Engine(TINY, params, config)
        np.testing.assert_array_equal(engine._runner.params["kv_scales"], scales + 1)
        # Other pages have none.
        config = dataclasses.replace(config, kv_dtype="float16")
        assert "kv_scales" not in Engine(TINY, params, config)._runner.params

    def test_a_checkpoint_has_its_own_for_float8(self, tmp_path):
        """Read without a file of scales; those of int8 are found here."""
        directory = stored(tmp_path, named("k_scale", "v_scale"))
        given = tmp_path / "scales.json"
        write_kv_scales(given, np.ones((2, 2)), "float8_e4m3fn")
        found = []
        for kv_dtype, path in (("float8_e4m3fn", None), ("float8_e4m3fn", given), ("int8", None)):
            config = EngineConfig(kv_dtype=kv_dtype, kv_scales=path and str(path), num_pages=20)
            model_config, params, *_ = read_model(directory, config)
            _, params = decoder_of(config, model_config, params, backend="xla", max_length=256)
            found.append(np.asarray(params["kv_scales"]))
        np.testing.assert_array_equal(found[0], [[0.5, 0.25], [3, 0.125]])
        np.testing.assert_array_equal(found[1], np.ones((2, 2)))
        assert found[2].max() < 0.1  # of numbers up to 1 or so, in 127 steps
        plain = EngineConfig(num_pages=20)
        assert "kv_scales" not in read_model(directory, plain)[1]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is not JSON: Expecting"),
            ("[1]", "is no object with kv_dtype and scales, as jpaged calibrate writes"),
            ('{"kv_dtype": "int8"}', "is no object with kv_dtype and scales"),
            (
                '{"kv_dtype": "float8_e4m3fn", "scales": [[1, 1], [1, 1]]}',
                "is for kv_dtype='float8_e4m3fn', not int8: calibrate for that",
            ),
            (
                '{"kv_dtype": "int8", "scales": [[1, 1], [1, 0]]}',
                "must have for each of 2 layers a pair of finite numbers above 0, of keys and of "
                "values, not an array of shape [2, 2] that begins [1.0, 1.0, 1.0, 0.0]",
            ),
            ('{"kv_dtype": "int8", "scales": [[1, 1]]}', "not an array of shape [1, 2]"),
            ('{"kv_dtype": "int8", "scales": [[1, 1], [1]]}', "not an array of shape [0]"),
            ('{"kv_dtype": "int8", "scales": [[1, 1], [1, NaN]]}', "shape [2, 2] that begins"),
        ],
    )
    def test_files_that_are_refused(self, text, message, tmp_path):
        path = tmp_path / "scales.json"
        path.write_text(text)
        with pytest.raises(ValueError) as e:
            tiny_engine(kv_dtype="int8", kv_scales=str(path))
        assert message in str(e.value) and "\n" not in str(e.value)

    def test_what_else_is_refused(self):
        for kv_dtype in (None, "float32"):
            with pytest.raises(ValueError, match="needs kv_dtype of int8 or float8_e4m3fn, not "):
                EngineConfig(kv_scales="scales.json", kv_dtype=kv_dtype)
        with pytest.raises(
            ValueError, match="kv_dtype='int4' must be 'float32', 'bfloat16', 'float16', "
        ):
            EngineConfig(kv_dtype="int4")
        with pytest.raises(FileNotFoundError, match=r"none\.json"):
            tiny_engine(kv_dtype="int8", kv_scales="none.json")
        params = tiny_params() | {"kv_scales": np.ones((3, 2), np.float32)}
        with pytest.raises(ValueError, match=r"kv_scales has shape \[3, 2\], expected \[2, 2\]"):
            Engine(TINY, params)
        broken = jax.tree.map(lambda leaf: leaf * jnp.inf, tiny_params())
        with pytest.raises(ValueError, match="keys or values of layer 0 are not finite while"):
            Engine(TINY, broken, EngineConfig(kv_dtype="int8", num_pages=20))
        with pytest.raises(ValueError, match="takes pages of float8_e4m3fn from compute capabil"):
            make_plan(TINY, EngineConfig(kv_dtype="float8_e4m3fn"), device=memory_of("a100"))


def test_a_saved_file_is_plain_json(tmp_path):
    path = tmp_path / "scales.json"
    write_kv_scales(path, np.array([[0.1, 0.2]]), "int8")
    assert json.loads(path.read_text()) == {"kv_dtype": "int8", "scales": [[0.1, 0.2]]}
