# SPDX-License-Identifier: Apache-2.0
"""Lists of work of a length that only the device knows."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.pallas_kernels import worklist

expand = jax.jit(worklist.expand, static_argnames="size")


@pytest.mark.parametrize("size", [1, 9, 20])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_expand_lays_items_in_the_order_of_their_owners(size, data):
    counts, left = [], size
    for _ in range(5):
        counts.append(data.draw(st.integers(0, left)))
        left -= counts[-1]
    owner, place, count = map(np.asarray, expand(np.array(counts, np.int32), size=size))
    assert count == sum(counts)
    want = [(i, j) for i, own in enumerate(counts) for j in range(own)]
    assert list(zip(owner[:count].tolist(), place[:count].tolist(), strict=True)) == want
    assert (0 <= owner).all() and (owner < 5).all()
    assert (place[count:] == 0).all()
