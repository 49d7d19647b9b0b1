# SPDX-License-Identifier: Apache-2.0
"""The scheduler against a device that is a dictionary.

`Simulation` drives a scheduler as the engine does, one step ahead of the samples, and executes each
step on simulated memory. A sampled token is a hash of everything the row attends to, read back from
that memory, so a wrong page, a lost copy or a cell of another sequence changes every later token.
`expected_tokens` and `expected_beams` compute the same tokens from lists alone, without pages,
steps or neighbours.
"""

import collections
import dataclasses
import functools
import re
import zlib

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from jpaged.admission import RequestTooLongError, SchedulerConfig
from jpaged.beam import path, start_search
from jpaged.page_pool import NULL_PAGE, PagePool
from jpaged.page_table import PageTable
from jpaged.params import SamplingParams
from jpaged.scheduler import Scheduler
from jpaged.sequence import Request, Status
from jpaged.swap import PreemptionCosts


@dataclasses.dataclass(frozen=True)
class Job:
    """A request to simulate.

    Attributes:
      stops: per sample, after how many tokens it draws its stop token, or None.
      aborted_at: the step before which the caller gives up, or None.
      family: jobs of one family have the same prompts, as far as these go.
      beam_width: searches with beams instead of drawing samples.
      early_stopping, length_penalty: of the search.
    """

    prompt_len: int
    max_tokens: int
    n: int = 1
    arrival: int = 0
    stops: tuple[int | None, ...] = ()
    aborted_at: int | None = None
    family: int = 0
    beam_width: int | None = None
    early_stopping: bool | str = False
    length_penalty: float = 1.0


def prompt_of(key):
    family, length = key
    return [1000 * (family + 1) + i for i in range(length)]


BEAM_VOCABULARY = range(1, 7)
BEAM_STOP = 1


def logprob(context, token):
    """The fake model of beam search."""
    return -5 * zlib.crc32(repr((context, token)).encode()) / 2**32


def continuations(beams):
    """All of (score, beam, token), best first, for the contexts and scores of beams."""
    return sorted(
        (
            (score + logprob(context, token), beam, token)
            for beam, (context, score) in enumerate(beams)
            for token in BEAM_VOCABULARY
        ),
        key=lambda candidate: (-candidate[0], *candidate[1:]),
    )


@functools.lru_cache(maxsize=4096)
def expected_beams(key, length, width, early_stopping, penalty):
    """Hypotheses of a beam search, best first: transformers' rules, over copied lists."""
    prompt = prompt_of(key)
    beams, ended = [(prompt, 0.0)], []
    while True:
        size = len(beams[0][0]) + 1 - len(prompt)
        best = [
            (beams[beam][0] + [token], score)
            for score, beam, token in continuations(beams)[: 2 * width]
        ]
        done = [t[-1] == BEAM_STOP or len(t) == length for t, _ in best]
        if not (len(ended) == width and early_stopping is True):
            new = [
                (score / size**penalty, tokens)
                for (tokens, score), is_done in zip(best[:width], done, strict=False)
                if is_done
            ]
            ended = sorted(ended + new, key=lambda h: -h[0])[:width]
        beams = [beam for beam, is_done in zip(best, done, strict=True) if not is_done][:width]
        if not beams:
            break
        if len(ended) == width:
            longest = length - len(prompt)
            reach = longest if early_stopping == "never" and penalty > 0 else size
            if early_stopping is True or beams[0][1] / reach**penalty <= ended[-1][0]:
                break
    return [(score, tokens[len(prompt) :]) for score, tokens in ended]


def draw(sample_index, context):
    """The fake model: the token that follows `context` in a sample."""
    return 10**6 + zlib.crc32(repr((sample_index, context)).encode())


@functools.lru_cache(maxsize=4096)
def expected_tokens(key, sample_index, length):
    """Prompt and generated tokens of a sample, `length` in all, by definition."""
    tokens = prompt_of(key)
    while len(tokens) < length:
        tokens.append(draw(sample_index, tokens))
    return tokens


class Simulation:
    """Runs jobs to their end and checks every step on the way."""

    def __init__(self, jobs, *, num_usable_pages, page_size, **config):
        self.config = SchedulerConfig(**config)
        self.page_size = page_size
        self.jobs = jobs
        pages_per_seq = -(-self.config.max_model_len // page_size)
        self.table = PageTable(PagePool(num_usable_pages + 1), page_size, pages_per_seq)
        self.scheduler = Scheduler(self.config, self.table)
        self.requests = [
            Request(
                str(index),
                prompt_of((job.family, job.prompt_len)),
                SamplingParams(
                    max_tokens=job.max_tokens,
                    n=job.n,
                    beam_width=job.beam_width,
                    early_stopping=job.early_stopping,
                    length_penalty=job.length_penalty,
                ),
                seed=0,
                max_model_len=self.config.max_model_len,
            )
            for index, job in enumerate(jobs)
        ]
        for request in self.requests:
            if request.params.beam_width is not None:
                start_search(request, (BEAM_STOP,))
        self.host_memory = {}
        self.memory = collections.defaultdict(lambda: [None] * page_size)
        self.inflight = None
        self.previous_samples = []
        self.previous_tokens = []
        self.aborted = set()
        self.added = []
        self.started = []
        self.num_copies = self.num_forked_rows = self.num_steps = self.num_hits = 0
        self.num_swapped = 0

    def __repr__(self):
        pages = f"{self.table.pool.num_usable_pages} pages of {self.page_size}"
        return f"{self.jobs}, {pages}, {self.config}"

    def run(self):
        # The oldest sequence computes a token or more in every step, from when it is the oldest.
        limit = sum(
            max(job.n, 2 * (job.beam_width or 0)) * (job.prompt_len + job.max_tokens + 2)
            + job.arrival
            + 1
            for job in self.jobs
        )
        time = 0
        while time <= max((job.arrival for job in self.jobs), default=0) or self.busy:
            for request, job in zip(self.requests, self.jobs, strict=True):
                if job.arrival == time:
                    self.scheduler.add(request)
                    self.added.append(request)
                if job.aborted_at == time and request in self.added and not request.finished:
                    self.aborted.add(request)
                    for seq in request.sequences:
                        if seq.status is not Status.FINISHED:
                            self.scheduler.finish(seq, "abort")
                    self.scheduler.check_invariants()
            self.step()
            time += 1
            assert time <= limit, "starved"
        self.check_end()
        return self

    @property
    def busy(self):
        return self.scheduler.has_work or self.inflight is not None

    def step(self):
        """`Engine.step`: dispatches a step, then reads the samples of the one before."""
        previous, self.inflight = self.inflight, None
        if self.scheduler.has_work:
            oldest = min(
                (seq for seq in self.live() if not self.is_last(seq)), key=self.age, default=None
            )
            computed = {
                seq: seq.num_computed_tokens
                for seq in self.live()
                if seq.table_id is not None or seq.swapped is not None
            }
            step = self.scheduler.schedule()
            self.num_steps += 1
            if not step.seqs:
                # Beams whose last step has not been read are all that there is to do.
                assert previous is not None and previous[0].beams
                assert self.scheduler.num_running, "nobody waits for an idle device"
            elif oldest is not None and not (oldest.request.beam_search and previous):
                assert step.seqs[0].request is oldest.request, "the oldest must always go on"
            self.check_budgets(step)
            self.check_order(step)
            for seq, count in zip(step.seqs, step.num_scheduled_tokens, strict=True):
                start = seq.num_computed_tokens - count
                assert seq not in computed or start == computed[seq], "tokens skipped"
            results = self.execute(step)
            if step.seqs:
                self.inflight = step, *results
            self.check_memory()
            self.check_counts()
            self.scheduler.check_invariants()
        if previous is not None:
            self.process(*previous)
            self.scheduler.check_invariants()

    def execute(self, step):
        """The device: copies pages, writes cells, attends and samples."""
        for page, host_page in step.swap_outs:
            self.host_memory[host_page] = list(self.memory[page])
        for host_page, page in step.swap_ins:
            self.memory[page] = list(self.host_memory[host_page])
        self.num_swapped += len(step.swap_ins)
        self.num_hits += step.num_hit_tokens
        read = [list(self.memory[src]) for src, _ in step.copies]
        for (src, dst), cells in zip(step.copies, read, strict=True):
            assert NULL_PAGE not in (src, dst) and src != dst
            self.memory[dst] = cells
        assert len({dst for _, dst in step.copies}) == len(step.copies)
        self.num_copies += len(step.copies)

        size = self.table.page_size
        written = set()
        for seq, count, slot in zip(
            step.seqs, step.num_scheduled_tokens, step.input_slots, strict=True
        ):
            pages, end = self.table.pages(seq.table_id), seq.num_computed_tokens
            if slot >= 0:
                assert count == 1 and end == len(seq.token_ids) + 1
                assert self.previous_samples[slot] is seq
                tokens = [self.previous_tokens[slot]]
            else:
                tokens = seq.tokens(end - count, end)
                assert len(tokens) == count, "tokens that the host does not know yet"
            for position, token in enumerate(tokens, end - count):
                page, cell = pages[position // size], position % size
                assert page != NULL_PAGE
                assert (page, cell) not in written, "two rows write one cell"
                written.add((page, cell))
                assert not self.table.pool.is_kept(page) or page in step.addressed
                self.memory[page][cell] = token

        tokens = []
        for seq, row in zip(step.samples, step.sample_rows, strict=True):
            parent = step.seqs[row]
            assert parent is seq or (parent.request is seq.request and seq not in step.seqs)
            assert parent.num_computed_tokens == seq.num_computed_tokens
            self.num_forked_rows += parent is not seq
            tokens.append(draw(seq.sample_index, self.attended(parent)))
        self.previous_samples, self.previous_tokens = step.samples, tokens
        candidates = []
        for request, slot in step.beams:
            search = request.beam_search
            beams = step.samples[slot : slot + len(search.nodes)]
            assert [beam.request for beam in beams] == [request] * len(search.nodes)
            contexts = [self.attended(beam) for beam in beams]
            best = continuations(list(zip(contexts, search.scores, strict=True)))
            candidates.append(best[: search.num_candidates])
        return tokens, candidates

    def process(self, step, tokens, candidates):
        """`Engine._process`, less what only reports."""
        for (request, _), best in zip(step.beams, candidates, strict=True):
            if request.sequences[0].status is not Status.FINISHED:
                parents = request.beam_search.advance(best)
                self.scheduler.advance_beams(request, parents)
        for seq, token in zip(step.samples, tokens, strict=True):
            if seq.status is Status.FINISHED or seq.request.beam_search is not None:
                continue
            seq.num_inflight_tokens -= 1
            seq.token_ids.append(token)
            if len(seq.generated_token_ids) == self.stop_of(seq):
                self.scheduler.finish(seq, "stop")
            elif len(seq.token_ids) >= seq.max_total_tokens:
                self.scheduler.finish(seq, "length")

    def check_budgets(self, step):
        num_tokens = sum(step.num_scheduled_tokens)
        assert num_tokens <= self.config.max_num_batched_tokens
        assert len(step.seqs) <= self.config.max_num_seqs
        assert len(step.samples) <= self.config.max_num_seqs
        assert len(set(step.seqs)) == len(step.seqs)
        assert len(set(step.samples)) == len(step.samples)
        assert min(step.num_scheduled_tokens, default=1) >= 1
        assert 0 <= step.num_prefill_tokens <= num_tokens
        running = [seq for seq in self.live() if seq.status is Status.RUNNING]
        assert len(running) <= self.config.max_num_seqs
        has_beams = any(seq.request.beam_search is not None for seq in running)
        if num_tokens < self.config.max_num_batched_tokens and not has_beams:
            # Nobody who runs is left waiting for a budget that is there.
            sampled = {step.seqs[row] for row in step.sample_rows}
            assert sampled == set(step.seqs)
            assert {*running} <= {*step.samples}

    def check_order(self, step):
        for seq in step.seqs:
            if seq.request not in self.started:
                self.started.append(seq.request)
                before = self.added[: self.added.index(seq.request)]
                late = [r for r in before if r not in self.started and r not in self.aborted]
                assert not late, "started before an earlier request"
        assert step.seqs == sorted(step.seqs, key=self.age)
        running = [self.age(seq) for seq in self.live() if seq.status is Status.RUNNING]
        waiting = [self.age(seq) for seq in self.live() if seq.status is Status.WAITING]
        if running and waiting:
            assert max(running) < min(waiting), "preempted an older one, or admitted a younger one"

    def check_memory(self):
        """Whoever holds pages finds its own tokens there, in order, scheduled or not."""
        holders = [seq for seq in self.live() if seq.table_id is not None]
        for seq in holders:
            assert self.table.num_tokens(seq.table_id) == seq.num_computed_tokens
            if seq.request.beam_search is not None:
                expected = seq.tokens(0, seq.num_known_tokens)
            else:
                expected = self.expected(seq)
            assert self.attended(seq) == expected[: seq.num_computed_tokens]

    def check_counts(self):
        statuses = collections.Counter(seq.status for seq in self.live())
        assert self.scheduler.num_running == statuses[Status.RUNNING]
        assert self.scheduler.num_waiting == statuses[Status.WAITING]

    def check_end(self):
        assert not self.scheduler.has_work
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert self.table.pool.num_used_pages == 0
        assert self.table.num_live_cells == 0
        assert self.scheduler.swap_space.num_free_pages == self.config.num_host_pages
        for request, job in zip(self.requests, self.jobs, strict=True):
            assert request.finished or request in self.aborted
            assert all(seq.status is Status.FINISHED for seq in request.sequences)
            if job.beam_width is not None:
                self.check_beams(request, job)
                continue
            for seq in request.sequences:
                expected = self.expected(seq)[seq.num_prompt_tokens :]
                if request in self.aborted and seq.finish_reason == "abort":
                    assert seq.generated_token_ids == expected[: len(seq.generated_token_ids)]
                    continue
                stop = self.stop_of(seq)
                stopped = stop is not None and stop <= len(expected)
                assert seq.generated_token_ids == expected[: stop if stopped else None]
                assert seq.finish_reason == ("stop" if stopped else "length")

    def check_beams(self, request, job):
        if request in self.aborted:
            return
        length = min(job.prompt_len + job.max_tokens, self.config.max_model_len)
        key = (job.family, job.prompt_len)
        expected = expected_beams(
            key, length, job.beam_width, job.early_stopping, job.length_penalty
        )
        found = request.beam_search.finished
        assert [h.score for h in found] == pytest.approx([score for score, _ in expected])
        tokens = [[node.token_id for node in path(h.node)] for h in found]
        assert tokens == [tokens for _, tokens in expected]

    def attended(self, seq):
        pages, size = self.table.pages(seq.table_id), self.table.page_size
        cells = range(seq.num_computed_tokens)
        return [self.memory[pages[position // size]][position % size] for position in cells]

    def expected(self, seq):
        index = int(seq.request.request_id)
        job = self.jobs[index]
        length = min(job.prompt_len + job.max_tokens, self.config.max_model_len)
        return expected_tokens((job.family, job.prompt_len), seq.sample_index, length)

    def is_last(self, seq):
        """Whether its last token is on its way."""
        if seq.request.beam_search is not None:
            return False
        return seq.num_tokens >= len(self.expected(seq))

    def live(self):
        return [
            seq
            for request in self.added
            for seq in request.sequences
            if seq.status is not Status.FINISHED
        ]

    def age(self, seq):
        return self.added.index(seq.request), seq.sample_index

    def stop_of(self, seq):
        stops = self.jobs[int(seq.request.request_id)].stops
        return stops[seq.sample_index] if seq.sample_index < len(stops) else None


@st.composite
def mixes(draw, reservation="paged"):
    """Jobs and a pool that holds them, often barely."""
    page_size = draw(st.integers(1, 5))
    max_model_len = draw(st.integers(2, 24))
    max_num_seqs = draw(st.integers(1, 6))
    max_num_batched_tokens = draw(st.integers(1, 20))
    most_samples = 8 if reservation == "paged" else 1
    most_beams = min(max_num_seqs, max_num_batched_tokens, 3) if reservation == "paged" else 0
    jobs = []
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
    return Simulation(
        jobs,
        num_usable_pages=max(pages) + draw(st.just(0) | st.integers(0, 12)),
        page_size=page_size,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        reservation=reservation,
        prefix_cache=draw(st.booleans()),
        preemption=draw(st.sampled_from(["recompute", "swap", "auto"])),
        num_host_pages=draw(st.integers(0, 20)),
        costs=PreemptionCosts(1.0, draw(st.sampled_from([0.1, 0.5, 2.0]))),
    )


@settings(deadline=None, max_examples=250)
@given(mixes())
def test_every_sample_gets_its_tokens_whatever_the_schedule(simulation):
    simulation.run()
    event(f"preempted: {simulation.scheduler.num_preemptions > 0}")
    event(f"copied: {simulation.num_copies > 0}")
    event(f"swapped: {simulation.num_swapped > 0}")
    event(f"found in the cache: {simulation.num_hits > 0}")


@pytest.mark.nightly
@settings(deadline=None, max_examples=5000)
@given(mixes())
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


# What follows works small schedules out by hand.


def make_scheduler(num_usable_pages=32, page_size=4, **config):
    defaults = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "max_model_len": 32}
    defaults |= {"prefix_cache": False}
    config = SchedulerConfig(**(defaults | config))
    pages_per_seq = -(-config.max_model_len // page_size)
    return Scheduler(config, PageTable(PagePool(num_usable_pages + 1), page_size, pages_per_seq))


def add(scheduler, request_id, prompt_len, max_tokens=8, **params):
    request = Request(
        request_id,
        list(range(prompt_len)),
        SamplingParams(max_tokens=max_tokens, **params),
        seed=0,
        max_model_len=scheduler.config.max_model_len,
    )
    if request.params.beam_width is not None:
        start_search(request, ())
    scheduler.add(request)
    return request.sequences[0]


def read(step):
    """Reads a step's samples."""
    for seq in step.samples:
        if seq.status is not Status.FINISHED:
            seq.num_inflight_tokens -= 1
            seq.token_ids.append(0)


def plan(step):
    """Rows and how many tokens each computes; a1 is sample 1 of request a."""
    rows = zip(step.seqs, step.num_scheduled_tokens, strict=True)
    return " ".join(f"{name(seq)}:{count}" for seq, count in rows)


def sampled(step):
    return [name(seq) for seq in step.samples]


def name(seq):
    return f"{seq.request.request_id}{seq.sample_index or ''}"


def test_an_idle_scheduler_plans_an_empty_step():
    scheduler = make_scheduler()
    assert not scheduler.has_work
    assert plan(scheduler.schedule()) == ""


def test_a_long_prompt_is_split_into_chunks():
    scheduler = make_scheduler(max_num_batched_tokens=4)
    seq = add(scheduler, "a", 10)
    steps = [scheduler.schedule() for _ in range(3)]
    assert [plan(step) for step in steps] == ["a:4", "a:4", "a:2"]
    assert [sampled(step) for step in steps] == [[], [], ["a"]]
    assert [step.num_prefill_tokens for step in steps] == [4, 4, 2]
    assert seq.num_computed_tokens == 10
    # The token that the last chunk samples is not known yet: it comes from sample slot 0.
    step = scheduler.schedule()
    assert (plan(step), step.input_slots, step.num_prefill_tokens) == ("a:1", [0], 0)


def test_a_token_that_the_host_knows_is_not_taken_from_the_device():
    scheduler = make_scheduler()
    add(scheduler, "a", 3)
    step = scheduler.schedule()
    assert step.input_slots == [-1]
    read(step)
    step = scheduler.schedule()
    assert (plan(step), step.input_slots) == ("a:1", [-1])


def test_decode_goes_first_and_prefill_fills_the_rest_of_the_step():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, "a", 3)
    add(scheduler, "b", 2)
    assert plan(scheduler.schedule()) == "a:3 b:2"
    add(scheduler, "c", 9)
    add(scheduler, "d", 2)
    step = scheduler.schedule()
    assert plan(step) == "a:1 b:1 c:6"
    assert sampled(step) == ["a", "b"]
    assert step.num_prefill_tokens == 6
    step = scheduler.schedule()
    assert plan(step) == "a:1 b:1 c:3 d:2"
    assert sampled(step) == ["a", "b", "c", "d"]
    assert step.sample_rows == [0, 1, 2, 3]
    assert step.num_prefill_tokens == 5


def test_the_last_token_of_a_prompt_alone_in_a_chunk_is_prefill():
    scheduler = make_scheduler(max_num_batched_tokens=4)
    add(scheduler, "a", 5)
    scheduler.schedule()
    step = scheduler.schedule()
    assert (plan(step), step.num_prefill_tokens) == ("a:1", 1)


def test_all_that_is_recomputed_is_prefill():
    scheduler = make_scheduler(num_usable_pages=8, page_size=2, max_num_batched_tokens=4)
    first = add(scheduler, "a", 3, max_tokens=12)
    seq = add(scheduler, "b", 3, max_tokens=12)
    while not scheduler.num_preemptions:
        read(scheduler.schedule())
    scheduler.finish(first, "stop")
    known = len(seq.token_ids)
    assert known > 3 + 4  # so that the second chunk starts after the prompt and has two tokens
    steps = [scheduler.schedule(), scheduler.schedule()]
    assert [plan(step) for step in steps] == ["b:4", f"b:{known - 4}"]
    assert [step.num_prefill_tokens for step in steps] == [4, known - 4]


def test_the_samples_of_a_prompt_fork_when_it_has_been_computed():
    scheduler = make_scheduler(max_num_batched_tokens=4)
    seq = add(scheduler, "a", 6, n=3)
    add(scheduler, "b", 2)
    assert plan(scheduler.schedule()) == "a:4"
    assert len(seq.request.sequences) == 1
    step = scheduler.schedule()
    assert plan(step) == "a:2 b:2"
    assert sampled(step) == ["a", "a1", "a2", "b"]
    assert step.sample_rows == [0, 0, 0, 1]
    # Two pages for a, shared by three, and one for b.
    assert scheduler.table.pool.num_used_pages == 3
    assert scheduler.table.pool.num_shared_pages == 2
    step = scheduler.schedule()
    assert plan(step) == "a:1 a1:1 a2:1 b:1"
    assert step.input_slots == [0, 1, 2, 3]
    # The last owner of the partial page writes in place.
    (partial,) = {src for src, _ in step.copies}
    assert len(step.copies) == 2
    assert scheduler.table.pages(seq.request.sequences[2].table_id)[1] == partial


def test_forks_to_come_hold_their_places():
    scheduler = make_scheduler(max_num_batched_tokens=4, max_num_seqs=4)
    first = add(scheduler, "a", 5, n=3)
    add(scheduler, "b", 1)
    add(scheduler, "c", 1)
    assert plan(scheduler.schedule()) == "a:4"
    # One token ends a's prompt and b fits; c would be the fifth.
    assert plan(scheduler.schedule()) == "a:1 b:1"
    assert (scheduler.num_running, scheduler.num_waiting) == (4, 1)
    scheduler.finish(first, "stop")
    assert plan(scheduler.schedule()) == "a1:1 a2:1 b:1 c:1"


def test_a_request_ended_before_its_forks_gives_their_places_back():
    scheduler = make_scheduler(max_num_batched_tokens=4, max_num_seqs=3)
    seq = add(scheduler, "a", 9, n=3)
    scheduler.schedule()
    scheduler.finish(seq, "abort")
    assert scheduler.table.pool.num_used_pages == 0
    add(scheduler, "b", 1, n=2)
    add(scheduler, "c", 1)
    assert plan(scheduler.schedule()) == "b:1 c:1"
    assert scheduler.num_running == 3


def test_a_request_that_does_not_fit_holds_up_those_behind_it():
    scheduler = make_scheduler(num_usable_pages=4)
    add(scheduler, "a", 4)
    add(scheduler, "b", 13, max_tokens=2)
    add(scheduler, "c", 1)
    assert plan(scheduler.schedule()) == "a:4"
    assert scheduler.num_waiting == 2


def test_a_little_of_a_large_pool_is_left_for_the_running_to_grow():
    scheduler = make_scheduler(
        num_usable_pages=200, page_size=1, max_num_batched_tokens=500, max_model_len=200
    )
    add(scheduler, "a", 10)
    add(scheduler, "b", 189, max_tokens=5)
    assert plan(scheduler.schedule()) == "a:10"  # 1 of 200 pages would be left

    scheduler = make_scheduler(
        num_usable_pages=200, page_size=1, max_num_batched_tokens=500, max_model_len=200
    )
    add(scheduler, "a", 10)
    add(scheduler, "b", 188, max_tokens=5)
    assert plan(scheduler.schedule()) == "a:10 b:188"  # 2 are

    scheduler = make_scheduler(
        num_usable_pages=200, page_size=1, max_num_batched_tokens=500, max_model_len=201
    )
    add(scheduler, "b", 200, max_tokens=1)
    assert plan(scheduler.schedule()) == "b:200"  # nobody runs who could grow


def test_preemption_takes_the_youngest_and_logs_it(caplog):
    scheduler = make_scheduler(num_usable_pages=4, page_size=2)
    first = add(scheduler, "a", 3, max_tokens=6)
    second = add(scheduler, "b", 3, max_tokens=6)
    for _ in range(2):  # positions 0 to 3 fill the two pages of each
        step = scheduler.schedule()
        read(step)
    assert plan(step) == "a:1 b:1"
    with caplog.at_level("INFO", logger="jpaged.scheduler"):
        step = scheduler.schedule()
    assert plan(step) == "a:1"
    assert [record.getMessage() for record in caplog.records] == [
        "preempted request 'b' (sequence 0), as request 'a' needs pages: 2 pages to compute again "
        "(4 tokens)"
    ]
    assert scheduler.num_preemptions == 1
    assert (first.status, second.status) == (Status.RUNNING, Status.WAITING)
    assert (second.table_id, second.num_computed_tokens) == (None, 0)
    # Its five known tokens need three pages, and one is free.
    read(step)
    assert plan(scheduler.schedule()) == "a:1"
    scheduler.finish(first, "stop")
    step = scheduler.schedule()
    assert plan(step) == "b:5"
    assert step.num_prefill_tokens == 5
    assert step.input_slots == [-1]


def test_a_preempted_sequence_goes_before_those_that_have_not_started():
    scheduler = make_scheduler(num_usable_pages=4, page_size=2)
    first = add(scheduler, "a", 3, max_tokens=6)
    add(scheduler, "b", 3, max_tokens=6)
    add(scheduler, "c", 1, max_tokens=2)
    for _ in range(3):
        read(scheduler.schedule())
    assert scheduler.num_preemptions == 1
    assert scheduler.num_waiting == 2
    scheduler.finish(first, "stop")
    assert plan(scheduler.schedule()) == "b:5 c:1"


def test_the_pages_of_a_sequence_that_ends_by_length_are_free_one_step_later():
    scheduler = make_scheduler(num_usable_pages=1, page_size=4)
    first = add(scheduler, "a", 3, max_tokens=2)
    second = add(scheduler, "b", 3, max_tokens=2)
    assert plan(scheduler.schedule()) == "a:3"
    assert plan(scheduler.schedule()) == "a:1"
    assert (first.status, scheduler.num_running) == (Status.DRAINING, 0)
    assert scheduler.table.pool.num_free_pages == 0
    # Before the host has read any of its tokens.
    assert plan(scheduler.schedule()) == "b:3"
    assert first.num_inflight_tokens == 2
    assert second.status is Status.RUNNING
    scheduler.finish(first, "length")
    assert (first.status, first.finish_reason) == (Status.FINISHED, "length")
    assert scheduler.table.pool.num_used_pages == 1
    scheduler.table.check_invariants()


def test_max_reserves_all_pages_when_it_admits():
    scheduler = make_scheduler(num_usable_pages=7, max_model_len=10, reservation="max")
    first = add(scheduler, "a", 2, max_tokens=4)
    second = add(scheduler, "b", 2, max_tokens=4)
    third = add(scheduler, "c", 2, max_tokens=4)
    assert plan(scheduler.schedule()) == "a:2 b:2"
    held = [scheduler.table.pages(seq.table_id) for seq in (first, second)]
    assert [len(pages) for pages in held] == [3, 3]
    assert third.status is Status.WAITING
    for _ in range(3):
        step = scheduler.schedule()
        assert plan(step) == "a:1 b:1"
        assert step.copies == []
        assert [scheduler.table.pages(seq.table_id) for seq in (first, second)] == held
        read(step)
    assert plan(scheduler.schedule()) == "c:2"
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize("when", ["waiting", "running", "draining", "drained", "preempted"])
def test_finish_frees_the_pages_of_a_sequence_in_every_status(when):
    scheduler = make_scheduler(num_usable_pages=4, page_size=2)
    add(scheduler, "a", 3, max_tokens=6)
    seq = add(scheduler, "b", 3, max_tokens=2 if when.startswith("drain") else 6)
    steps = {"waiting": 0, "running": 1, "draining": 2, "drained": 3, "preempted": 3}[when]
    for _ in range(steps):
        read(scheduler.schedule())
    status = {"waiting": Status.WAITING, "preempted": Status.WAITING, "running": Status.RUNNING}
    assert seq.status is status.get(when, Status.DRAINING)
    holds = when in ("running", "draining")
    assert (seq.table_id is not None) == holds
    used = scheduler.table.pool.num_used_pages
    scheduler.finish(seq, "abort")
    assert (seq.status, seq.finish_reason, seq.table_id) == (Status.FINISHED, "abort", None)
    assert scheduler.table.pool.num_used_pages == used - 2 * holds
    assert scheduler.num_waiting + scheduler.num_running == 1
    scheduler.table.check_invariants()
    # A second time does nothing.
    scheduler.finish(seq, "length")
    assert seq.finish_reason == "abort"
    assert scheduler.table.pool.num_used_pages == used - 2 * holds
    # The other one goes on alone.
    step = scheduler.schedule()
    assert [row.request.request_id for row in step.seqs] == ["a"]
    scheduler.table.check_invariants()


def test_finishing_one_sample_leaves_the_others_their_pages():
    scheduler = make_scheduler()
    first = add(scheduler, "a", 6, n=2)
    scheduler.schedule()
    second = first.request.sequences[1]
    pages = scheduler.table.pages(second.table_id)
    scheduler.finish(first, "stop")
    assert scheduler.table.pages(second.table_id) == pages
    assert scheduler.table.pool.num_used_pages == 2
    step = scheduler.schedule()
    assert (plan(step), step.copies) == ("a1:1", [])


def test_a_request_is_finished_when_all_its_samples_are():
    scheduler = make_scheduler()
    first = add(scheduler, "a", 3, n=2)
    request = first.request
    assert not request.finished
    scheduler.schedule()
    scheduler.finish(first, "stop")
    assert not request.finished
    scheduler.finish(request.sequences[1], "stop")
    assert request.finished


def test_a_request_whose_samples_have_not_forked_yet_is_not_finished():
    scheduler = make_scheduler()
    seq = add(scheduler, "a", 3, n=2)
    scheduler.finish(seq, "abort")
    assert not seq.request.finished


def test_an_aborted_waiting_sequence_is_never_scheduled():
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, "a", 3)
    gone = add(scheduler, "b", 3)
    add(scheduler, "c", 3)
    scheduler.schedule()
    assert scheduler.num_waiting == 2
    scheduler.finish(gone, "abort")
    assert scheduler.num_waiting == 1
    assert (gone.status, gone.finish_reason) == (Status.FINISHED, "abort")
    rows = [seq.request.request_id for _ in range(20) for seq in scheduler.schedule().seqs]
    assert set(rows) == {"a", "c"}


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused():
    scheduler = make_scheduler(max_model_len=8)
    message = (
        "request 'a': a prompt of 8 tokens leaves no room for an answer in max_model_len=8; "
        "shorten the prompt or raise max_model_len"
    )
    with pytest.raises(RequestTooLongError, match=re.escape(message)):
        add(scheduler, "a", 8)
    assert not scheduler.has_work
    add(scheduler, "b", 7)
    assert scheduler.num_waiting == 1


def test_a_request_larger_than_the_pool_is_refused():
    scheduler = make_scheduler(num_usable_pages=2)
    message = (
        "request 'a': 5 prompt tokens and up to 5 more need 3 pages of 4 tokens, but the pool has "
        "2; lower max_tokens or raise num_pages"
    )
    with pytest.raises(RequestTooLongError, match=re.escape(message)):
        add(scheduler, "a", 5, max_tokens=5)
    assert not scheduler.has_work
    # Of 9 tokens, 8 need a cell: the last is never attended to.
    seq = add(scheduler, "b", 5, max_tokens=4)
    while scheduler.has_work:
        read(scheduler.schedule())
    assert len(seq.token_ids) == 9


def test_max_model_len_bounds_what_a_request_can_need():
    scheduler = make_scheduler(num_usable_pages=2, max_model_len=9)
    assert add(scheduler, "a", 5, max_tokens=1000).max_total_tokens == 9


def test_a_reservation_larger_than_the_pool_is_refused():
    scheduler = make_scheduler(num_usable_pages=2, max_model_len=9, reservation="max")
    with pytest.raises(RequestTooLongError, match="need 3 pages of 4 tokens, but the pool has 2"):
        add(scheduler, "a", 1, max_tokens=1)


def test_more_samples_than_places_start_as_places_become_free():
    scheduler = make_scheduler(max_num_seqs=3)
    request = add(scheduler, "a", 5, n=7, max_tokens=2).request
    add(scheduler, "b", 2)
    step = scheduler.schedule()
    assert (plan(step), sampled(step)) == ("a:5", ["a", "a1", "a2"])
    assert plan(scheduler.schedule()) == "a:1 a1:1 a2:1"
    # The three are done. The next one finds the full page of the prompt, and forks the others.
    step = scheduler.schedule()
    assert (plan(step), sampled(step)) == ("a3:1", ["a3", "a4", "a5"])
    assert (step.num_hit_tokens, step.num_lookup_tokens) == (4, 5)
    assert plan(scheduler.schedule()) == "a3:1 a4:1 a5:1"
    assert len(request.sequences) == 7
    assert plan(scheduler.schedule()) == "a6:1 b:2"
    scheduler.check_invariants()


def test_more_beams_than_a_step_computes_are_refused():
    for budgets in ({"max_num_seqs": 3}, {"max_num_batched_tokens": 3}):
        scheduler = make_scheduler(**budgets)
        message = (
            "request 'a': beam_width=4 exceeds the 3 beams that a step computes: lower it, or "
            "raise max_num_seqs and max_num_batched_tokens"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            add(scheduler, "a", 2, beam_width=4)
        assert not scheduler.has_work
        add(scheduler, "b", 2, beam_width=3)


def test_a_fork_waits_behind_those_whose_request_runs():
    """Else it would stand between the samples of one request."""
    scheduler = make_scheduler(max_num_seqs=3, prefix_cache=True)
    parent = add(scheduler, "p", 3, max_tokens=3).request
    add(scheduler, "a", 2, n=4, max_tokens=9)
    read(scheduler.schedule())
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 1)
    child = add(make_scheduler(), "f", 3).request
    child.sequences[0].token_ids.append(0)
    scheduler.fork(parent, child)
    for _ in range(12):
        read(scheduler.schedule())
        scheduler.check_invariants()
    assert child.sequences[0].num_computed_tokens > 0


def test_beams_that_could_outgrow_the_pool_are_refused():
    # The full page of the prompt is shared; each beam may need two more.
    scheduler = make_scheduler(num_usable_pages=6)
    message = (
        "request 'a': 5 prompt tokens and up to 8 more for each of 3 beams need 7 pages of 4 "
        "tokens, but the pool has 6; lower max_tokens or raise num_pages"
    )
    with pytest.raises(RequestTooLongError, match=re.escape(message)):
        add(scheduler, "a", 5, max_tokens=8, beam_width=3)
    add(scheduler, "b", 5, max_tokens=8, beam_width=2)


def test_several_samples_cannot_share_what_max_reserves():
    scheduler = make_scheduler(reservation="max")
    message = (
        "request 'a': samples and beams need shared pages, which reservation='max' does not have; "
        "use n=1 or reservation='paged'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        add(scheduler, "a", 2, n=2)
    assert not scheduler.has_work


@pytest.mark.parametrize("budget", ["max_num_batched_tokens", "max_num_seqs", "max_model_len"])
def test_budgets_below_one_are_refused(budget):
    with pytest.raises(ValueError, match=f"{budget}=0 must be at least 1"):
        make_scheduler(**{budget: 0})


def test_an_unknown_reservation_is_refused():
    with pytest.raises(ValueError, match=re.escape("reservation='none' must be 'paged' or 'max'")):
        make_scheduler(reservation="none")
