# SPDX-License-Identifier: Apache-2.0
"""The scheduler against a device that is a dictionary: any mix of jobs, any size of pool."""

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from jpaged.host.groups import ONE_GROUP, GroupKind
from jpaged.host.preemption import PreemptionCosts
from tests.jpaged.expected import Job
from tests.jpaged.simulated_device import Simulation

# Of Gemma 3 (five layers with a window to one without), gpt-oss (one to one) and Mistral (all).
GROUPS = [
    (GroupKind(None, 1), GroupKind(6, 5)),
    (GroupKind(None, 1), GroupKind(3, 1)),
    (GroupKind(4, 1),),
    (GroupKind(1, 1), GroupKind(None, 1)),
]


@st.composite
def mixes(draw, reservation="paged", kinds=(ONE_GROUP,)):
    """Jobs and a pool that holds them, often barely."""
    page_size = draw(st.integers(1, 5))
    max_model_len = draw(st.integers(2, 24))
    max_num_seqs = draw(st.integers(1, 6))
    max_num_batched_tokens = draw(st.integers(1, 20))
    most_samples = 8 if reservation == "paged" else 1
    most_beams = min(max_num_seqs, max_num_batched_tokens, 3) if reservation == "paged" else 0
    jobs, mixed = [], draw(st.booleans())
    for index in range(draw(st.integers(1, 7))):
        n = draw(st.integers(1, 3) | st.integers(1, most_samples)) if most_samples > 1 else 1
        beam_width = draw(st.none() | st.integers(1, most_beams)) if most_beams else None
        jobs.append(
            Job(
                prompt_len=draw(st.integers(1, max_model_len - 1)),
                max_tokens=draw(st.integers(1, 12)),
                n=n if beam_width is None else 1,
                arrival=draw(st.just(0) | st.integers(0, 12)),
                stops=tuple(draw(st.none() | st.integers(1, 8)) for _ in range(n)),
                aborted_at=draw(st.none() | st.none() | st.none() | st.integers(0, 20)),
                family=draw(st.just(0) | st.just(index)),
                beam_width=beam_width,
                early_stopping=draw(st.sampled_from([False, True, "never"])),
                length_penalty=draw(st.sampled_from([1.0, 0.0, 2.0, -0.5])),
                priority=draw(st.just(0) | st.integers(-1, 2)) if mixed else 0,
            )
        )
    # The last token of a sample needs no cell; beams share the full pages of the prompt.
    pages = [
        -(-(min(job.prompt_len + job.max_tokens, max_model_len) - 1) // page_size) for job in jobs
    ]
    if reservation == "max":
        pages = [-(-max_model_len // page_size)]
    else:
        pages = [
            each + ((job.beam_width or 1) - 1) * (each - job.prompt_len // page_size)
            for each, job in zip(pages, jobs, strict=True)
        ]
    kinds = draw(st.sampled_from(kinds))
    least = max(pages) * sum(kind.num_groups for kind in kinds)
    more = draw(st.just(0) | st.integers(0, 12)) * sum(kind.num_groups for kind in kinds)
    options = dict(
        page_size=page_size,
        kinds=kinds,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        reservation=reservation,
        prefix_cache=draw(st.booleans()),
        preemption=draw(st.sampled_from(["recompute", "swap", "auto"])),
        num_host_pages=draw(st.integers(0, 20)) * sum(kind.num_groups for kind in kinds),
        costs=PreemptionCosts(1.0, draw(st.sampled_from([0.1, 0.5, 2.0]))),
        decode_steps=draw(st.sampled_from([1, 3, 8])),
    )
    while kinds != ONE_GROUP and reservation == "paged":
        # With windows, what is refused nowhere is enough.
        smaller = Simulation(jobs, num_usable_pages=least - 1, **options) if least > 1 else None
        if smaller is None or not smaller.fits():
            break
        least -= 1
    return Simulation(jobs, num_usable_pages=least + more, **options)


@settings(deadline=None, max_examples=100)
@given(mixes())
def test_every_sample_gets_its_tokens_whatever_the_schedule(simulation):
    simulation.run()
    event(f"burst: {simulation.num_extended > 0}")
    event(f"preempted: {simulation.scheduler.num_preemptions > 0}")
    event(f"copied: {simulation.num_copies > 0}")
    event(f"swapped: {simulation.num_swapped > 0}")
    event(f"found in the cache: {simulation.num_hits > 0}")


def job(prompt_len, max_tokens, n=1, family=0, beam_width=None, early_stopping=False):
    return Job(
        prompt_len=prompt_len, max_tokens=max_tokens, n=n, arrival=0, stops=(None,) * n,
        aborted_at=None, family=family, beam_width=beam_width, early_stopping=early_stopping,
        length_penalty=1.0,
    )  # fmt: skip


BEAMS = dict(
    reservation="paged", prefix_cache=False, preemption="recompute", num_host_pages=0,
    costs=PreemptionCosts(1.0, 0.1),
)  # fmt: skip


def test_beams_with_windows_in_the_least_pool():
    """Of two beams one was preempted, and must find the pages of the prompt that the other has."""
    jobs = [job(1, 3), job(1, 1), job(3, 4, family=2, beam_width=2), job(1, 1, n=3)]
    Simulation(
        [*jobs, job(10, 2, beam_width=2)],
        num_usable_pages=8, page_size=5, kinds=(GroupKind(None, 1), GroupKind(3, 1)),
        max_num_batched_tokens=10, max_num_seqs=4, max_model_len=12, **BEAMS,
    ).run()  # fmt: skip


def test_a_beam_that_starts_again_leaves_the_pages_of_this_step():
    """What another one writes in the step that is planned must not be written to known pages."""
    first = job(1, 5, beam_width=2), job(1, 5, beam_width=1, early_stopping="never")
    Simulation(
        [*first, job(15, 3, beam_width=3)],
        num_usable_pages=48, page_size=3, kinds=(GroupKind(None, 1), GroupKind(6, 5)),
        max_num_batched_tokens=8, max_num_seqs=6, max_model_len=18, **BEAMS,
    ).run()  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(mixes(kinds=GROUPS))
def test_every_sample_gets_its_tokens_with_groups_of_layers(simulation):
    simulation.run()
    event(f"preempted: {simulation.scheduler.num_preemptions > 0}")
    event(f"copied: {simulation.num_copies > 0}")
    event(f"swapped: {simulation.num_swapped > 0}")
    event(f"found in the cache: {simulation.num_hits > 0}")


@pytest.mark.nightly
@settings(deadline=None, max_examples=5000)
@given(mixes(kinds=[ONE_GROUP, *GROUPS]))
def test_every_sample_gets_its_tokens_over_thousands_of_schedules(simulation):
    simulation.run()


@settings(deadline=None, max_examples=50)
@given(mixes(reservation="max"))
def test_reserving_all_pages_ahead_gives_the_same_tokens(simulation):
    simulation.run()
    assert simulation.scheduler.num_preemptions == 0
    assert simulation.num_copies == 0


def test_a_crowded_pool_makes_the_simulation_preempt_fork_and_copy():
    """The properties above would say little if their mixes never came to this."""
    jobs = [Job(prompt_len=5, max_tokens=9, n=3), Job(prompt_len=7, max_tokens=6), Job(6, 8, n=2)]
    simulation = Simulation(
        jobs,
        num_usable_pages=7,
        page_size=3,
        max_num_batched_tokens=6,
        max_num_seqs=4,
        max_model_len=16,
    ).run()
    assert simulation.scheduler.num_preemptions >= 2
    assert simulation.num_copies >= 2
    assert simulation.num_forked_rows == 3


def add_all(simulation):
    for request in simulation.requests:
        simulation.scheduler.add(request)
        simulation.added.append(request)


@pytest.mark.parametrize(("decode_steps", "dispatches"), [(1, [1] * 17), (8, [1, 8, 8])])
def test_bursts_by_hand(decode_steps, dispatches):
    """17 tokens: one of the prompt, and sixteen that are decoded."""
    simulation = Simulation(
        [Job(prompt_len=5, max_tokens=17)], num_usable_pages=6, page_size=4,
        max_num_batched_tokens=8, max_num_seqs=2, max_model_len=24, decode_steps=decode_steps,
    )  # fmt: skip
    add_all(simulation)
    found = []
    while simulation.busy:
        simulation.step()
        found.append(len(simulation.inflight or ()))
    simulation.check_end()
    assert found == [*dispatches, 0]


def test_rows_leave_a_burst_as_they_end():
    """Of 4, 6 and 9 tokens the first is the prompt's: the others go on without them."""
    jobs = [Job(prompt_len=2, max_tokens=count) for count in (4, 6, 9)]
    simulation = Simulation(
        jobs, num_usable_pages=20, page_size=4,
        max_num_batched_tokens=8, max_num_seqs=4, max_model_len=24, decode_steps=8,
    )  # fmt: skip
    add_all(simulation)
    simulation.step()
    simulation.step()
    assert [len(step.samples) for step, *_ in simulation.inflight] == [3, 3, 3, 2, 2]
    while simulation.busy:
        simulation.step()
    simulation.check_end()


def test_eight_samples_hold_a_prompt_once_and_copy_what_diverges():
    simulation = Simulation(
        [Job(prompt_len=500, max_tokens=40, n=8)],
        num_usable_pages=80,
        page_size=16,
        max_num_batched_tokens=512,
        max_num_seqs=8,
        max_model_len=540,
    )
    record, most = simulation.check_memory, []

    def watch():
        record()
        most.append(simulation.table.pool.num_used_pages)

    simulation.check_memory = watch
    simulation.run()
    # 31 full pages of the prompt, and three for the rest and the answer of each.
    assert max(most) == 31 + 8 * 3
    # The last owner of the partial page writes in place.
    assert simulation.num_copies == 7


def test_a_thousand_samples_of_a_prompt():
    simulation = Simulation(
        [Job(prompt_len=9, max_tokens=3, n=1000), Job(5, 4)],
        num_usable_pages=60,
        page_size=4,
        max_num_batched_tokens=64,
        max_num_seqs=32,
        max_model_len=16,
    ).run()
    # A start for 32 at once; all but the first find the full pages of the prompt.
    assert simulation.num_steps < 3 * 1000 / 32 * 2
    assert simulation.num_hits >= (1000 // 32 - 1) * 8
