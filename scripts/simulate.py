# SPDX-License-Identifier: Apache-2.0
"""Serves requests without a model, with pages and without, by a cost model.

    jpaged simulate --prompt_len=sharegpt --output_len=sharegpt --rate=2
    jpaged simulate --policies=paged --page_size=32 --n=4 --rate=inf
    jpaged simulate --policies=paged,paged-one-table --layers=26:512,512,512,512,512,full
    jpaged simulate --trace=AzureLLMInferenceTrace_conv.csv.gz --max_model_len=8192

Policy `paged` is the real scheduler, pool and page table; `contiguous-max`, `contiguous-pow2` and
`contiguous-oracle` reserve a block of a buddy allocator for each request, like the baselines of the
paper, Kwon et al. 2023 (`jpaged.simulation`). With `--layers`, layers that see a window and layers
that see everything have pages of their own; `paged-one-table` keeps all tokens for all of them.
`paged-last-victim` takes the last request's pages, whatever that frees, and `paged-spare-pages`
starts nobody without pages to spare: docs/decisions.md compares with both. A cost model of OPT-13B
on an A100 says how long steps take. docs/paper_figures.md has the paper's figures, reproduced so.
With `--trace`, requests and their times are those that somebody has served.

The last line of standard output is one JSON object: `workload` (`prompt_len`, `output_len`, `rate`,
`seed`, or `trace` and `time_scale`; `n`, `num_requests`, `prompt_mean`, `output_mean`, `num_cut`),
`num_slots`, `page_size`,
`layers` (the groups: `size`, and `kinds`, window and number of each), `costs` (the fields of
`CostModel`) and `runs`: for each policy the fields of `jpaged.simulation.Serving`, `live_share` and
`waste`.
"""

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import app, flags

from jpaged.host.groups import GroupKind
from jpaged.models.cache_groups import cache_groups, group_layers
from jpaged.models.config_json import config_from_hf
from jpaged.models.json_fields import ModelConfigError
from jpaged.models.shapes import SHAPES
from jpaged.scripts.flags import check_names, run
from jpaged.simulation.layers import LayerGroups
from jpaged.simulation.lengths import SPEC_HELP, parse_lengths
from jpaged.simulation.paper import BUDGETS, COSTS, LOADS, NUM_SLOTS, PAPER, VOCAB_SIZE
from jpaged.simulation.serving import PAGED_POLICIES, POLICIES, Serving, serve
from jpaged.simulation.traces import read_trace
from jpaged.simulation.workload import Workload, make_workload

_ALL = tuple(dict.fromkeys((*POLICIES, *PAGED_POLICIES)))
_POLICY = flags.DEFINE_list("policies", list(POLICIES), f"Among {', '.join(_ALL)}.")
_LAYERS = flags.DEFINE_string(
    "layers",
    "1:full",
    "The model's layers: how many, and in turn the tokens that they see, such as 24:128,full; or a "
    f"config.json, or its directory; or one of {', '.join(sorted(SHAPES))}.",
)
_PROMPT_LEN = flags.DEFINE_string("prompt_len", "sharegpt", f"Tokens of a prompt: {SPEC_HELP}.")
_OUTPUT_LEN = flags.DEFINE_string("output_len", "sharegpt", f"Tokens to generate: {SPEC_HELP}.")
_RATE = flags.DEFINE_float("rate", 2.0, "Requests a second; inf has all arrive at once.")
_TRACE = flags.DEFINE_string(
    "trace",
    None,
    "File of requests that were served, with their times, in place of what is drawn: Azure's CSV "
    "(TIMESTAMP,ContextTokens,GeneratedTokens) or Mooncake's JSON lines; may be .gz.",
)
_TIME_SCALE = flags.DEFINE_float(
    "time_scale", 1.0, "What the times of a trace are multiplied by; 0 has all arrive at once."
)
_NUM_REQUESTS = flags.DEFINE_integer(
    "num_requests", 600, "Requests; of a trace, from its first one on.", lower_bound=1
)
_N = flags.DEFINE_integer("n", 1, "Samples of each; paged alone shares.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of lengths and arrivals.", lower_bound=0)
_SLOTS = flags.DEFINE_integer("num_slots", NUM_SLOTS, "Tokens of memory.", lower_bound=1)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 16, "Tokens a page holds.", lower_bound=1)
_MAX_LEN = flags.DEFINE_integer("max_model_len", 2048, "Most of a request.", lower_bound=2)
_MAX_SEQS = flags.DEFINE_integer("max_num_seqs", 512, "Most at once.", lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer("max_num_batched_tokens", 2560, "Of a step.", lower_bound=1)
_PREFIX_CACHE = flags.DEFINE_bool(
    "prefix_cache",
    None,
    "Whether requests of policy paged use the pages of equal prefixes; by default those of a trace "
    "do, and others do not, as in the paper.",
)
_PREEMPTION = flags.DEFINE_enum(
    "preemption", "recompute", ["recompute", "swap", "auto"], "What preempted sequences go through."
)
_RECORD_STEPS = flags.DEFINE_string(
    "record_steps", None, "File for the steps of policy paged, one JSON object a line; may be .gz."
)
_RECORD = flags.DEFINE_string(
    "record", None, "File that tells whom policy paged gave which page when, for jpaged view."
)


def main(argv: list[str]) -> None:
    """Simulates and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    check_names("policies", _POLICY.value, _ALL)
    if _RECORD.value is not None and len(set(PAGED_POLICIES) & set(_POLICY.value)) != 1:
        raise app.UsageError(
            f"--record is of one policy with pages: give one of {', '.join(PAGED_POLICIES)}"
        )
    if not _RATE.value > 0:
        raise app.UsageError(f"rate={_RATE.value:g} must be above 0; inf has all arrive at once")
    if not 0 <= _TIME_SCALE.value < math.inf:
        raise app.UsageError(f"time_scale={_TIME_SCALE.value:g} must be at least 0, and finite")
    if _TRACE.value is not None:
        drawn = (_PROMPT_LEN, _OUTPUT_LEN, _RATE, _SEED)
        if given := [flag.name for flag in drawn if flag.present]:
            raise app.UsageError(f"--trace says what --{given[0]} would: give one of them")
    try:
        layers = parse_layers(_LAYERS.value, _MAX_LEN.value)
        work = _read_workload()
        runs = {
            policy: serve(
                policy,
                work,
                config=dataclasses.replace(
                    BUDGETS,
                    max_num_batched_tokens=_MAX_TOKENS.value,
                    max_num_seqs=_MAX_SEQS.value,
                    max_model_len=_MAX_LEN.value,
                    prefix_cache=(
                        _TRACE.value is not None
                        if _PREFIX_CACHE.value is None
                        else _PREFIX_CACHE.value
                    ),
                ),
                num_slots=_SLOTS.value,
                page_size=_PAGE_SIZE.value,
                preemption=_PREEMPTION.value,
                drain=True,
                progress=policy,
                record_steps=_RECORD_STEPS.value,
                record=_RECORD.value,
                layers=layers,
            )
            for policy in _POLICY.value
        }
    except ValueError as e:
        raise app.UsageError(str(e)) from e
    _print_table(runs)
    report = {
        "workload": _describe_source() | {"n": _N.value} | work.describe(),
        "num_slots": _SLOTS.value,
        "page_size": _PAGE_SIZE.value,
        "layers": {"size": layers.size, "kinds": layers.kinds},
        "costs": dataclasses.asdict(COSTS),
        "runs": {policy: own.as_dict() for policy, own in runs.items()},
    }
    print(json.dumps(report))


def _read_workload() -> Workload:
    if _TRACE.value is None:
        return make_workload(
            _NUM_REQUESTS.value,
            parse_lengths(_PROMPT_LEN.value, "prompt"),
            parse_lengths(_OUTPUT_LEN.value, "output"),
            max_model_len=_MAX_LEN.value,
            vocab_size=VOCAB_SIZE,
            seed=_SEED.value,
            num_samples=_N.value,
            rate=_RATE.value,
        )
    return read_trace(
        _TRACE.value,
        num_requests=_NUM_REQUESTS.value,
        max_model_len=_MAX_LEN.value,
        vocab_size=VOCAB_SIZE,
        time_scale=_TIME_SCALE.value,
        num_samples=_N.value,
    )


def _describe_source() -> dict[str, Any]:
    if _TRACE.value is not None:
        return {"trace": _TRACE.value, "time_scale": _TIME_SCALE.value}
    return {
        "prompt_len": _PROMPT_LEN.value,
        "output_len": _OUTPUT_LEN.value,
        "rate": _RATE.value if math.isfinite(_RATE.value) else None,
        "seed": _SEED.value,
    }


def parse_layers(text: str, max_model_len: int) -> LayerGroups:
    """The layers that a text names, see `--layers`, for sequences of so many tokens at most.

    Raises:
      ValueError: if it names none.
    """
    count, colon, pattern = text.partition(":")
    try:
        if text in SHAPES:
            groups = cache_groups(SHAPES[text], max_model_len)
        elif colon and count.isdecimal():
            sees = [None if each == "full" else int(each) for each in pattern.split(",")]
            if any(window is not None and window < 1 for window in sees) or not (
                1 <= int(count) <= 2**16
            ):
                raise ValueError("out of range")
            groups = group_layers([sees[i % len(sees)] for i in range(int(count))], max_model_len)
        else:
            path = pathlib.Path(text).expanduser()
            path = path / "config.json" if path.is_dir() else path
            fields = json.loads(path.read_text(encoding="utf-8"))
            groups = cache_groups(config_from_hf(fields), max_model_len)
    except ModelConfigError:
        raise
    except (OSError, ValueError) as e:
        raise ValueError(
            f"layers={text!r}: give a number of layers and what they see, such as 24:128,full, a "
            f"config.json, or one of {', '.join(sorted(SHAPES))} ({e})"
        ) from e
    kinds = tuple(GroupKind(*kind) for kind in groups.kinds)
    of_layers = collections.Counter(groups.windows[group] for group, _ in groups.places)
    return LayerGroups(groups.size, kinds, tuple(of_layers[kind.window] for kind in kinds))


def _print_table(runs: Mapping[str, Serving]) -> None:
    paper_live, paper_running = {}, {}
    load = _PROMPT_LEN.value
    if _TRACE.value is None and (LOADS.get(load), load) == (_RATE.value, _OUTPUT_LEN.value):
        paper_running = PAPER["running"][load]
        paper_live = PAPER["live"] if load == "sharegpt" else {}
    header = ("", "running", "(paper)", "live", "(paper)", "waste", "saved", "hits")
    header = (*header, "again", "waits", "step", "s/token", "first p50", "p99", "next p50", "p99")
    rows = [
        (
            policy,
            f"{own.mean_running:.2f}",
            _format(paper_running.get(policy), ".2f"),
            f"{own.live_share:.1%}",
            _format(paper_live.get(policy), ".1%"),
            f"{own.waste:.1%}",
            f"{own.saving:.1%}",
            f"{own.hit_rate:.1%}",
            f"{own.recomputed_share:.1%}",
            f"{own.saturated:.0%}",
            f"{own.mean_step_s * 1e3:.1f} ms",
            f"{own.latency_s_per_token:.3f}",
            *(f"{own.time_to_first_token_s[p]:.2f} s" for p in ("p50", "p99")),
            *(f"{own.time_per_output_token_s[p]:.3f} s" for p in ("p50", "p99")),
        )
        for policy, own in runs.items()
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print("live: share of the memory in demand that holds tokens; waits: of the time, requests did")
    print("hits: of prompts, what the prefix cache had; again: of tokens, computed another time")
    print("first: from arrival to the first token; next: for each token after it; of all requests")
    print("waste: share of the memory that requests have which they do not need and will not fill")


def _format(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


if __name__ == "__main__":
    run(main)
