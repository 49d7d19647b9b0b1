# SPDX-License-Identifier: Apache-2.0
"""Finds pages again by what they hold."""

from collections import Counter
from collections.abc import Hashable, Iterable
from collections.abc import Sequence as SequenceOf

from jpaged.host.page_pool import NULL_PAGE, PagePool
from jpaged.host.page_table import PageTable
from jpaged.host.sequence import Sequence


class PrefixCache:
    """Full pages by content: the tokens in them and all tokens before.

    A page's address is the page before it and its own tokens, so equal addresses chain back to
    equal prefixes. Addresses are compared whole, never by a hash of them alone: what is found is
    what was asked for. Page 0 is no prefix; a root, which is negative, stands before a first page.
    Roots keep apart what must not be shared: other weights, other owners. That of a salt is
    remembered while a request uses it or a page's prefix begins there.

    Who uses a page uses the pages of its prefix too, and releases it before them. Pages are evicted
    in order of release, so a page never goes before those that follow it (leaves first).

    Invariants:
      - Every addressed page is kept by the pool, and no other.
      - The page before an addressed page is addressed, or is a root.
      - A salt has a root exactly while that has uses: requests, and addressed pages right behind.
    """

    def __init__(self, pool: PagePool):
        """Makes an empty cache over a pool whose only cache it is."""
        self._pool = pool
        self._pages: dict[tuple[int, tuple[int, ...]], int] = {}
        self._addresses: dict[int, tuple[int, tuple[int, ...]]] = {}
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
        """Counts one more request that uses a root, or a page behind it. Returns: the root."""
        if root in self._salts:
            self._uses[root] += 1
        return root

    def release_root(self, root: int | None) -> None:
        """Takes back one `use_root` or `root`; with the last one the root's salt is forgotten."""
        if root in self._salts:
            self._uses[root] -= 1
            if not self._uses[root]:
                del self._uses[root], self._roots[self._salts.pop(root)]

    def match(self, root: int, token_ids: SequenceOf[int], page_size: int) -> list[int]:
        """Finds the longest known prefix.

        Args:
          root: where prefixes begin.
          token_ids: a sequence's tokens.
          page_size: tokens a page holds.

        Returns:
          The pages of its first tokens, in order; they may be cached, so `PagePool.share` them
          before anything is allocated.
        """
        pages: list[int] = []
        before = root
        for end in range(page_size, len(token_ids) + 1, page_size):
            page = self._pages.get((before, tuple(token_ids[end - page_size : end])))
            if page is None:
                break
            pages.append(page)
            before = page
        return pages

    def add(self, before: int, token_ids: tuple[int, ...], page: int) -> int:
        """Gives a page in use its address.

        Args:
          before: the addressed page of the tokens before, or a root.
          token_ids: the tokens of the page, which is full.
          page: the page.

        Returns:
          The page with this address: another than `page` if one had it already.
        """
        address = before, token_ids
        known = self._pages.get(address)
        if known is not None:
            return known
        assert before < NULL_PAGE or before in self._addresses, "no such prefix"
        self._pool.keep(page)
        self._pages[address] = page
        self._addresses[page] = address
        self.use_root(before)
        return page

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
          The pages that have an address only now.
        """
        before, new = seq.request.cache_root, []
        if before is None:
            return new
        assert seq.table_id is not None
        size, pages = table.page_size, table.pages(seq.table_id)
        end = min(seq.num_computed_tokens if end is None else end, seq.num_known_tokens)
        for index in range(seq.num_addressed_pages, end // size):
            start, own = index * size, pages[index]
            before = pages[index - 1] if index else before
            page = self.add(before, tuple(seq.token_ids[start : start + size]), own)
            if page == own:
                new.append(page)
            elif start + size > settled:
                break  # the step that is planned still writes its own
            elif table.pool.refcount(own) > 1:
                break  # its other owners, who share what follows, would keep it
            else:
                table.replace(seq.table_id, index, page)
                pages = table.pages(seq.table_id)
            seq.num_addressed_pages += 1
        return new

    def quarantine(self, root: int, token_ids: SequenceOf[int], page_size: int) -> None:
        """Makes a prefix unknown, and all that follow it, for instance as its content is damaged.

        Who uses the pages goes on, and what it adds to them is unknown too.

        Args:
          root: where the prefix begins.
          token_ids: of which the first `page_size` stand for all that begin with them.
          page_size: tokens a page holds.
        """
        page = self._pages.pop((root, tuple(token_ids[:page_size])), None)
        if page is not None:
            # The first page gets an address that nobody looks for, and those behind keep theirs.
            self._addresses[page] = self.private_root(), self._addresses[page][1]
            self._pages[self._addresses[page]] = page
            self.release_root(root)

    def check_unused(self) -> None:
        """Raises RuntimeError if an addressed page is in use, as `clear` does."""
        in_use = sum(self._pool.refcount(page) > 0 for page in self._addresses)
        if in_use:
            raise RuntimeError(f"{in_use} addressed pages are in use: finish or abort the requests")

    def clear(self) -> None:
        """Takes all addresses back.

        Raises:
          RuntimeError: if an addressed page is in use: what follows it may get an address later.
        """
        self.check_unused()
        # Also those of live requests: what these still compute is not for requests to come.
        for part in (self._roots, self._salts, self._uses):
            part.clear()
        for page in list(self._addresses):
            self._pool.forget(page)
            self._drop(page)

    def check_invariants(self) -> None:
        """Raises AssertionError if the books do not balance. Cost: every page; for tests."""
        assert {page: key for key, page in self._pages.items()} == self._addresses
        for page, (before, _) in self._addresses.items():
            assert self._pool.is_kept(page)
            assert before < NULL_PAGE or before in self._addresses, f"page {page} lost its prefix"
            # Otherwise the prefix could be evicted first.
            in_use = self._pool.refcount(page) > 0
            assert before < NULL_PAGE or not in_use or self._pool.refcount(before) > 0
        kept = sum(self._pool.is_kept(page) for page in range(self._pool.num_pages))
        assert kept == len(self._addresses), "a page is kept without an address"

    def check_roots(self, used: Iterable[int | None]) -> None:
        """Raises AssertionError if roots are lost or kept for nothing; for tests.

        Args:
          used: the roots of all live requests.
        """
        before = (before for before, _ in self._addresses.values())
        uses = Counter(root for root in (*used, *before) if root in self._salts)
        assert uses == self._uses and set(uses) == set(self._salts), "uses of roots differ"
        assert {root: salt for salt, root in self._roots.items()} == self._salts

    def _on_evict(self, page: int) -> None:
        self.num_evictions += 1
        self._drop(page)

    def _drop(self, page: int) -> None:
        address = self._addresses.pop(page)
        del self._pages[address]
        self.release_root(address[0])
