# SPDX-License-Identifier: Apache-2.0
"""How an engine is set up."""

import dataclasses
import math
import re

from jpaged.host.checks import Rule, at_least, check_fields, instance_of, one_of

# The fields that are one of a few texts.
CHOICES = {
    "dtype": ("float32", "bfloat16", "float16"),
    "kv_dtype": ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn"),
    "reservation": ("paged", "max"),
    "preemption": ("auto", "recompute", "swap"),
    "backend": ("tpu", "gpu", "cpu", "xla"),
    "generation_config": ("model", "ignore"),
}

EIGHT_BITS = ("int8", "float8_e4m3fn")
"""Values of `kv_dtype` whose pages have scales."""

_SHAPE = r"[1-9]\d{0,9}x[1-9]\d{0,9}"
_FINITE = (Rule("finite and above 0", lambda value: 0 < value < math.inf),)
_RULES = {
    "page_size": at_least(1),
    "num_pages": at_least(2),
    "memory_fraction": (Rule("in (0, 1]", lambda fraction: 0 < fraction <= 1),),
    "max_num_seqs": at_least(1),
    "max_num_batched_tokens": at_least(1),
    "max_model_len": at_least(2),
    "decode_steps": (*at_least(1), Rule("at most 64", lambda count: count <= 64)),
    "swap_bytes": (
        Rule("at least 0", lambda count: count >= 0),
        Rule("below 2**63", lambda count: count < 2**63),
    ),
    "swap_bytes_per_s": _FINITE,
    "flops_per_s": _FINITE,
    "prompt_cache_bytes": (
        Rule("at least 1", lambda count: count >= 1),
        Rule("below 2**63", lambda count: count < 2**63),
    ),
    "prompt_cache_min_pages": at_least(1),
    "step_shapes": (
        Rule(
            "TOKENSxROWS, or a list of it with commas, such as 16x16,1024x16",
            lambda text: re.fullmatch(rf"{_SHAPE}(,{_SHAPE})*", text) is not None,
        ),
    ),
} | {name: one_of(*choices) for name, choices in CHOICES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """An engine's settings, checked when made; every field has a flag of its name in the scripts.

    What a model and the machine's memory allow is checked when an engine is made of them; see
    `jpaged.device.memory.plan_pool`.

    Attributes:
      page_size: tokens a page holds.
      num_pages: pages of the pool; None sizes it from free memory (see `memory_fraction`).
      memory_fraction: share of free device memory, or of the host's available memory on CPU, that
        the pool may take where num_pages is None; on CPU rounded down to one of a few sizes.
      max_num_seqs: sequences that run at once at most.
      max_num_batched_tokens: tokens a step computes at most, prefill and decode together.
      max_model_len: tokens a sequence has at most, prompt and generated together; None takes the
        model's max_position_embeddings.
      decode_steps: decode steps that are dispatched together at most, while no request waits, so
        that the device need not wait for the host between them. Outputs are the same, but streams
        get so many tokens at once, and what comes meanwhile waits for them. None takes 8, and 1 on
        CPU and where deterministic is set.
      dtype: of weights: "float32", "bfloat16" or "float16"; pages have the same, but float32 for
        bfloat16 weights on CPU. None takes float32 on CPU and bfloat16 elsewhere.
      kv_dtype: of keys and values in pages; None takes that of dtype, as said there. "int8" and
        "float8_e4m3fn" hold twice the tokens of "bfloat16" in the same memory, rounded: each layer
        has a scale for its keys and one for its values (see `kv_scales`).
      kv_scales: file with the scales of pages of eight bits, as `jpaged calibrate` writes it; None
        takes those that the checkpoint has for float8_e4m3fn, else calibrates when the engine is
        made, on a text of its own.
      reservation: "paged", or "max" to reserve max_model_len a sequence, for comparison.
      prefix_cache: whether a request uses the pages of earlier ones that began with the same
        tokens; they are kept until they are needed for something else. Without it, samples and
        beams of one request still find each other's pages.
      prompt_cache: directory that keeps pages of long prompts from one run to the next, for each
        process with the same model, settings, device and versions; see docs/prompt_cache.md. None
        keeps none.
      prompt_cache_bytes: that its files take at most; those that were used longest ago go.
      prompt_cache_min_pages: pages of a prefix that is kept there, or looked for, at least.
      preemption: what becomes of a sequence whose pages are needed: "recompute" computes its tokens
        again when there are pages, "swap" copies its pages to host memory and back, "auto" does
        what costs less.
      swap_bytes: host memory for the pages of preempted sequences; None takes as much as the pool
        has, but at most 1 GiB.
      swap_bytes_per_s: bytes a second between device and host, for "auto"; None measures it.
      flops_per_s: operations a second of a prefill, for "auto"; None measures a matrix product.
      deterministic: pads every step to one shape, so that results are the same to the last bit
        whatever else runs, at the price of speed: decode too takes as long as
        max_num_batched_tokens do.
      scan_layers: scan over the layers (compiles fast) instead of unrolling them (runs fast on
        CPUs and GPUs); None scans on TPUs alone.
      backend: "tpu", "gpu", "cpu" or "xla" kernels; None takes those of the default device, and on
        CPUs "xla" where "cpu" cannot be had: without llvmlite, or on an old processor.
      generation_config: "model" takes what the model's generation_config.json says for sampling
        parameters that are None; "ignore" reads its end-of-sequence tokens only.
      record_steps: file that the steps are written to, one JSON object a line, to be run again with
        `jpaged.device.replay`; compressed if its name ends in ".gz". None records none.
      record: file that tells over time who has which page, who lost theirs and why, for
        `jpaged view`; an earlier record of that name is replaced. None records nothing.
      compilation_cache_dir: where compiled programs are kept for the next start, for all of the
        process: a directory, or an address such as gs://bucket/path; "" keeps none. None takes
        jax's own setting, JAX_COMPILATION_CACHE_DIR, and without one ~/.cache/jpaged/xla.
      step_shapes: TOKENSxROWS, such as "16x16,1024x16": shapes that steps are padded to, instead of
        a ladder of powers of two, which a step that none of them holds still gets; `jpaged warmup`
        chooses them for a job. None has the ladder alone.
      strict_shapes: compiles all step shapes when the engine is made, and nothing but for `warm_up`
        later: a request that asks for more than that had (log-probabilities, beams, what changes
        logits) is refused when it is added, and a step of another shape ends with an error.
    """

    page_size: int = 16
    num_pages: int | None = None
    memory_fraction: float = 0.25
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_model_len: int | None = None
    decode_steps: int | None = None
    dtype: str | None = None
    kv_dtype: str | None = None
    kv_scales: str | None = None
    reservation: str = "paged"
    prefix_cache: bool = True
    prompt_cache: str | None = None
    prompt_cache_bytes: int = 2**33
    prompt_cache_min_pages: int = 8
    preemption: str = "auto"
    swap_bytes: int | None = None
    swap_bytes_per_s: float | None = None
    flops_per_s: float | None = None
    deterministic: bool = False
    scan_layers: bool | None = None
    backend: str | None = None
    generation_config: str = "model"
    record_steps: str | None = None
    record: str | None = None
    compilation_cache_dir: str | None = None
    step_shapes: str | None = None
    strict_shapes: bool = False

    def __post_init__(self):
        check_fields(self, _RULES)
        if self.kv_scales is not None and self.kv_dtype not in EIGHT_BITS:
            raise ValueError(
                f"kv_scales={self.kv_scales!r} needs kv_dtype of {' or '.join(EIGHT_BITS)}, not "
                f"{self.kv_dtype}: other pages have no scales"
            )
        if self.prompt_cache is not None:
            if not self.prefix_cache or self.reservation != "paged":
                raise ValueError(
                    f"prompt_cache={self.prompt_cache!r} needs the prefix cache, which finds what "
                    f"was read, but prefix_cache={self.prefix_cache} and "
                    f"reservation={self.reservation!r}; leave them as they are"
                )
            if self.record_steps is not None:
                raise ValueError(
                    f"prompt_cache={self.prompt_cache!r} and record_steps exclude each other: "
                    "steps that are run again would lack the pages that were read"
                )
        if self.deterministic and self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError(
                f"deterministic needs max_num_batched_tokens={self.max_num_batched_tokens} above "
                f"max_num_seqs={self.max_num_seqs}: one step shape must hold prefill and decode"
            )
        if self.deterministic and self.step_shapes is not None:
            raise ValueError(
                f"step_shapes={self.step_shapes!r} and deterministic, which has one shape, exclude "
                "each other"
            )
        most = self.max_num_batched_tokens, self.max_num_seqs
        for tokens, rows in step_shapes(self.step_shapes or ""):
            if tokens > most[0] or rows > most[1]:
                raise ValueError(
                    f"step_shapes has {tokens}x{rows}, TOKENSxROWS, and no step has more than "
                    f"max_num_batched_tokens={most[0]} or max_num_seqs={most[1]}"
                )


def step_shapes(text: str) -> list[tuple[int, int]]:
    """The tokens and rows that `EngineConfig.step_shapes` lists; none for an empty text."""
    return [(int(t), int(r)) for t, r in (shape.split("x") for shape in text.split(",") if shape)]


def engine_config(config: EngineConfig | None) -> EngineConfig:
    """The config itself, or one of defaults for None. Raises: ValueError, if it is no config."""
    return EngineConfig() if config is None else instance_of("config", config, EngineConfig)
