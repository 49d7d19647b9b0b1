# SPDX-License-Identifier: Apache-2.0
"""Schedulers without a device, what is asked of them, and their steps as text."""

from jpaged.host.admission import SchedulerConfig, check_fits
from jpaged.host.groups import ONE_GROUP
from jpaged.host.growth import growth_of
from jpaged.host.page_pool import PagePool
from jpaged.host.page_table import PageTable
from jpaged.host.params import SamplingParams
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import Request, Status


def make_scheduler(num_usable_pages=32, page_size=4, kinds=ONE_GROUP, **config):
    defaults = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "max_model_len": 32}
    defaults |= {"prefix_cache": False}
    config = SchedulerConfig(**(defaults | config))
    pages_per_seq = -(-config.max_model_len // page_size)
    pool = PagePool(num_usable_pages + 1)
    return Scheduler(config, PageTable(pool, page_size, pages_per_seq, kinds))


def add(scheduler, request_id, prompt_len, max_tokens=8, first=0, **params):
    params = SamplingParams(max_tokens=max_tokens, **params).resolve()
    prompt, max_model_len = list(range(first, first + prompt_len)), scheduler.config.max_model_len
    growth = growth_of(params, prompt, min(max_tokens, max_model_len - prompt_len), ())
    request = Request(
        request_id, prompt, params, seed=0, max_model_len=max_model_len, growth=growth
    )
    check_fits(request, scheduler.config, scheduler.table)
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
    return " ".join(f"{named(*row.key)}:{row.num_tokens}" for row in step.plan.rows.each())


def sampled(step):
    return [name(seq) for seq in step.samples]


def name(seq):
    return named(*seq.key)


def named(request_id, sample_index):
    return f"{request_id}{sample_index or ''}"


def sources(step):
    return list(step.plan.rows.sources)
