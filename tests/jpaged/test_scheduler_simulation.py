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
import zlib

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from jpaged.host.admission import SchedulerConfig
from jpaged.host.growth import growth_of
from jpaged.host.growth.base import Candidate
from jpaged.host.page_pool import NULL_PAGE, PagePool
from jpaged.host.page_table import PageTable
from jpaged.host.params import SamplingParams
from jpaged.host.preemption import PreemptionCosts
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import Request, Status


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
        self.addressed = set()
        address = self.scheduler.cache.address

        def remembered(*args, **kwargs):
            pages = address(*args, **kwargs)
            self.addressed.update(pages)
            return pages

        self.scheduler.cache.address = remembered
        self.requests = [self.make_request(str(index), job) for index, job in enumerate(jobs)]
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

    def make_request(self, request_id, job):
        prompt = prompt_of((job.family, job.prompt_len))
        params = SamplingParams(
            max_tokens=job.max_tokens,
            n=job.n,
            beam_width=job.beam_width,
            early_stopping=job.early_stopping,
            length_penalty=job.length_penalty,
        ).resolve()
        most = self.config.max_model_len
        growth = growth_of(params, prompt, min(job.max_tokens, most - len(prompt)), (BEAM_STOP,))
        return Request(request_id, prompt, params, seed=0, max_model_len=most, growth=growth)

    def seq_of(self, row):
        """The sequence that a planned row is for."""
        request_id, sample_index = row.key
        return self.requests[int(request_id)].sequences[sample_index]

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
            self.addressed.clear()
            step = self.scheduler.schedule()
            self.num_steps += 1
            rows = [(self.seq_of(row), row) for row in step.plan.rows.each()]
            if not rows:
                # Beams whose last step has not been read are all that there is to do.
                assert previous is not None and previous[0].searchers
                assert self.scheduler.num_running, "nobody waits for an idle device"
            elif oldest is not None and not (oldest.request.growth.chooser and previous):
                assert rows[0][0].request is oldest.request, "the oldest must always go on"
            self.check_budgets(step)
            self.check_order(step)
            for seq, row in rows:
                assert row.table_id == seq.table_id
                assert row.start + row.num_tokens == seq.num_computed_tokens
                assert seq not in computed or row.start == computed[seq], "tokens skipped"
            results = self.execute(step)
            if rows:
                self.inflight = step, *results
            self.check_memory()
            self.check_counts()
            self.scheduler.check_invariants()
        if previous is not None:
            self.process(*previous)
            self.scheduler.check_invariants()

    def execute(self, step):
        """The device: copies pages, writes cells, attends and samples."""
        samples, step = step.samples, step.plan
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
        rows = [(self.seq_of(row), row) for row in step.rows.each()]
        for seq, row in rows:
            pages, end = self.table.pages(row.table_id), row.start + row.num_tokens
            tokens = row.token_ids
            if row.source >= 0:
                assert row.num_tokens == 1 and end == len(seq.token_ids) + 1
                assert self.previous_samples[row.source] is seq
                tokens = [self.previous_tokens[row.source]]
            assert len(tokens) == row.num_tokens, "tokens that the host does not know yet"
            for position, token in enumerate(tokens, row.start):
                page, cell = pages[position // size], position % size
                assert page != NULL_PAGE
                assert (page, cell) not in written, "two rows write one cell"
                written.add((page, cell))
                assert not self.table.pool.is_kept(page) or page in self.addressed
                self.memory[page][cell] = token

        tokens = []
        seqs = [seq for seq, _ in rows]
        for seq, sample in zip(samples, step.samples.each(), strict=True):
            parent, row = rows[sample.row]
            assert parent is seq or (parent.request is seq.request and seq not in seqs)
            assert parent.num_computed_tokens == seq.num_computed_tokens
            assert sample.offset == row.num_tokens - 1
            assert sample.draw.sample_index == seq.sample_index
            self.num_forked_rows += parent is not seq
            tokens.append(draw(seq.sample_index, self.attended(parent)))
        self.previous_samples, self.previous_tokens = samples, tokens
        candidates = []
        for search in step.searches:
            first, count = search.first_sample, len(search.scores)
            beams = samples[first : first + count]
            (request,) = {beam.request for beam in beams}
            assert beams == tuple(request.sequences)
            contexts = [self.attended(beam) for beam in beams]
            best = continuations(list(zip(contexts, search.scores, strict=True)))
            candidates.append(best[: search.num_candidates])
        return tokens, candidates

    def process(self, step, tokens, candidates):
        """`Engine._process`, less what only reports."""
        for request, best in zip(step.searchers, candidates, strict=True):
            if request.sequences[0].status is not Status.FINISHED:
                parents = request.growth.chooser.accept([Candidate(*each) for each in best])
                self.scheduler.continue_from(request, parents)
        for seq, token in zip(step.samples, tokens, strict=True):
            if seq.status is Status.FINISHED or seq.request.growth.chooser is not None:
                continue
            seq.num_inflight_tokens -= 1
            seq.token_ids.append(token)
            if len(seq.generated_token_ids) == self.stop_of(seq):
                self.scheduler.finish(seq, "stop")
            elif len(seq.token_ids) >= seq.max_total_tokens:
                self.scheduler.finish(seq, "length")

    def check_budgets(self, step):
        plan, num_tokens = step.plan, sum(step.plan.rows.num_tokens)
        seqs = [self.seq_of(row) for row in plan.rows.each()]
        assert num_tokens == plan.num_tokens <= self.config.max_num_batched_tokens
        assert len(seqs) <= self.config.max_num_seqs
        assert len(step.samples) == plan.num_samples <= self.config.max_num_seqs
        assert len(set(seqs)) == len(seqs)
        assert len(set(step.samples)) == len(step.samples)
        assert min(plan.rows.num_tokens, default=1) >= 1
        assert 0 <= plan.num_prefill_tokens <= num_tokens
        running = [seq for seq in self.live() if seq.status is Status.RUNNING]
        assert len(running) <= self.config.max_num_seqs
        has_beams = any(seq.request.growth.chooser is not None for seq in running)
        if num_tokens < self.config.max_num_batched_tokens and not has_beams:
            # Nobody who runs is left waiting for a budget that is there.
            assert {seqs[row] for row in plan.samples.rows} == set(seqs)
            assert {*running} <= {*step.samples}

    def check_order(self, step):
        seqs = [self.seq_of(row) for row in step.plan.rows.each()]
        for seq in seqs:
            if seq.request not in self.started:
                self.started.append(seq.request)
                before = self.added[: self.added.index(seq.request)]
                late = [r for r in before if r not in self.started and r not in self.aborted]
                assert not late, "started before an earlier request"
        assert seqs == sorted(seqs, key=self.age)
        running = [self.age(seq) for seq in self.live() if seq.status is Status.RUNNING]
        waiting = [self.age(seq) for seq in self.live() if seq.status is Status.WAITING]
        if running and waiting:
            assert max(running) < min(waiting), "preempted an older one, or admitted a younger one"

    def check_memory(self):
        """Whoever holds pages finds its own tokens there, in order, scheduled or not."""
        holders = [seq for seq in self.live() if seq.table_id is not None]
        for seq in holders:
            assert self.table.num_tokens(seq.table_id) == seq.num_computed_tokens
            if seq.request.growth.chooser is not None:
                expected = list(seq.token_ids)
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
        found = request.growth.best(job.beam_width, finished=True)
        assert [beam.score for beam in found] == pytest.approx([score for score, _ in expected])
        assert [beam.token_ids for beam in found] == [tokens for _, tokens in expected]

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
        if seq.request.growth.chooser is not None:
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
