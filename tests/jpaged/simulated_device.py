# SPDX-License-Identifier: Apache-2.0
"""A device that is a dictionary, for the scheduler to be run against.

`Simulation` drives a scheduler as the engine does, one step ahead of the samples, and executes each
step on simulated memory. A sampled token is a hash of everything the row attends to, read back from
that memory, so a wrong page, a lost copy or a cell of another sequence changes every later token.
`tests.jpaged.expected` has the same tokens from lists alone.
"""

import collections
import math

import pytest

from jpaged.host.admission import RequestTooLongError, SchedulerConfig, check_fits
from jpaged.host.burst import can_burst
from jpaged.host.groups import ONE_GROUP
from jpaged.host.growth import growth_of
from jpaged.host.growth.base import Candidate
from jpaged.host.page_pool import NULL_PAGE, PagePool
from jpaged.host.page_table import PageTable
from jpaged.host.params import SamplingParams
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import Request, Status
from tests.jpaged.expected import (
    BEAM_STOP,
    continuations,
    draw,
    expected_beams,
    expected_tokens,
    first_seen,
    prompt_of,
)


class Simulation:
    """Runs jobs to their end and checks every step on the way."""

    def __init__(
        self, jobs, *, num_usable_pages, page_size, kinds=ONE_GROUP, decode_steps=1, **config
    ):
        self.decode_steps = decode_steps
        self.config = SchedulerConfig(**config)
        self.page_size = page_size
        self.jobs = jobs
        pages_per_seq = -(-self.config.max_model_len // page_size)
        self.kinds = kinds
        self.table = PageTable(PagePool(num_usable_pages + 1), page_size, pages_per_seq, kinds)
        self.scheduler = Scheduler(self.config, self.table)
        self.addressed = set()
        address = self.scheduler.cache.address_pages

        def remembered(*args, **kwargs):
            pages = address(*args, **kwargs)
            self.addressed.update(pages)
            return pages

        self.scheduler.cache.address_pages = remembered
        self.requests = [self.make_request(str(index), job) for index, job in enumerate(jobs)]
        self.host_memory = {}
        self.memory = collections.defaultdict(lambda: [None] * page_size)
        self.inflight = None
        self.previous_samples = []
        self.previous_tokens = []
        self.aborted = set()
        self.added = []
        self.num_copies = self.num_forked_rows = self.num_steps = self.num_hits = 0
        self.num_swapped = self.num_extended = self.num_middle = 0

    def make_request(self, request_id, job):
        prompt = prompt_of((job.family, job.prompt_len))
        params = SamplingParams(
            max_tokens=job.max_tokens,
            n=job.n,
            beam_width=job.beam_width,
            early_stopping=job.early_stopping,
            length_penalty=job.length_penalty,
            priority=job.priority,
        ).resolve()
        most = self.config.max_model_len
        growth = growth_of(params, prompt, min(job.max_tokens, most - len(prompt)), (BEAM_STOP,))
        return Request(request_id, prompt, params, seed=0, max_model_len=most, growth=growth)

    def seq_of(self, row):
        """The sequence that a planned row is for."""
        request_id, sample_index = row.key
        return self.requests[int(request_id)].sequences[sample_index]

    def fits(self):
        """Whether no job is refused."""
        try:
            for request in self.requests:
                check_fits(request, self.config, self.table)
        except RequestTooLongError:
            return False
        return True

    def __repr__(self):
        pages = f"{self.table.pool.num_usable_pages} pages of {self.page_size}"
        return f"{self.jobs}, {pages}, {self.kinds}, {self.decode_steps} steps, {self.config}"

    def run(self):
        # The first in order computes a token or more in every step. Whoever comes before it, by
        # priority, may have it begin anew.
        limit = len({job.priority for job in self.jobs} | {0}) * sum(
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
        """`Engine.step`: dispatches steps, then reads the samples of those before."""
        previous, self.inflight = self.inflight, None
        if self.scheduler.has_work:
            first = self.first()
            statuses = {seq: seq.status for seq in self.live()}
            computed = {
                seq: seq.num_computed_tokens
                for seq in self.live()
                if seq.table_id is not None or seq.swapped is not None
            }
            self.addressed.clear()
            step = self.scheduler.schedule()
            rows = [(self.seq_of(row), row) for row in step.plan.rows.each()]
            if not rows:
                # Beams whose last step has not been read are all that there is to do.
                assert previous is not None and previous[0][0].searchers
                assert self.scheduler.num_running, "nobody waits for an idle device"
            elif first is not None and not (first.request.growth.chooser and previous):
                assert first.request in {seq.request for seq, _ in rows}, "the first must go on"
            self.check_plan(step, computed)
            self.check_order(step, statuses)
            steps = [step]
            while rows and len(steps) < self.decode_steps and can_burst(step):
                computed = {seq: seq.num_computed_tokens for seq in self.live()}
                after = self.scheduler.extend(steps[-1])
                if after is None:
                    break
                self.check_plan(after, computed)
                steps.append(after)
            # On the pages as the last one leaves them.
            results = [(each, *self.execute(each)) for each in steps]
            self.num_extended += len(steps) - 1
            if rows:
                self.inflight = results
            self.check_memory()
            self.check_counts()
            self.scheduler.check_invariants()
        for each in previous or ():
            self.process(*each)
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
            end = row.start + row.num_tokens
            tokens = row.token_ids
            if row.source >= 0:
                assert row.num_tokens == 1 and end > len(seq.token_ids)
                assert self.previous_samples[row.source] is seq
                tokens = [self.previous_tokens[row.source]]
            assert len(tokens) == row.num_tokens, "tokens that the host does not know yet"
            for pages in self.table.bundles(row.table_id):
                for page in pages[row.start // size : -(-end // size)]:
                    assert not self.table.pool.is_kept(page) or page in self.addressed
            for group in range(self.table.num_groups):
                pages = self.table.pages(row.table_id, group)
                for position, token in enumerate(tokens, row.start):
                    page, cell = pages[position // size], position % size
                    assert page != NULL_PAGE
                    assert (page, cell) not in written, "two rows write one cell"
                    written.add((page, cell))
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
            context = self.attended(parent, row.start, row.start + row.num_tokens)
            tokens.append(draw(seq.sample_index, context))
        self.previous_samples, self.previous_tokens = samples, tokens
        candidates = []
        for search in step.searches:
            first, count = search.first_sample, len(search.scores)
            beams = samples[first : first + count]
            (request,) = {beam.request for beam in beams}
            assert beams == tuple(request.sequences)
            starts = [rows[step.samples.rows[first + i]][1].start for i in range(count)]
            contexts = [self.attended(b, start) for b, start in zip(beams, starts, strict=True)]
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

    def check_plan(self, step, computed):
        """What holds of each step when it was just planned.

        Args:
          step: which.
          computed: tokens that sequences had computed before it.
        """
        self.num_steps += 1
        self.check_budgets(step)
        for row in step.plan.rows.each():
            seq = self.seq_of(row)
            assert row.table_id == seq.table_id
            assert row.start + row.num_tokens == seq.num_computed_tokens
            assert seq not in computed or row.start == computed[seq], "tokens skipped"

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

    def check_order(self, step, before):
        """Nobody overtakes, and who is preempted is of the last priority, and not the first.

        Args:
          step: planned by `schedule`.
          before: the statuses of all sequences before it.
        """
        ran = {seq for seq, status in before.items() if status is Status.RUNNING}
        waited = {seq for seq, status in before.items() if status is Status.WAITING}
        waiting = {seq for seq in self.live() if seq.status is Status.WAITING}
        started, lost = waited - waiting, ran & waiting
        # Beams that came back one by one, before others, as those that are there wait for them.
        apart = {seq.request for seq in started if seq.request.growth.num_rows > 1}
        seqs = [self.seq_of(row) for row in step.plan.rows.each()]
        for part in (ran, started):
            own = [seq for seq in seqs if seq in part and seq.request not in apart]
            assert own == sorted(own, key=self.age)
        for seq in started:
            if seq.request not in apart:
                assert self.age(seq) < min(map(self.age, waiting), default=(math.inf,)), "overtook"
        first = min(ran, key=self.age, default=None)
        kept = [self.age(seq)[0] for seq in ran - lost if seq.request is not first.request]
        for seq in lost:
            assert seq not in seqs, "what is in the step lost its pages"
            if seq.request is first.request:
                assert seq is not first and not kept, "preempted the first of several"
            assert seq.request is first.request or self.age(seq)[0] >= max(kept, default=-math.inf)
        self.num_middle += bool(lost) and min(map(self.age, lost)) < max(map(self.age, ran - lost))

    def first(self):
        """Who must go on: the first in order of those that run, or of all if none does."""
        live = [seq for seq in self.live() if not self.is_last(seq)]
        running = [seq for seq in live if seq.status is Status.RUNNING]
        first = min(running or live, key=self.age, default=None)
        if first is not None and first.request.growth.num_rows > 1:
            # It may wait for beams that wait for pages, which others have.
            if {seq.status for seq in first.request.sequences} > {Status.RUNNING}:
                return None
        return first

    def check_memory(self):
        """Whoever holds pages finds its own tokens there, in order, scheduled or not."""
        holders = [seq for seq in self.live() if seq.table_id is not None]
        for seq in holders:
            assert self.table.num_tokens(seq.table_id) == seq.num_computed_tokens
            expected = self.known_or_expected(seq)
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

    def attended(self, seq, start=None, end=None):
        """All that queries from `start` to `end`, or the next, attend to, in every group the same.

        What is below the windows of all groups is not read, but taken for right.
        """
        size, end = self.table.page_size, seq.num_computed_tokens if end is None else end
        known, contexts = self.known_or_expected(seq), []
        for kind in self.kinds:
            low = first_seen(kind.window, end if start is None else start)
            for _ in range(kind.num_groups):
                pages = self.table.pages(seq.table_id, len(contexts))
                cells = [self.memory[pages[p // size]][p % size] for p in range(low, end)]
                contexts.append(known[:low] + cells)
        # A group that differs is not what all say.
        return next((c for c in contexts if c != contexts[0]), contexts[0])

    def known_or_expected(self, seq):
        is_beam = seq.request.growth.chooser is not None
        return list(seq.token_ids) if is_beam else self.expected(seq)

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
        return seq.request.params.priority, self.added.index(seq.request), seq.sample_index

    def stop_of(self, seq):
        stops = self.jobs[int(seq.request.request_id)].stops
        return stops[seq.sample_index] if seq.sample_index < len(stops) else None
