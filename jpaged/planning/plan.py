# SPDX-License-Identifier: Apache-2.0
"""What an engine would take of a device and hold in it, from a model's shape alone."""

import bisect
import dataclasses
import functools

import jax

from jpaged.device.memory import (
    DoesNotFitError,
    FreeMemory,
    PoolPlan,
    default_dtype,
    gib,
    pages_of_longest,
    plan_pool,
)
from jpaged.host.config import EngineConfig
from jpaged.host.groups import pages_of
from jpaged.models import sharding
from jpaged.models.cache_groups import cache_groups
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder
from jpaged.pallas_kernels.dispatch import BACKEND_OF_PLATFORM
from jpaged.planning.chips import DeviceMemory


@dataclasses.dataclass(frozen=True, kw_only=True)
class KindPlan:
    """The layers of a model that see equally far.

    Attributes:
      window: tokens that a query sees, itself included; None for all before it.
      num_layers: how many layers.
      num_groups: groups of them, each with pages of its own.
      token_bytes: of a token's keys and values in a device's pages, padding included.
    """

    window: int | None
    num_layers: int
    num_groups: int
    token_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What an engine takes and holds. Bytes are those of each device, where there are several.

    Attributes:
      num_params: parameters of the model.
      dtype: of weights.
      kv_dtype: of pages.
      platform: the devices', as jax names it.
      num_devices: over which heads are split.
      memory_bytes: that jax can allocate.
      memory_source: where that number comes from.
      weight_bytes: of the weights.
      kinds: layers by how far they see.
      page_size: tokens a page holds.
      page_bytes: of a page over the layers of a group.
      num_pages: pages of the pool, the reserved one included; 0 where there can be none.
      pool_reason: where that number comes from.
      host_swap_bytes: host memory for the pages of preempted sequences.
      max_model_len: tokens a sequence has at most.
      max_num_seqs: sequences that run at once at most.
      longest: tokens of the longest sequence that the pool holds, alone; at most max_model_len.
      prompt_len: tokens of the prompts that are asked about.
      output_len: tokens of their answers.
      pages_at_end: pages that such a sequence holds when its answer is whole.
      pages_half_way: pages when half of its answer is there.
      problems: what does not fit, a line each; empty where everything does.
      changes: what would make it fit, each by itself.
    """

    num_params: int
    dtype: str
    kv_dtype: str
    platform: str
    num_devices: int
    memory_bytes: int
    memory_source: str
    weight_bytes: int
    kinds: tuple[KindPlan, ...]
    page_size: int
    page_bytes: int
    num_pages: int
    pool_reason: str
    host_swap_bytes: int
    max_model_len: int
    max_num_seqs: int
    longest: int
    prompt_len: int
    output_len: int
    pages_at_end: int
    pages_half_way: int
    problems: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values over all layers, while every layer sees it."""
        return sum(kind.token_bytes for kind in self.kinds)

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pool."""
        return self.num_pages * self.page_bytes

    @property
    def seqs_at_end(self) -> int:
        """Sequences of the given lengths that the pool holds whole: none is ever preempted."""
        return max(self.num_pages - 1, 0) // self.pages_at_end

    @property
    def seqs_half_way(self) -> int:
        """Those that it holds half-way, as they are on average when some begin and others end."""
        return max(self.num_pages - 1, 0) // self.pages_half_way


@dataclasses.dataclass(frozen=True)
class Asked:
    """The arguments of `jpaged.planning.make_plan`, and what follows from them alone."""

    model_config: ModelConfig
    config: EngineConfig
    device: DeviceMemory
    num_devices: int
    prompt_len: int | None
    output_len: int | None

    @property
    def max_model_len(self) -> int:
        """Tokens a sequence has at most."""
        return self.config.max_model_len or self.model_config.max_position_embeddings

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of a prompt and its answer; what is None is what max_model_len leaves."""
        length, prompt, output = self.max_model_len, self.prompt_len, self.output_len
        if output is None:
            output = max(length // 2 if prompt is None else length - prompt, 1)
        return max(length - output, 1) if prompt is None else prompt, output

    @property
    def backend(self) -> str:
        """Whose kernels run, and whose layout the pool has."""
        return self.config.backend or BACKEND_OF_PLATFORM[self.device.platform]


def plan_of(asked: Asked) -> Plan:
    """The plan of what is asked, without the changes that would make it fit."""
    model, config, device = asked.model_config, asked.config, asked.device
    prompt_len, output_len = asked.lengths
    dtype = default_dtype(config, device.platform)
    weight_bytes = num_weights(model, asked.num_devices) * dtype.itemsize
    # Even where none fits there are pages to speak of.
    pool = plan_pool(
        dataclasses.replace(config, num_pages=2, swap_bytes=None),
        model,
        asked.backend,
        free_memory(asked, 2**62),
    )
    problems, fits = [], False
    if weight_bytes > device.num_bytes:
        problems.append(
            f"the weights take {gib(weight_bytes)}, more than the {gib(device.num_bytes)} that jax "
            "can allocate"
        )
    else:
        try:
            free = free_memory(asked, device.num_bytes - weight_bytes)
            pool, fits = plan_pool(config, model, asked.backend, free), True
        except DoesNotFitError as e:
            problems.append(str(e))
    page_bytes = pool.page_bytes // asked.num_devices
    num_pages = pool.num_pages if fits else 0
    longest = _longest(asked, pool, num_pages - 1)
    if fits and longest < asked.max_model_len:
        needed = pages_of_longest(config, pool.kinds, asked.max_model_len)
        problems.append(
            f"a sequence of max_model_len={asked.max_model_len} tokens takes {needed} pages, and "
            f"the pool has {num_pages - 1}: the engine refuses requests of more than {longest} "
            "tokens"
        )
    return Plan(
        num_params=Decoder(model).num_params,
        dtype=dtype.name,
        kv_dtype=pool.dtype.name,
        platform=device.platform,
        num_devices=asked.num_devices,
        memory_bytes=device.num_bytes,
        memory_source=device.source,
        weight_bytes=weight_bytes,
        kinds=_kinds(model, pool.max_model_len, page_bytes // config.page_size),
        page_size=config.page_size,
        page_bytes=page_bytes,
        num_pages=num_pages,
        pool_reason=pool.reason if fits else "none fits",
        host_swap_bytes=pool.num_host_pages(config) * pool.page_bytes if fits else 0,
        max_model_len=asked.max_model_len,
        max_num_seqs=config.max_num_seqs,
        longest=longest,
        prompt_len=prompt_len,
        output_len=output_len,
        # The last token is returned, never attended to: it needs no cell.
        pages_at_end=_pages(asked, pool, prompt_len + output_len - 1),
        pages_half_way=_pages(asked, pool, prompt_len + output_len // 2),
        problems=tuple(problems),
    )


def free_memory(asked: Asked, num_bytes: int) -> FreeMemory:
    """So many bytes of each device; of the host nothing is known."""
    name = f"memory beside the weights ({asked.device.platform})"
    return FreeMemory(
        num_bytes=num_bytes,
        name=name,
        platform=asked.device.platform,
        num_devices=asked.num_devices,
    )


@functools.lru_cache(maxsize=64)
def num_weights(model_config: ModelConfig, num_devices: int) -> int:
    """Numbers of the parameters that a device holds."""
    mesh = jax.sharding.AbstractMesh((num_devices,), ("tp",))
    if num_devices > 1:
        sharding.check_mesh(model_config, mesh)
    return Decoder(model_config).param_sum(lambda params: sharding.shard_sizes(params, mesh))


def _kinds(model_config: ModelConfig, max_length: int, cell_bytes: int) -> tuple[KindPlan, ...]:
    groups = cache_groups(model_config, max_length)
    layers = [groups.windows[group] for group, _ in groups.places]
    return tuple(
        KindPlan(
            window=window,
            num_layers=layers.count(window),
            num_groups=num_groups,
            token_bytes=num_groups * cell_bytes,
        )
        for window, num_groups in groups.kinds
    )


def _longest(asked: Asked, pool: PoolPlan, usable: int) -> int:
    """What `jpaged.host.admission` takes at most: the last token needs no cell."""

    def exceeds(num_tokens: int) -> bool:
        length = asked.max_model_len if asked.config.reservation == "max" else num_tokens
        return pages_of_longest(asked.config, pool.kinds, length) > usable

    return bisect.bisect_left(range(asked.max_model_len), True, key=exceeds)


def _pages(asked: Asked, pool: PoolPlan, num_tokens: int) -> int:
    """Pages of a sequence that has so many tokens and grows by one at a time."""
    if asked.config.reservation == "max":
        return pages_of_longest(asked.config, pool.kinds, asked.max_model_len)
    return pages_of(pool.kinds, asked.config.page_size, num_tokens, 1)
