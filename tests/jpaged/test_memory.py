# SPDX-License-Identifier: Apache-2.0
"""Settings that no machine can hold are refused by arithmetic, with the numbers."""

import dataclasses

import psutil
import pytest

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.device.memory import FreeMemory, plan_pool
from tests.jpaged.tiny import TINY, tiny_engine, tiny_params

GIB = 2**30


@pytest.fixture(autouse=True)
def four_gib(monkeypatch):
    """A machine on which 4 GiB are free."""
    available = psutil.virtual_memory()._replace(available=4 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)


# A page of 16 tokens: 2 layers, 2 heads, 2 * 16 lanes of 4 bytes.
PAGE_BYTES = 16 * 2 * 2 * 32 * 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            dict(num_pages=2_000_000),
            f"num_pages=2000000 pages of {PAGE_BYTES} bytes take 15.3 GiB, more than the 4.0 GiB "
            "of available host memory; lower num_pages or page_size",
        ),
        (
            dict(num_pages=4 * GIB // PAGE_BYTES + 1),
            f"num_pages=524289 pages of {PAGE_BYTES} bytes take 4.0 GiB, more than the 4.0 GiB",
        ),
        (dict(num_pages=2, page_size=2**30), "take 1024.0 GiB, more than the 4.0 GiB"),
        (
            dict(swap_bytes=2**60),
            "swap_bytes=1152921504606846976 exceeds the 4.0 GiB of host memory that are available "
            "beside the pool; lower it",
        ),
        (dict(num_pages=3 * GIB // PAGE_BYTES, swap_bytes=2 * GIB), "exceeds the 1.0 GiB of host"),
        (
            dict(max_num_seqs=10**9),
            "the page tables of max_num_seqs=1000000000 sequences take 59.6 GiB, more than the "
            "4.0 GiB of available host memory; lower it",
        ),
        (dict(max_num_seqs=2**25, page_size=256), "the logits of max_num_seqs=33554432 samples"),
        (
            dict(max_num_batched_tokens=2**31 - 1, deterministic=True),
            "the hidden states of max_num_batched_tokens=2147483647 tokens take 256.0 GiB, more",
        ),
        (dict(page_size=2**30), "holds 0 pages of 549755813888 bytes, and 2 are the least"),
        (dict(max_model_len=2**30), "exceeds the model's max_position_embeddings=256"),
    ],
)
def test_refused(config, message):
    with pytest.raises(ValueError) as e:
        plan_pool(EngineConfig(**config), TINY, "xla")
    assert message in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError):
        tiny_engine(**({"max_model_len": 256} | config))


def test_samples_that_the_host_could_not_hold(monkeypatch):
    long = dataclasses.replace(TINY, max_position_embeddings=2**16)
    engine = Engine(long, tiny_params(), EngineConfig(num_pages=2**13))
    engine.add_request([1, 2], SamplingParams(n=2**13, max_tokens=2**16))  # 4 GiB less a bit
    with pytest.raises(ValueError, match="'b': 16384 samples of up to 65536 tokens take 8"):
        engine.add_request([1, 2], SamplingParams(n=2**14), "b")
    engine.abort("0")
    assert len(engine.generate([[1]], SamplingParams(max_tokens=3, ignore_eos=True))) == 1


@pytest.mark.parametrize(
    ("free_pages", "num_pages"),
    [(15, 15), (17, 16), (1000, 960), (1023, 960), (1024, 1024)],
)
def test_a_hosts_pool_is_the_same_the_next_time(free_pages, num_pages):
    config = EngineConfig(memory_fraction=0.5, max_num_seqs=64, dtype="float32")
    free = FreeMemory(num_bytes=2 * free_pages * PAGE_BYTES, name="free", platform="cpu")
    assert plan_pool(config, TINY, "xla", free).num_pages == num_pages
    of_gpu = dataclasses.replace(free, platform="gpu")
    assert plan_pool(config, TINY, "xla", of_gpu).num_pages == min(free_pages, 1025)


def test_what_just_fits_is_taken():
    plan = plan_pool(EngineConfig(num_pages=4 * GIB // PAGE_BYTES), TINY, "xla")
    assert plan.num_pages * plan.page_bytes == 4 * GIB
    config = EngineConfig(num_pages=3 * GIB // PAGE_BYTES, swap_bytes=GIB)
    assert plan_pool(config, TINY, "xla").num_host_pages(config) == GIB // PAGE_BYTES


def test_cells_have_32_bit_indices():
    large = FreeMemory(num_bytes=2**60, name="a large machine", platform="cpu")
    with pytest.raises(
        ValueError, match="have 2147483648 cells, and 32-bit indices reach 2147483647"
    ):
        plan_pool(EngineConfig(num_pages=2**27), TINY, "xla", large)
    plan_pool(EngineConfig(num_pages=2**27 - 1), TINY, "xla", large)


def test_a_model_of_any_length_is_checked_too():
    long = dataclasses.replace(TINY, max_position_embeddings=2**31 - 1)
    with pytest.raises(ValueError, match=r"max_num_seqs=64 sequences take 32\.0 GiB"):
        plan_pool(EngineConfig(), long, "xla")
    assert plan_pool(EngineConfig(max_model_len=4096), long, "xla").pages_per_seq == 256
