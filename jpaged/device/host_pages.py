# SPDX-License-Identifier: Apache-2.0
"""The memory behind `jpaged.host.swap`: pages of preempted sequences, off the device."""

import jax
import numpy as np

from jpaged.device.memory import PoolPlan
from jpaged.pallas_kernels import layout


class HostPages:
    """Pages in host memory, which is taken when the first page comes.

    Attributes:
      num_pages: room.
    """

    def __init__(self, num_pages: int, plan: PoolPlan):
        self.num_pages = num_pages
        self._shape = (num_pages, *layout.page_shape(plan.shape))
        self._dtype = plan.dtype
        self._pages: np.ndarray | None = None
        self._arriving: list[tuple[list[int], jax.Array]] = []

    def put(self, host_pages: list[int], pages: jax.Array) -> None:
        """Starts to copy pages, as `layout.take_pages` gives them."""
        pages.copy_to_host_async()
        self._arriving.append((host_pages, pages))

    def settle(self) -> None:
        """Waits for the copies that were started."""
        for host_pages, pages in self._arriving:
            if self._pages is None:
                self._pages = np.empty(self._shape, self._dtype)
            self._pages[host_pages] = np.asarray(pages)[: len(host_pages)]
        self._arriving.clear()

    def get(self, host_pages: list[int], count: int) -> np.ndarray:
        """Pages that have settled, padded to `count` with anything."""
        assert self._pages is not None and not self._arriving
        return self._pages[host_pages + host_pages[:1] * (count - len(host_pages))]
