# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model share a page table.

Layers that see a window no longer need what layers that see everything still do. Layers are put
into groups of one size that see equally far, and each group has pages of its own. A page holds the
keys and values of some tokens for as many layers as a group has, so any page of the pool serves any
group, and what one gives back another can take.

Source: Zhang et al. 2025 (Jenga, arXiv:2503.18292), and the hybrid cache manager of vLLM.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence

from jpaged.models.config import ModelConfig

# A group costs a page table in every step, with room for the longest sequence, and page copies.
_MAX_GROUPS, _MAX_TABLE_TOKENS = 16, 16 * 131_072


@dataclasses.dataclass(frozen=True)
class CacheGroups:
    """Where the keys and values of each layer lie.

    Attributes:
      size: layers that a page has room for, the first axis of the pool.
      windows: of each group, the tokens that a query of its layers sees, itself included; None for
        all. Equal ones stand side by side.
      places: of each layer, its group, and which of the layers of a page it is.
    """

    size: int
    windows: tuple[int | None, ...]
    places: tuple[tuple[int, int], ...]

    @property
    def num_groups(self) -> int:
        """Page tables that a step has."""
        return len(self.windows)

    @property
    def kinds(self) -> tuple[tuple[int | None, int], ...]:
        """Each window once, with the number of its groups, in order."""
        return tuple(collections.Counter(self.windows).items())

    @property
    def num_padded(self) -> int:
        """Places in the pages of all groups that no layer uses."""
        return self.size * self.num_groups - len(self.places)


def one_group(num_layers: int, window: int | None = None) -> CacheGroups:
    """All layers in one group."""
    return CacheGroups(num_layers, (window,), tuple((0, layer) for layer in range(num_layers)))


@functools.lru_cache(maxsize=8)
def cache_groups(config: ModelConfig, max_length: int | None = None) -> CacheGroups:
    """Puts the layers of a model into groups: `group_layers` by what they see.

    A window as long as the model's longest context is none. No sequence is longer than that, nor
    than `max_length` tokens where that is given.
    """
    seen = (a.variant.sliding_window for a in config.attentions)
    longest = config.max_position_embeddings
    windows = [None if window is None or window >= longest else window for window in seen]
    sees = [windows[i % len(windows)] for i in range(config.num_layers)]
    return group_layers(sees, max_length or longest)


def group_layers(sees: Sequence[int | None], max_length: int) -> CacheGroups:
    """Puts layers into groups.

    Where all see equally far there is one group. Otherwise the size is chosen that leaves the least
    share of a pool unused by padding, of those with at most 16 groups, more where sequences are
    shorter than 131,072 tokens (64 at 32,768); of sizes that do equally well, the one with the
    fewest groups. The share is that of the length of sequences where it is largest: while they are
    shorter than every window, all padding counts alike; when they are long, that of the layers that
    see farthest is all that matters.

    Args:
      sees: of each layer, the tokens that a query sees, itself included; None for all.
      max_length: longest sequence that is served, in tokens.
    """
    layers: dict[int | None, list[int]] = collections.defaultdict(list)
    for index, window in enumerate(sees):
        layers[window].append(index)
    windows = sorted(layers, key=lambda window: (window is not None, window))
    if len(windows) == 1:
        return one_group(len(sees), windows[0])
    farthest = windows[0] if windows[0] is None else windows[-1]
    counts = {window: len(own) for window, own in layers.items()}
    most_groups = max(_MAX_GROUPS, _MAX_TABLE_TOKENS // max_length, len(windows))

    def unused(size: int) -> tuple[float, int]:
        groups = {window: -(-count // size) for window, count in counts.items()}
        everywhere = 1 - len(sees) / (size * sum(groups.values()))
        far = 1 - counts[farthest] / (size * groups[farthest])
        return max(everywhere, far), sum(groups.values())

    sizes = range(1, max(counts.values()) + 1)
    size = min((size for size in sizes if unused(size)[1] <= most_groups), key=unused)
    places: dict[int, tuple[int, int]] = {}
    of_groups: list[int | None] = []
    for window in windows:
        for place, index in enumerate(layers[window]):
            if place % size == 0:
                of_groups.append(window)
            places[index] = len(of_groups) - 1, place % size
    in_order = tuple(places[index] for index in range(len(sees)))
    return CacheGroups(size, tuple(of_groups), in_order)
