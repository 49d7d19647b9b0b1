# SPDX-License-Identifier: Apache-2.0
"""What memory layers with windows leave unused, with pages of their own and without."""

import dataclasses

import pytest

from jpaged.host.admission import SchedulerConfig
from jpaged.scripts.simulate import parse_layers
from jpaged.simulation.layers import ONE_KIND, LayerGroups
from jpaged.simulation.lengths import parse_lengths
from jpaged.simulation.serving import ONE_TABLE, serve
from jpaged.simulation.workload import make_workload

GEMMA3 = "26:512,512,512,512,512,full"
GPT_OSS = "24:128,full"


def served(layers, *, prompt, output, max_model_len, count, num_slots, policy="paged"):
    budgets = SchedulerConfig(
        max_num_batched_tokens=2048,
        max_num_seqs=64,
        max_model_len=max_model_len,
        prefix_cache=False,
    )
    work = make_workload(
        count,
        parse_lengths(prompt, "prompt"),
        parse_lengths(output, "output"),
        max_model_len=max_model_len,
        vocab_size=1000,
        seed=0,
    )
    return serve(
        policy, work, config=budgets, num_slots=num_slots,
        layers=parse_layers(layers, max_model_len),
    )  # fmt: skip


def test_layers_of_a_text():
    assert parse_layers("1:full", 99) == ONE_KIND
    groups = parse_layers(GEMMA3, 8192)
    assert (groups.size, groups.num_layers) == (2, (4, 22))
    assert groups.kinds == ((None, 2), (512, 11))
    # 26 slots of all layers are 338 pages of 2 layers and one token.
    assert groups.num_pages(26, 1) == 26 * 26 // 2
    assert dataclasses.replace(groups, one_table=True).num_pages(160, 16) == 10


def test_needed_tokens_by_hand():
    groups = LayerGroups(1, parse_layers("4:3,full", 99).kinds, (2, 2))
    # Queries from position 10 on see 8 and 9 in layers with the window, and all 10 in the others.
    assert groups.needed_tokens(10, 10) == (2 + 10) / 2
    # Of tokens that a step adds, all are needed.
    assert groups.needed_tokens(10, 14) == (6 + 14) / 2
    assert groups.needed_tokens(1, 2) == 2


@pytest.mark.parametrize("layers", [GEMMA3, GPT_OSS])
def test_groups_waste_little(layers):
    """Less than 4 %, page ends, padding and prefill included."""
    load = dict(
        prompt="lognormal:mean=2000,sigma=0.8",
        output="lognormal:mean=300,sigma=0.9",
        max_model_len=8192,
        count=80,
        num_slots=16_000,
    )
    grouped, together = (served(layers, policy=policy, **load) for policy in ("paged", ONE_TABLE))
    assert grouped.waste < 0.04
    assert together.waste > 0.3
    assert grouped.mean_running > 1.2 * together.mean_running


@pytest.mark.parametrize("num_layers", [34, 62], ids=["Gemma 3 4B", "Gemma 3 27B"])
def test_layers_of_awkward_numbers_waste_little(num_layers):
    """29 and 5, or 52 and 10: where sequences are short too, of which page ends are most."""
    load = dict(
        prompt="lognormal:mean=500,sigma=0.8",
        output="lognormal:mean=300,sigma=0.9",
        max_model_len=8192,
        count=40,
        num_slots=10_000,
    )
    assert served(f"{num_layers}:1024,1024,1024,1024,1024,full", **load).waste < 0.02


@pytest.mark.parametrize(
    ("layers", "length", "waste"),
    [
        # Half of the layers see half of the longest sequence: Gemma 2.
        ("26:4096,full", 8192, 1 / 2 * (1 - 4096 / 8192)),
        # Three of four see a quarter: Ministral.
        ("36:full,32768,32768,32768", 131072, 3 / 4 * (1 - 32768 / 131072)),
    ],
    ids=["Gemma 2, 25 %", "Ministral, 56 %"],
)
def test_one_table_wastes_what_others_found(layers, length, waste):
    """At the longest sequence: Zhang et al. 2025, section 3."""
    groups = dataclasses.replace(parse_layers(layers, length), one_table=True)
    needed = groups.needed_tokens(length - 1, length)
    assert 1 - needed / length == pytest.approx(waste, abs=1e-3)
