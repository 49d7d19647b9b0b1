# SPDX-License-Identifier: Apache-2.0
"""Chooses the tiles of the TPU attention kernel by what the TPU compiler makes of them.

    make libtpu
    python -m scripts.kernels.tune_tpu --targets=v5e,v6e

Prints the rows of `pallas_kernels.tuning.TPU_ROWS`: for each generation and shape, the group of
pages whose decode loop has the fewest bundles per KV token, without a spilled register where that
can be, and then the tile of queries whose prefill loop has the fewest per query, KV head and token.
The smallest that comes within 10 % is taken, as the last tile of a sequence is seldom full. Bundles
rank variants of one kernel on one chip; they are no time. No TPU is used or needed.
"""

import math

import tqdm
from absl import app, flags

from jpaged.pallas_kernels.aot import TARGETS, TpuCompiler
from jpaged.pallas_kernels.aot.cases import AttentionShape
from jpaged.pallas_kernels.aot.tpu_kernels import KernelFacts, compile_attention
from jpaged.pallas_kernels.tuning import TpuRow, TpuTiles
from jpaged.scripts.flags import check_names, run
from jpaged.scripts.kernels.shapes import ATTENTION_SHAPES

_TARGETS = flags.DEFINE_list("targets", list(TARGETS), "Generations to choose for.")
_SHAPES = flags.DEFINE_list("shapes", list(ATTENTION_SHAPES), "Shapes of models to choose for.")
_GROUP_TOKENS = (128, 256, 512)
_Q_TILES = (16, 32, 64, 128)
# More rows a KV head gain less than 15 %, and take more vector memory and compilation time.
_MAX_HEAD_QUERIES = 256
# A tile of prefill computes its KV heads one after the other, so two stand for all.
_PREFILL_KV_HEADS = 2


def main(argv: list[str]) -> None:
    """Prints a row a target and shape."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    check_names("targets", _TARGETS.value, TARGETS)
    check_names("shapes", _SHAPES.value, ATTENTION_SHAPES)
    try:
        compiler = TpuCompiler(schedules=True)
    except RuntimeError as e:
        raise app.UsageError(str(e)) from e
    # Windows and caps are left out: they concern masks, which the loops that count have not.
    shapes = [ATTENTION_SHAPES[name] for name in _SHAPES.value]
    heads = {(s.num_q_heads, s.num_kv_heads, s.head_dim) for s in shapes}
    work = [
        (target, AttentionShape(*shape)) for target in _TARGETS.value for shape in sorted(heads)
    ]
    for target, shape in tqdm.tqdm(work, unit="row"):
        print(choose(compiler, target, shape), flush=True)
    compiler.close()


def choose(compiler: TpuCompiler, target: str, shape: AttentionShape) -> str:
    """One row, as Python."""
    decode = {
        tokens: compile_attention(
            compiler, target, shape, tiles=TpuTiles(group_tokens=tokens, q_tile=8)
        )
        for tokens in _GROUP_TOKENS
    }
    no_spill = {n: facts for n, facts in decode.items() if facts.spill_bytes == 0}
    group_tokens = _smallest_good({n: _cost(facts) for n, facts in (no_spill or decode).items()})
    group = shape.num_q_heads // shape.num_kv_heads
    kv_heads = min(shape.num_kv_heads, _PREFILL_KV_HEADS)
    some_heads = AttentionShape(kv_heads * group, kv_heads, shape.head_dim)
    prefill = {
        q_tile: compile_attention(
            compiler,
            target,
            some_heads,
            num_tokens=1024,
            num_rows=8,
            tiles=TpuTiles(group_tokens=group_tokens, q_tile=q_tile),
        )
        for q_tile in _Q_TILES
        if q_tile * group <= _MAX_HEAD_QUERIES
    }
    q_tile = _smallest_good({n: _cost(facts, n * kv_heads) for n, facts in prefill.items()})
    by_group = ", ".join(f"{n}: {_show(facts)}" for n, facts in decode.items())
    by_tile = ", ".join(f"{n}: {_show(facts, n * kv_heads)}" for n, facts in prefill.items())
    key = (target, shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
    return f"{key}: {TpuRow(TpuTiles(group_tokens, q_tile), by_group, by_tile)},"


def _cost(facts: KernelFacts, queries: int = 1) -> float:
    return math.inf if facts.bundles_per_kv_token is None else facts.bundles_per_kv_token / queries


def _smallest_good(costs: dict[int, float]) -> int:
    return min(size for size, cost in costs.items() if cost <= 1.1 * min(costs.values()))


def _show(facts: KernelFacts, queries: int = 1) -> str:
    return f"{_cost(facts, queries):.3g}{'s' if facts.spill_bytes else ''}"


if __name__ == "__main__":
    run(main)
