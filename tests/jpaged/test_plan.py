# SPDX-License-Identifier: Apache-2.0
"""Plans against numbers worked by hand, and against what engines and schedulers do."""

import dataclasses
import re

import jax
import numpy as np
import psutil
import pytest
from jax.sharding import AxisType, Mesh

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.device.compiled_step import StepFacts
from jpaged.device.runner import ModelRunner
from jpaged.host.admission import RequestTooLongError
from jpaged.models import checkpoint, sharding
from jpaged.models.config_json import config_from_hf, config_to_hf
from jpaged.models.decoder import Decoder, stack_layers
from jpaged.models.shapes import SHAPES
from jpaged.planning import (
    CHIPS,
    DeviceMemory,
    compile_steps,
    make_plan,
    memory_of,
    step_problems,
)
from jpaged.simulation.lengths import parse_lengths
from jpaged.simulation.serving import run_scheduler
from jpaged.simulation.workload import make_workload
from tests.jpaged.tiny import TINY, tiny_params

GEMMA3_1B = config_from_hf(
    {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "max_position_embeddings": 32768,
        "vocab_size": 262144,
    }
)
GPT_OSS_20B = config_from_hf(
    {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_hidden_layers": 24,
        "num_local_experts": 32,
    }
)


GIB = 2**30


def gpu(gib):
    return DeviceMemory("gpu", int(gib * GIB), "of a test")


def plan(model, device, num_devices=1, prompt_len=None, output_len=None, **config):
    return make_plan(
        model, EngineConfig(**config), device=device, num_devices=num_devices,
        prompt_len=prompt_len, output_len=output_len,
    )  # fmt: skip


class TestByHand:
    def test_llama_3_2_1b(self):
        found = plan(SHAPES["llama-3.2-1b"], gpu(10), prompt_len=1000, output_len=25)
        assert (found.dtype, found.kv_dtype) == ("bfloat16", "bfloat16")
        assert found.weight_bytes == 2 * 1_235_814_400
        # 16 layers of 8 heads of 64 lanes, keys and values of 2 bytes.
        assert found.token_bytes == 16 * 8 * 2 * 64 * 2 == 32 * 1024
        (kind,) = found.kinds
        assert (kind.window, kind.num_layers, kind.num_groups) == (None, 16, 1)
        # A quarter of what is left: (10737418240 - 2471628800) / 4 bytes, in pages of 524288.
        assert (found.page_bytes, found.num_pages) == (524_288, 3941)
        assert found.pool_bytes == 3941 * 524_288
        # 1,024 cells are 64 pages, as the last token has none; 1,012 half-way are 64 too.
        assert (found.pages_at_end, found.pages_half_way) == (64, 64)
        assert found.seqs_at_end == 3940 // 64 == 61
        # 3,940 pages of 16 cells, and a token more.
        assert found.longest == 3940 * 16 + 1
        (problem,) = found.problems
        assert "takes 8192 pages, and the pool has 3940" in problem and "63041 tokens" in problem

    def test_gemma_3_1b_by_what_its_layers_see(self):
        found = plan(GEMMA3_1B, memory_of("v5e"), prompt_len=4000, output_len=97)
        assert found.num_params == 999_885_952
        # 4 of 26 layers see everything; a head of 256 lanes takes 1,024 bytes a layer and token.
        # Groups of two layers: 2 and 11.
        assert [dataclasses.astuple(kind) for kind in found.kinds] == [
            (None, 4, 2, 4 * 1024),
            (512, 22, 11, 22 * 1024),
        ]
        assert found.page_bytes == 2 * 16 * 1024
        # 4,096 cells are 256 pages; the 512 tokens that a query sees lie in 33 at most.
        assert found.pages_at_end == 2 * 256 + 11 * 33
        assert not found.problems

    def test_gpt_oss_20b_by_what_its_layers_see(self):
        found = plan(GPT_OSS_20B, gpu(200), max_model_len=4096)
        h, experts = 2880, 32
        attention = h * 64 * 64 * 2 + 64 * 64 + h + 2 * (h * 8 * 64 + 8 * 64) + 64
        mlp = experts * (3 * h * h + 3 * h) + (h + 1) * experts
        assert found.num_params == 2 * 201_088 * h + h + 24 * (attention + mlp + 2 * h)
        # 8 heads of 64 lanes are 2,048 bytes a layer and token.
        assert [dataclasses.astuple(kind) for kind in found.kinds] == [
            (None, 12, 1, 12 * 2048),
            (128, 12, 1, 12 * 2048),
        ]

    def test_a_tpu_pads_narrow_cells(self):
        narrow = dataclasses.replace(TINY, max_position_embeddings=64)
        on_gpu, on_tpu = (
            plan(narrow, dataclasses.replace(gpu(1), platform=p)) for p in ("gpu", "tpu")
        )
        # 32 lanes of keys and values, which a TPU rounds up to 128.
        assert on_tpu.token_bytes == 4 * on_gpu.token_bytes == 2 * 2 * 128 * 2

    def test_what_a_chip_has(self):
        assert memory_of("v5e").num_bytes == 15.75 * GIB
        assert memory_of("h100").num_bytes == int(int(79.1 * GIB) * 0.75)
        assert memory_of("h100", 70).num_bytes == 70 * GIB
        assert memory_of("cpu").platform == "cpu"


FREE = GIB


@pytest.fixture
def one_gib(monkeypatch):
    """A machine on which as much is free, whatever is allocated."""
    available = psutil.virtual_memory()._replace(available=FREE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)


def windowed():
    kinds = ["sliding_attention", "full_attention"]
    fields = {"use_sliding_window": True, "sliding_window": 12, "layer_types": kinds}
    return config_from_hf(config_to_hf(TINY) | fields)


class TestBesideEngines:
    # Fewer pages than 8 sequences of 256 tokens could use, and as many as they can.
    @pytest.mark.parametrize("share", [0.00005, 0.9])
    @pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
    @pytest.mark.parametrize("model", [TINY, windowed()], ids=["alike", "windowed"])
    def test_an_engine_allocates_what_is_planned(
        self, model, scan, share, one_gib, tmp_path, monkeypatch
    ):
        settings = dict(
            max_model_len=None, page_size=4, memory_fraction=share, scan_layers=scan,
            swap_bytes_per_s=1e9, flops_per_s=1e9,
        )  # fmt: skip
        checkpoint.save_orbax(tmp_path, model, tiny_params())
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny_params()))
        before, held = jax.live_arrays(), []
        new_pages = ModelRunner._new_pages

        def weigh(runner):
            old = set(map(id, before))
            new = (leaf for leaf in jax.live_arrays() if id(leaf) not in old)
            # Of arrays that share a buffer, one.
            held.append(sum({leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in new}.values()))
            return new_pages(runner)

        monkeypatch.setattr(ModelRunner, "_new_pages", weigh)
        config = EngineConfig(max_num_seqs=8, **settings)
        engine = Engine.load(tmp_path, config)
        # The pool was planned when its weights were there already.
        found = make_plan(model, config, device=DeviceMemory("cpu", FREE + weights, "a test"))
        stats = engine.stats()
        assert held == [found.weight_bytes] == [weights]
        assert found.num_pages - 1 == stats.num_usable_pages
        assert found.page_bytes == stats.page_bytes
        assert found.pool_bytes == engine._runner._kv_pages.nbytes
        assert found.host_swap_bytes == engine._runner._host_pages.num_pages * stats.page_bytes
        # The longest request that it takes.
        longest = SamplingParams(max_tokens=found.longest - 5)
        engine.abort(engine.add_request([1] * 5, longest))
        if share == 0.9:
            assert found.longest == 256 and not found.problems
        else:
            assert found.longest < 256
            with pytest.raises(RequestTooLongError):
                engine.add_request([1] * 5, SamplingParams(max_tokens=found.longest - 4))

    @pytest.mark.parametrize("more", [0, 1])
    def test_as_many_run_at_once_as_are_planned_and_no_more(self, more):
        sizes = dict(prompt_len=37, output_len=50, page_size=4, max_model_len=256, num_pages=200)
        found = plan(TINY, gpu(1), **sizes)
        assert found.seqs_at_end == 199 // 22 == 9
        config = EngineConfig(
            max_num_seqs=found.seqs_at_end + more, page_size=4, num_pages=200, max_model_len=256
        )
        lengths = parse_lengths("37", "prompt"), parse_lengths("50", "output")
        work = make_workload(27, *lengths, max_model_len=256, vocab_size=97, seed=0)
        stats, _ = run_scheduler(config, work)
        assert (stats.totals.num_preemptions > 0) == bool(more)

    def test_two_devices_hold_what_is_planned_for_each(self):
        model = dataclasses.replace(TINY, vocab_size=64)
        mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("tp",), axis_types=(AxisType.Auto,))
        params = stack_layers(Decoder(model).init(jax.random.key(0)), model)
        params = jax.device_put(params, sharding.param_shardings(params, mesh))
        own = [leaf.addressable_shards[1].data.nbytes for leaf in jax.tree.leaves(params)]
        found = plan(model, gpu(1), num_devices=2, dtype="float32", memory_fraction=0.001)
        assert found.weight_bytes == sum(own)
        assert found.num_pages == (GIB - sum(own)) // 1000 // found.page_bytes
        assert 2 * found.page_bytes == plan(model, gpu(1), dtype="float32").page_bytes


WIDE = {"dtype": "float32", "max_model_len": 40_000}
MANY = {"max_num_seqs": 10**6, "max_model_len": 99}
LARGE = {"page_size": 2**17, "max_model_len": 64}


class TestWhatDoesNotFit:
    @pytest.mark.parametrize(
        ("model", "chip", "config", "problem", "change"),
        [
            # 141.1 GB, of which 8 devices hold 17.6 each; 4 would leave too few pages.
            ("70b", "h100", {}, "weights take 131.4 GiB, more than the 59.3", "--num_devices=8"),
            ("8b", "l4", {"max_model_len": 4096}, "takes 256 pages", "--chip=a100-40gb"),
            ("8b", "h100", {}, "takes 8192 pages, and the pool has", "--memory_fraction=0.4"),
            ("8b", "h100", {}, "requests of more than 90849 tokens", "--max_model_len=90849"),
            ("8b", "h100", WIDE, "takes 2500 pages", "--dtype=bfloat16"),
            ("8b", "h100", WIDE, "takes 2500 pages", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"),
            ("1b", "v5e", {"num_pages": 10**6}, "num_pages=1000000 pages", "--num_pages=15625"),
            ("1b", "v5e", MANY, "of max_num_seqs=1000000 samples take", "--max_num_seqs=15625"),
            ("1b", "v5e", LARGE, "holds 0 pages", "--page_size=32768"),
        ],
    )  # fmt: skip
    def test_changes_are_those_that_would_do(self, model, chip, config, problem, change):
        (name,) = (name for name in SHAPES if re.fullmatch(f"llama.*-{model}", name))
        model = SHAPES[name]
        found = plan(model, memory_of(chip), **config)
        assert any(problem in text for text in found.problems), found.problems
        assert any(text.startswith(f"{change} (") for text in found.changes), found.changes
        assert len(found.changes) == len(set(found.changes)) >= 1
        for text in found.changes:
            device, num_devices, changed = memory_of(chip), 1, dict(config)
            *flags, pages = text.replace(" and ", " ").split(" (")
            for flag in flags[0].split():
                name, value = flag.lstrip("-").split("=")
                if name == "chip":
                    device = memory_of(value)
                elif name == "num_devices":
                    num_devices = int(value)
                elif name == "XLA_PYTHON_CLIENT_MEM_FRACTION":
                    device = dataclasses.replace(device, share=float(value))
                else:
                    kind = {"dtype": str, "kv_dtype": str, "memory_fraction": float}.get(name, int)
                    changed[name] = kind(value)
            after = plan(model, device, num_devices, **changed)
            assert not after.problems, (text, after.problems)
            assert pages == f"{after.num_pages - 1:,} pages)"

    def test_pages_of_eight_bits_are_proposed_where_the_kernels_take_them(self):
        """On an H100 that is in rows of 32 lanes, as its tensor cores load bytes."""
        for head_dim, takes in ((64, True), (80, False)):
            (layer,) = SHAPES["llama-3.2-1b"].pattern
            rope = dataclasses.replace(layer.attention.rope, dim=head_dim)
            attention = dataclasses.replace(layer.attention, head_dim=head_dim, rope=rope)
            pattern = (dataclasses.replace(layer, attention=attention),)
            model = dataclasses.replace(SHAPES["llama-3.2-1b"], pattern=pattern)
            found = plan(model, memory_of("h100"), memory_fraction=0.025, max_model_len=60_000)
            assert found.problems
            assert any("kv_dtype" in change for change in found.changes) == takes, found.changes
            if not takes:
                with pytest.raises(ValueError, match="head_dim that is a multiple of 32 and at"):
                    plan(model, memory_of("h100"), kv_dtype="int8")

    def test_kernels_are_asked_about_the_size_of_a_pool_too(self):
        """Of between 2 and 4 GiB of int8, whose offsets Triton's kernels overflow."""
        model, size = SHAPES["llama-3.2-1b"], {"memory_fraction": 0.08, "max_model_len": 131_072}
        found = plan(model, memory_of("l40s"), kv_dtype="int8", **size)
        assert 2**31 < found.pool_bytes < 2**32
        (problem,) = found.problems
        assert "between which jax's Triton offsets overflow" in problem
        assert any(change.startswith("--memory_fraction=0.") for change in found.changes)
        # What would have room otherwise is not proposed either.
        found = plan(model, memory_of("l40s"), **size)
        assert found.problems and not any("kv_dtype" in change for change in found.changes)

    def test_nothing_fits_what_no_chip_holds(self):
        huge = dataclasses.replace(SHAPES["llama-3.1-70b"], num_layers=1000)
        found = plan(huge, memory_of("h100"), max_model_len=64)
        assert found.problems and not found.changes and found.num_pages == 0

    def test_steps_that_take_too_much(self):
        found = plan(TINY, gpu(1))
        fits = StepFacts(argument_bytes=GIB // 2, output_bytes=9, alias_bytes=9, temp_bytes=1)
        large = dataclasses.replace(fits, temp_bytes=GIB)
        wrong = StepFacts(error="ValueError: no such kernel")
        assert step_problems(found, {"decode": fits}) == []
        assert step_problems(found, {"decode": fits, "prefill": large, "other": wrong}) == [
            "the other step: ValueError: no such kernel",
            "the prefill step takes 1.5 GiB, of which 1.0 GiB are temporaries, more than the 1.0 "
            "GiB that jax can allocate",
        ]


class TestRefused:
    @pytest.mark.parametrize(
        ("model", "arguments", "message"),
        [
            (TINY, {"num_devices": 2}, "vocab_size=97 does not split over 2 devices"),
            (SHAPES["qwen3-8b"], {"num_devices": 3}, "num_kv_heads=8 does not split over 3"),
            (dataclasses.replace(TINY, num_layers=10**9), {}, "num_layers=1000000000 must be"),
            (TINY, {"num_devices": 0}, "num_devices=0 must be at least 1"),
            (TINY, {"prompt_len": 0}, "prompt_len=0 must be at least 1"),
            (TINY, {"output_len": 2.5}, "output_len=2.5 must be an integer"),
            (TINY, {"prompt_len": 200, "output_len": 57}, "are 257 tokens, more than max_model"),
            (TINY, {"max_model_len": 257}, "max_model_len=257 exceeds the model's max_position"),
        ],
    )  # fmt: skip
    def test_what_no_memory_would_change(self, model, arguments, message):
        with pytest.raises(ValueError, match=message):
            plan(model, gpu(1), **arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("h900",), "chip='h900': choose among a100, "),
            (("h100", 0), "memory_gib=0 must be above 0"),
            (("h100", float("nan")), "memory_gib=nan must be above 0"),
        ],
    )
    def test_memory_that_there_is_not(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            memory_of(*arguments)

    @pytest.mark.parametrize("device", [memory_of("cpu"), memory_of("l4")])
    def test_what_nothing_compiles_for(self, device):
        with pytest.raises(ValueError, match=r"steps are compiled for a100, .* alone"):
            compile_steps(TINY, device=device)

    @pytest.mark.parametrize("backend", ["cpu", "xla", "gpu"])
    def test_kernels_that_are_not_the_chips(self, backend):
        message = f"each with its own kernels, and not with backend={backend!r} on platform 'tpu'$"
        with pytest.raises(ValueError, match=message):
            compile_steps(TINY, EngineConfig(backend=backend), device=memory_of("v5e"))


def test_every_chip_can_be_planned_for():
    for chip in CHIPS:
        assert not plan(SHAPES["smollm2-135m"], memory_of(chip), max_model_len=512).problems


@pytest.mark.slow
@pytest.mark.parametrize("single", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_the_compiler_finds_what_is_planned(tpu_compiler, single):
    small = dataclasses.replace(SHAPES["llama-3.2-1b"], num_layers=2, vocab_size=2048)
    config = EngineConfig(
        max_num_seqs=8, max_num_batched_tokens=32, max_model_len=512, deterministic=single
    )
    found = make_plan(small, config, device=memory_of("v5e"))
    steps = compile_steps(small, config, device=memory_of("v5e"))
    assert list(steps) == (["prefill"] if single else ["decode", "prefill"])
    for facts in steps.values():
        assert facts.error is None
        assert facts.pool_bytes == facts.alias_bytes == found.pool_bytes
        # Beside them are the arrays of a step.
        assert 0 <= facts.argument_bytes - found.weight_bytes - found.pool_bytes < 2**17
        assert facts.total_bytes < 1.02 * (found.weight_bytes + found.pool_bytes)
        assert facts.pool_ops == ()
