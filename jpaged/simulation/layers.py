# SPDX-License-Identifier: Apache-2.0
"""How the layers of a model share pages, as far as it matters without a model."""

import dataclasses

from jpaged.host.groups import ONE_GROUP, GroupKind
from jpaged.host.page_table import PageTable


@dataclasses.dataclass(frozen=True)
class LayerGroups:
    """The layers of a model in groups that have pages of their own.

    Attributes:
      size: layers that a page has room for.
      kinds: the groups.
      num_layers: of each kind, the layers that there are; the rest is padding.
      one_table: whether all layers share one page table all the same, whose pages are kept as long
        as one of them needs them: what groups are compared with.
    """

    size: int = 1
    kinds: tuple[GroupKind, ...] = ONE_GROUP
    num_layers: tuple[int, ...] = (1,)
    one_table: bool = False

    @property
    def total(self) -> int:
        """All layers."""
        return sum(self.num_layers)

    @property
    def page_layers(self) -> int:
        """Layers of a page."""
        return self.total if self.one_table else self.size

    @property
    def table_kinds(self) -> tuple[GroupKind, ...]:
        """The kinds that the page table knows."""
        return ONE_GROUP if self.one_table else self.kinds

    def num_pages(self, num_slots: int, page_size: int) -> int:
        """Pages in the memory of so many tokens of all layers."""
        return num_slots * self.total // (self.page_layers * page_size)

    def needed_tokens(self, start: int, end: int) -> float:
        """Tokens that queries from `start` on need of those before `end`, mean over the layers."""
        kinds = zip(self.kinds, self.num_layers, strict=True)
        needed = sum(count * (end - min(kind.first_seen(start), end)) for kind, count in kinds)
        return needed / self.total

    def needed_cells(self, table: PageTable) -> float:
        """Cells of pages in use whose token a layer needs, each as the share of its page's layers.

        With one table for all layers it is taken that sequences share nothing.
        """
        if self.one_table:
            counts = map(table.num_tokens, table.seqs())
            return sum(self.needed_tokens(count - 1, count) for count in counts if count)
        live = zip(table.cells.live, self.num_layers, strict=True)
        return sum(cells * count for cells, count in live) / self.size


ONE_KIND = LayerGroups()
