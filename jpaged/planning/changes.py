# SPDX-License-Identifier: Apache-2.0
"""What would make an engine fit that does not."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from jpaged.device.memory import default_dtype, pool_dtype
from jpaged.models.config import ModelConfig
from jpaged.planning.chips import CHIPS
from jpaged.planning.kernels import takes_pages
from jpaged.planning.plan import Asked, num_weights, plan_of

_MOST_DEVICES = 64
_LARGEST_SHARE = 0.95
_NUM_PAIRS = 3


def changes_of(asked: Asked) -> Iterator[str]:
    """What would make it fit: one change alone, and some pairs of what is not enough alone."""
    enough = {lever: _first_that_fits(_variants(asked, lever)) for lever in _LEVERS}
    yield from (text for text in enough.values() if text is not None)
    others = [lever for lever, text in enough.items() if text is None]
    pairs = (
        _first_that_fits(
            (f"{first} and {second}", both)
            for first, changed in _variants(asked, one)
            for second, both in _variants(changed, other)
        )
        for one, other in itertools.combinations(others, 2)
    )
    yield from itertools.islice((text for text in pairs if text is not None), _NUM_PAIRS)


def _first_that_fits(variants: Iterable[tuple[str, Asked]]) -> str | None:
    """What is changed, and the usable pages then."""
    plans = ((text, changed, plan_of(changed)) for text, changed in variants)
    fits = (
        f"{text} ({plan.num_pages - 1:,} pages)"
        for text, changed, plan in plans
        if not plan.problems and takes_pages(changed, plan.num_pages // changed.num_devices)
    )
    return next(fits, None)


_LEVERS = (
    *("dtype", "kv_dtype", "memory_fraction", "max_model_len", "num_pages", "page_size"),
    *("max_num_seqs", "max_num_batched_tokens", "mem_fraction", "num_devices", "chip"),
)


def _variants(asked: Asked, lever: str) -> Iterator[tuple[str, Asked]]:
    """What is asked with one thing changed, the smallest change first, and its flag."""
    config, device = asked.config, asked.device
    if lever == "num_devices":
        for count in (2**i for i in range(1, _MOST_DEVICES.bit_length())):
            if count > asked.num_devices and _splits(asked.model_config, count):
                yield f"--num_devices={count}", dataclasses.replace(asked, num_devices=count)
    elif lever == "mem_fraction":
        if device.share < _LARGEST_SHARE:
            larger = dataclasses.replace(device, share=_LARGEST_SHARE)
            text = f"XLA_PYTHON_CLIENT_MEM_FRACTION={_LARGEST_SHARE}"
            yield text, dataclasses.replace(asked, device=larger)
    elif lever == "chip":
        for name, other in sorted(CHIPS.items(), key=lambda item: item[1].num_bytes):
            if other.platform == device.platform and other.num_bytes > device.num_bytes:
                yield f"--chip={name}", dataclasses.replace(asked, device=other)
    else:
        for value in _values(asked, lever):
            changed = dataclasses.replace(config, **{lever: value})
            text = f"--{lever}={str(value).lower()}"
            yield text, dataclasses.replace(asked, config=changed)


def _values(asked: Asked, lever: str) -> Iterable[Any]:
    """Other values of a field of the config."""
    config = asked.config
    if lever == "dtype":
        return ("bfloat16",) if default_dtype(config, asked.device.platform).itemsize > 2 else ()
    if lever == "kv_dtype":
        return ("int8",) if pool_dtype(config, asked.device.platform).itemsize > 1 else ()
    if lever == "memory_fraction":
        shares = (round(0.05 * i, 2) for i in range(1, 19))
        return [share for share in shares if share > config.memory_fraction]
    if lever == "num_pages":
        return () if config.num_pages is None else _halves(config.num_pages)[:-1]
    if lever == "max_model_len":
        least = max((asked.prompt_len or 1) + (asked.output_len or 1), 2)
        longest = plan_of(asked).longest
        return [n for n in (longest, *_halves(asked.max_model_len)) if n >= least]
    least = {"page_size": 8, "max_num_batched_tokens": config.max_num_seqs + 1}.get(lever, 1)
    return [value for value in _halves(getattr(config, lever)) if value >= least]


def _halves(number: int) -> list[int]:
    return [number >> i for i in range(1, number.bit_length())]


def _splits(model_config: ModelConfig, num_devices: int) -> bool:
    try:
        num_weights(model_config, num_devices)
    except ValueError:
        return False
    return True
