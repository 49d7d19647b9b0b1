# SPDX-License-Identifier: Apache-2.0
"""What the two ways of preemption cost on this machine."""

import time
from collections.abc import Callable

import jax
import numpy as np

from jpaged.device.memory import PoolPlan, default_dtype
from jpaged.host.admission import SchedulerConfig
from jpaged.host.config import EngineConfig
from jpaged.host.preemption import NO_COSTS, PreemptionCosts
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder

_COPY_BYTES = 4 * 2**20
_MATMUL = (128, 1024, 1024)


def scheduler_config_of(
    config: EngineConfig, model_config: ModelConfig, plan: PoolPlan
) -> SchedulerConfig:
    """An engine's budgets, and what preemption costs where there is a choice."""
    num_host_pages, costs = plan.num_host_pages(config), NO_COSTS
    if num_host_pages:
        costs = preemption_costs(config, model_config, plan.page_bytes)
    return SchedulerConfig(
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=plan.max_model_len,
        reservation=config.reservation,
        prefix_cache=config.prefix_cache,
        preemption=config.preemption,
        num_host_pages=num_host_pages,
        costs=costs,
    )


def preemption_costs(
    config: EngineConfig, model_config: ModelConfig, page_bytes: int
) -> PreemptionCosts:
    """What a page costs to swap and a token to recompute: as the config says, or as measured.

    Measured are a copy between host and device, and a matrix product: two operations a weight and
    token are what most of a prefill is.

    Args:
      config: gives swap_bytes_per_s and flops_per_s, or None to measure them.
      model_config: gives the number of weights.
      page_bytes: bytes of a page over all layers.
    """
    bytes_per_s = config.swap_bytes_per_s or _copied_bytes_per_s()
    flops_per_s = config.flops_per_s or _matmul_flops_per_s(config)
    flops_per_token = 2 * Decoder(model_config).num_params
    return PreemptionCosts(2 * page_bytes / bytes_per_s, flops_per_token / flops_per_s)


def _copied_bytes_per_s() -> float:
    source = np.ones(_COPY_BYTES, np.uint8)

    def copy():
        # A copy of the result too: on a CPU, it could be the source itself.
        return np.array(jax.device_put(source), copy=True)

    # There and back.
    return 2 * _COPY_BYTES / _best_s(copy)


def _matmul_flops_per_s(config: EngineConfig) -> float:
    rows, inner, columns = _MATMUL
    dtype = default_dtype(config)
    x, w = (jax.device_put(np.ones((n, inner), dtype)) for n in (rows, columns))
    multiply = jax.jit(lambda x, w: jax.lax.dot_general(w, x, (((1,), (1,)), ((), ()))))
    return 2 * rows * inner * columns / _best_s(lambda: multiply(x, w).block_until_ready())


def _best_s(function: Callable[[], object]) -> float:
    function()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
