# SPDX-License-Identifier: Apache-2.0
"""Finds pages again by what they hold."""

from collections import Counter
from collections.abc import Hashable, Iterable
from collections.abc import Sequence as SequenceOf

from jpaged.host.groups import ONE_GROUP, GroupKind
from jpaged.host.page_pool import NULL_PAGE, PagePool
from jpaged.host.page_table import PageTable
from jpaged.host.prefix import Prefix
from jpaged.host.sequence import Sequence


class _Node:
    """A full logical page: its tokens and all tokens before."""

    __slots__ = ("address", "num_followers", "pages")

    def __init__(self, address: tuple[int, tuple[int, ...]], num_kinds: int):
        self.address = address
        self.pages = [NULL_PAGE] * num_kinds
        self.num_followers = 0


class PrefixCache:
    """Full pages by content: the tokens in them and all tokens before.

    The address of a page is the node before it and its own tokens, so equal addresses chain back to
    equal prefixes. Addresses are compared whole, never by a hash of them alone: what is found is
    what was asked for. A node is one logical page, and has a bundle of pages for each kind of
    groups, or for some: what is below a window goes first. Node 0 is no prefix; a root, which is
    negative, stands before a first node. Roots keep apart what must not be shared: other weights,
    other owners. That of a salt is remembered while a request uses it or a node begins there.

    Who uses a page of layers that see everything uses the pages of its prefix too, and releases it
    before them. Pages are evicted in order of release, so such a page never goes before those that
    follow it (leaves first).

    Invariants:
      - Every page that a node has is kept by the pool, and no other.
      - A node has a page or is followed by another, and the node before it is known, or is a root.
      - A salt has a root exactly while that has uses: requests, and nodes right behind.
    """

    def __init__(self, pool: PagePool, kinds: SequenceOf[GroupKind] = ONE_GROUP):
        """Makes an empty cache over a pool whose only cache it is."""
        self._pool = pool
        self._kinds = tuple(kinds)
        self._nodes: dict[int, _Node] = {}
        self._known: dict[tuple[int, tuple[int, ...]], int] = {}
        # Of the bundles that nodes have, the node and the kind.
        self._places: dict[int, tuple[int, int]] = {}
        self._num_nodes = 0
        self._roots: dict[Hashable, int] = {}
        # Of the roots with a salt; how often each is used.
        self._salts: dict[int, Hashable] = {}
        self._uses: Counter[int] = Counter()
        self._num_roots = 0
        self.num_evictions = 0
        pool.on_evict = self._on_evict

    def root(self, salt: Hashable) -> int:
        """The root of all prefixes with this salt, for a request; equal salts share them."""
        if salt not in self._roots:
            self._roots[salt] = self.private_root()
            self._salts[self._roots[salt]] = salt
        self.use_root(self._roots[salt])
        return self._roots[salt]

    def private_root(self) -> int:
        """A root that nobody else has."""
        self._num_roots += 1
        return -self._num_roots

    def use_root(self, root: int | None) -> int | None:
        """Counts one more request that uses a root, or a node behind it. Returns: the root."""
        if root in self._salts:
            self._uses[root] += 1
        return root

    def release_root(self, root: int | None) -> None:
        """Takes back one `use_root` or `root`; with the last one the root's salt is forgotten."""
        if root in self._salts:
            self._uses[root] -= 1
            if not self._uses[root]:
                del self._uses[root], self._roots[self._salts.pop(root)]

    def match(self, root: int, token_ids: SequenceOf[int], page_size: int) -> Prefix:
        """Finds the longest known prefix.

        Args:
          root: where prefixes begin.
          token_ids: a sequence's tokens.
          page_size: tokens a page holds.

        Returns:
          What there is of it. Its pages may be cached, so `PagePool.share` them before anything is
          allocated.
        """
        return Prefix(self._kinds, page_size, self.known_pages(root, token_ids, page_size))

    def known_pages(self, root: int, token_ids: SequenceOf[int], page_size: int) -> list[list[int]]:
        """Of each page that is known, of each kind the bundle, or `NULL_PAGE`; see `match`."""
        found: list[list[int]] = []
        before = root
        for end in range(page_size, len(token_ids) + 1, page_size):
            node = self._known.get((before, tuple(token_ids[end - page_size : end])))
            if node is None:
                break
            found.append(self._nodes[node].pages)
            before = node
        return found

    def add(self, before: int, token_ids: tuple[int, ...], pages: SequenceOf[int]) -> int:
        """Gives pages in use their address.

        Args:
          before: the node of the tokens before, or a root.
          token_ids: the tokens of the page, which is full.
          pages: of each kind the bundle that holds them, `NULL_PAGE` where there is none.

        Returns:
          The node with this address, which has other pages (`pages_of`) where it had some already.
        """
        node = self._node(before, token_ids)
        for kind, page in enumerate(pages):
            if page != NULL_PAGE and self._nodes[node].pages[kind] == NULL_PAGE:
                self._give(node, kind, page)
        return node

    def pages_of(self, node: int) -> tuple[int, ...]:
        """Of each kind the bundle that a node has, `NULL_PAGE` where it has none."""
        return tuple(self._nodes[node].pages)

    def address_pages(
        self, table: PageTable, seq: Sequence, settled: int, end: int | None = None
    ) -> list[int]:
        """Gives the full pages of a sequence their addresses, or has it use those that are known.

        Args:
          table: where it has pages.
          seq: with a root.
          settled: tokens of it that were computed by steps before the one that is planned.
          end: tokens to look at; None takes all that are computed.

        Returns:
          The bundles that have an address only now.
        """
        root, new = seq.request.cache_root, []
        if root is None:
            return new
        assert seq.table_id is not None
        size, bundles = table.page_size, table.bundles(seq.table_id)
        end = min(seq.num_computed_tokens if end is None else end, seq.num_known_tokens) // size
        if seq.num_addressed_pages >= end:
            return new
        node = self._last_node(root, seq, bundles, size)
        for index in range(seq.num_addressed_pages, end):
            start = index * size
            node = self._node(node, tuple(seq.token_ids[start : start + size]))
            known, others = self._nodes[node].pages, list[int]()
            for kind, pages in enumerate(bundles):
                page = pages[index]
                if page == NULL_PAGE or page == known[kind]:
                    continue
                if known[kind] == NULL_PAGE:
                    self._give(node, kind, page)
                    new.append(page)
                else:
                    others.append(kind)
            if others and start + size > settled:
                break  # the step that is planned still writes its own
            if any(table.pool.refcount(bundles[kind][index]) > 1 for kind in others):
                break  # their other owners, who share what follows, would keep them
            for kind in others:
                table.replace(seq.table_id, kind, index, known[kind])
            seq.num_addressed_pages += 1
        self._prune(node)
        return new

    def quarantine(self, root: int, token_ids: SequenceOf[int], page_size: int) -> None:
        """Makes a prefix unknown, and all that follow it, for instance as its content is damaged.

        Who uses the pages goes on, and what it adds to them is unknown too.

        Args:
          root: where the prefix begins.
          token_ids: of which the first `page_size` stand for all that begin with them.
          page_size: tokens a page holds.
        """
        node = self._known.pop((root, tuple(token_ids[:page_size])), None)
        if node is not None:
            # The first one gets an address that nobody looks for, and those behind keep theirs.
            own = self._nodes[node]
            own.address = self.private_root(), own.address[1]
            self._known[own.address] = node
            self.release_root(root)

    def check_unused(self) -> None:
        """Raises RuntimeError if an addressed page is in use, as `clear` does."""
        used = [page for page in self._places if self._pool.refcount(page) > 0]
        if used:
            in_use = sum(len(self._pool.bundle(page)) for page in used)
            raise RuntimeError(f"{in_use} addressed pages are in use: finish or abort the requests")

    def clear(self) -> None:
        """Takes all addresses back.

        Raises:
          RuntimeError: if an addressed page is in use: what follows it may get an address later.
        """
        self.check_unused()
        for page in self._places:
            self._pool.forget(page)
        # Roots also of live requests: what these still compute is not for requests to come.
        for part in (self._roots, self._salts, self._uses, self._nodes, self._known, self._places):
            part.clear()

    def check_invariants(self) -> None:
        """Raises AssertionError if the books do not balance. Cost: every page; for tests."""
        assert {own.address: node for node, own in self._nodes.items()} == self._known
        followers = Counter(own.address[0] for own in self._nodes.values())
        places: dict[int, tuple[int, int]] = {}
        for node, own in self._nodes.items():
            before = own.address[0]
            assert own.num_followers == followers[node]
            assert own.num_followers or any(own.pages), f"node {node} is there for nothing"
            assert before < 0 or before in self._nodes, f"node {node} lost its prefix"
            for kind, page in enumerate(own.pages):
                if page == NULL_PAGE:
                    continue
                assert self._pool.is_kept(page)
                places[page] = node, kind
                if self._kinds[kind].window is None and before > 0:
                    # Otherwise the prefix could be evicted first.
                    first = self._nodes[before].pages[kind]
                    assert first != NULL_PAGE, f"page {page} lost its prefix"
                    assert self._pool.refcount(page) == 0 or self._pool.refcount(first) > 0
        assert places == self._places
        kept = sum(self._pool.is_kept(page) for page in range(self._pool.num_pages))
        assert kept == len(self._places), "a page is kept without an address"

    def check_roots(self, used: Iterable[int | None]) -> None:
        """Raises AssertionError if roots are lost or kept for nothing; for tests.

        Args:
          used: the roots of all live requests.
        """
        before = (own.address[0] for own in self._nodes.values())
        uses = Counter(root for root in (*used, *before) if root in self._salts)
        assert uses == self._uses and set(uses) == set(self._salts), "uses of roots differ"
        assert {root: salt for salt, root in self._roots.items()} == self._salts

    def _node(self, before: int, token_ids: tuple[int, ...]) -> int:
        """The node with an address; a new one is without pages."""
        address = before, token_ids
        node = self._known.get(address)
        if node is None:
            assert before < 0 or before in self._nodes, "no such prefix"
            self._num_nodes += 1
            node = self._known[address] = self._num_nodes
            self._nodes[node] = _Node(address, len(self._kinds))
            self.use_root(before)
            if before in self._nodes:
                self._nodes[before].num_followers += 1
        return node

    def _give(self, node: int, kind: int, page: int) -> None:
        """Has a node have a bundle of a kind, of which it had none."""
        self._pool.keep(page)
        self._nodes[node].pages[kind] = page
        self._places[page] = node, kind

    def _last_node(
        self, root: int, seq: Sequence, bundles: SequenceOf[SequenceOf[int]], page_size: int
    ) -> int:
        """The node of the last page of a sequence that was addressed, or its root."""
        count = seq.num_addressed_pages
        if not count:
            return root
        for pages in bundles:
            if pages[count - 1] in self._places:
                return self._places[pages[count - 1]][0]
        # It holds none of that page any more, and maybe nobody does.
        node = root
        for start in range(0, count * page_size, page_size):
            node = self._node(node, tuple(seq.token_ids[start : start + page_size]))
        return node

    def _on_evict(self, page: int) -> None:
        self.num_evictions += 1
        node, kind = self._places.pop(page)
        self._nodes[node].pages[kind] = NULL_PAGE
        self._prune(node)

    def _prune(self, node: int) -> None:
        """Forgets a node that has nothing, and those before it that have nothing else."""
        while node in self._nodes:
            own = self._nodes[node]
            if own.num_followers or any(own.pages):
                return
            del self._nodes[node], self._known[own.address]
            self.release_root(own.address[0])
            node = own.address[0]
            if node in self._nodes:
                self._nodes[node].num_followers -= 1
