# SPDX-License-Identifier: Apache-2.0
"""Whether a chip's kernels take the pages that are planned; nothing is compiled or run."""

import dataclasses

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jpaged.device.memory import check_pages, default_dtype, plan_pool
from jpaged.planning.plan import Asked, free_memory


def check_kernels(asked: Asked, num_pages: int = 2) -> None:
    """Has a chip's kernels refuse pages of a dtype that they do not take, as an engine does.

    Args:
      asked: what is planned; pages of the weights' dtype are not asked about, nor is a device of
        which jax's name is not known.
      num_pages: of the pool of each device.

    Raises:
      ValueError: if they do not take them; the message has the rule.
    """
    if asked.config.kv_dtype is None or asked.device.kind is None:
        return
    config = dataclasses.replace(asked.config, num_pages=max(num_pages, 2), swap_bytes=None)
    pool = plan_pool(config, asked.model_config, asked.backend, free_memory(asked, 2**62))
    chip = AbstractDevice(asked.device.kind, None, asked.device.platform)
    mesh = AbstractMesh((1,), ("tp",), axis_types=(AxisType.Auto,), abstract_device=chip)
    with jax.sharding.use_abstract_mesh(mesh):
        dtype = default_dtype(config, asked.device.platform)
        check_pages(asked.model_config, pool, dtype, asked.backend)


def takes_pages(asked: Asked, num_pages: int) -> bool:
    """Whether `check_kernels` has nothing against it."""
    try:
        check_kernels(asked, num_pages)
    except ValueError:
        return False
    return True
