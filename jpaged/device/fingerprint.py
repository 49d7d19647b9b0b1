# SPDX-License-Identifier: Apache-2.0
"""What the content of pages depends on beside tokens, as one digest."""

import concurrent.futures
import hashlib
import json
import os
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.device import cpu
from jpaged.device.memory import PoolPlan
from jpaged.host.config import EngineConfig
from jpaged.models.config import ModelConfig

_SEEDS = (0x9E3779B9, 0x7F4A7C15, 0xF39CC061, 0x5CEDC835)  # odd
_STEP = 0x9E3779B1  # odd: positions along an axis stay apart
# That change programs, and are no settings of jax.
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def context_of(
    config: EngineConfig,
    model_config: ModelConfig,
    plan: PoolPlan,
    params: Any,
    *,
    backend: str,
) -> bytes:
    """A digest of all that decides which bits a prompt's pages hold, beside its tokens.

    Args:
      config: the engine's settings.
      model_config: the model's shape.
      plan: of the pool.
      params: as the steps take them, on the device; every bit of them is looked at.
      backend: whose kernels run.

    Returns:
      32 bytes: equal for equal weights, settings, devices and versions.
    """
    device = jax.local_devices()[0]
    shape = None
    if config.deterministic:
        shape = config.max_num_batched_tokens, config.max_num_seqs  # of every step
    values = jax.config.values  # pyright: ignore[reportAttributeAccessIssue]
    context = {
        "weights": fingerprint(params).hex(),
        "model": repr(model_config),
        "page": [config.page_size, *plan.shape[:1], *plan.shape[2:], plan.dtype.name],
        "kinds": [list(kind) for kind in plan.kinds],
        "pages_per_seq": plan.pages_per_seq,
        "shape": shape,
        "scan_layers": config.scan_layers,
        "backend": backend,
        "device": [device.platform, device.device_kind, device.client.platform_version],
        "cpu": [cpu.name(), cpu.features(), cpu.num_cores()] if device.platform == "cpu" else None,
        "versions": [_version(name) for name in ("jpaged", "jax", "jaxlib")],
        "precision": str(values["jax_default_matmul_precision"]),
        "variables": [os.environ.get(name) for name in _VARIABLES],
    }
    return hashlib.sha256(json.dumps(context, sort_keys=True).encode()).digest()


def fingerprint(params: Any) -> bytes:
    """A digest of parameters: names, shapes, dtypes, and every bit, read once where they are.

    In the host's memory SHA-256, on other devices `mixed`, which need not be fetched for it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    digest = hashlib.sha256()
    for (path, leaf), own in zip(leaves, _digests([leaf for _, leaf in leaves]), strict=True):
        name = f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}\0"
        digest.update(name.encode() + own)
    return digest.digest()


def _digests(leaves: list[jax.Array]) -> list[bytes]:
    if all(device.platform == "cpu" for leaf in leaves for device in leaf.devices()):
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(_sha256, leaves))  # which needs no interpreter
    # All are under way before one is waited for.
    return [np.asarray(words, "<u4").tobytes() for words in list(map(mixed, leaves))]


def _sha256(array: jax.Array) -> bytes:
    own = np.ascontiguousarray(array)
    return hashlib.sha256(own.reshape(-1).view(np.uint8).data).digest()


@jax.jit
def mixed(array: jax.Array) -> jax.Array:
    """128 bits of an array of any shape, of a dtype of at most 32 bits.

    They are sums, over the elements, of numbers that an element's bits and its position are mixed
    to. That tells weights apart, and is no defence against who makes others of the same sums.

    Returns:
      u32[4].
    """
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    position = jnp.zeros((), jnp.uint32)
    factor = _STEP
    for axis in range(array.ndim):
        steps = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        position = jax.lax.broadcast(position, array.shape) if axis == 0 else position
        position = position + steps * jnp.uint32(factor)
        factor = factor * _STEP % 2**32
    mixed = bits ^ _avalanche(position)
    sums = [
        jnp.sum(_avalanche(mixed * jnp.uint32(seed) + jnp.uint32(seed)), dtype=jnp.uint32)
        for seed in _SEEDS
    ]
    return jnp.stack(sums)


def _avalanche(bits: jax.Array) -> jax.Array:
    """Has each of 32 bits depend on all of them. Source: MurmurHash3's fmix32, Appleby 2011."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _version(package: str) -> str:
    """Of a package; empty if it runs without being installed, as this one may from a checkout."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
