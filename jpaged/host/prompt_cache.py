# SPDX-License-Identifier: Apache-2.0
"""Pages of long prompts that are kept on disk, from one run to the next."""

import collections
import concurrent.futures
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jpaged.host.groups import GroupKind
from jpaged.host.page_files import PageAddress, PageFiles, page_addresses
from jpaged.host.page_pool import NULL_PAGE, PagePool
from jpaged.host.prefix import Prefix
from jpaged.host.prefix_cache import PrefixCache
from jpaged.host.sequence import Sequence as Stream

logger = logging.getLogger(__name__)

_ON_DISK = -1  # stands for a page
_MAX_PROMPTS = 64  # that are remembered, of each sort
_MAX_SAVE_BYTES = 2**30  # that are copied from the device at once
_NUM_READERS = min(8, os.cpu_count() or 1)


class PageLoad(NamedTuple):
    """Pages to put into the pool before a step.

    Attributes:
      pages: where.
      content: u8[bytes of all of them].
    """

    pages: tuple[int, ...]
    content: np.ndarray


class PageSave(NamedTuple):
    """Pages to write to disk, of one kind of groups and one logical page.

    Attributes:
      address: of the logical page.
      kind: of groups.
      pages: where in the pool.
    """

    address: PageAddress
    kind: int
    pages: tuple[int, ...]


class PromptCache:
    """What of prompts is on disk, and what goes there.

    A prefix is worth it if it has `min_pages` pages and a second request began with it, or if it is
    asked for when a run ends. Requests with a salt are left alone: who keeps them apart in memory
    does not want them in files that others read. Pages are written by a thread, when no request is
    live, and read when a request starts of which memory has less.
    """

    def __init__(
        self,
        files: PageFiles,
        kinds: Sequence[GroupKind],
        *,
        page_size: int,
        page_bytes: int,
        min_pages: int,
        context: Callable[[], bytes],
    ):
        """Looks at nothing yet but the context.

        Args:
          files: where pages are.
          kinds: of groups.
          page_size: tokens a page holds.
          page_bytes: of one page of one group.
          min_pages: that a prefix has at least.
          context: digest of all that the content of pages depends on beside tokens.
        """
        self._files = files
        self._kinds = tuple(kinds)
        self._page_size = page_size
        self._page_bytes = page_bytes
        self._min_pages = min_pages
        self._find_context = context
        self._readers = concurrent.futures.ThreadPoolExecutor(_NUM_READERS, "prompt_cache_read")
        # Is waited for when Python ends.
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "prompt_cache_write")
        self._writing: concurrent.futures.Future[None] | None = None
        # By the digest of the last page, the tokens; what was seen last is last.
        self._common: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()
        self._recent: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()
        self._context = context()

    def reset(self) -> None:
        """Forgets what was seen; what comes is of the weights that are there now."""
        self._common.clear()
        self._recent.clear()
        self._context = self._find_context()

    def extend(
        self, cache: PrefixCache, pool: PagePool, seq: Stream, held: int, usable: int, free: int
    ) -> tuple[int, list[list[int]], list[PageLoad]] | None:
        """Has the prefix cache know more of a sequence that starts, if the disk does.

        Args:
          cache: knows some of its tokens.
          pool: where pages are.
          seq: waits, and has a place.
          held: tokens that it would start behind.
          usable: tokens that it may start behind at most.
          free: pages that may be taken.

        Returns:
          The tokens that it starts behind, more than before, of each kind the bundles that hold
          them, all in memory and cached or in use, and what must be put there before the step; None
          if the disk does not have more.
        """
        root, size, token_ids = seq.request.cache_root, self._page_size, seq.token_ids[:]
        if root is None or seq.request.cache_salt is not None:
            return None
        if len(token_ids) // size < self._min_pages:
            return None
        addresses = list(page_addresses(self._context, token_ids, size))
        self._note(seq, addresses, held)
        end = usable // size
        if end * size <= held:
            return None
        known = cache.known_pages(root, token_ids[: end * size], size)
        rows = self._rows(known, addresses[:end])
        found = self._read(rows, addresses, held, free, pool)
        if found is None:
            return None
        held, pages, contents = found
        return held, *self._put(cache, pool, root, token_ids, pages, contents)

    def saves(self, cache: PrefixCache, pool: PagePool, *, at_end: bool) -> list[list[PageSave]]:
        """What is to be written, of what memory has.

        Args:
          cache: knows the pages; no request is live.
          pool: where they are.
          at_end: whether prompts that were seen once count too, the newest first.

        Returns:
          Pages in order, in parts of at most 1 GiB; one part at most if it is not the end.
        """
        if not self._files.is_writable or (self._writing and not self._writing.done()):
            return []
        asked = [(tokens, 1) for tokens in reversed(self._common.values())]
        if at_end:
            asked += [(tokens, self._min_pages) for tokens in reversed(self._recent.values())]
            self._recent.clear()
        self._common.clear()
        parts, total, left = list[list[PageSave]](), 0, self._files.max_bytes
        # What is on disk already, or is about to be.
        there: set[tuple[bytes, int]] = set()
        root = cache.root(None)
        for tokens, least in asked:
            saves, lacking = self._saves_of(cache, pool, root, tokens), list[PageSave]()
            for save in saves:
                # What is there counts as used now, and is not to go for what follows it.
                place = save.address.digest, save.kind
                if place not in there and not self._files.touch(*save[:2]):
                    lacking.append(save)
                elif place not in there:
                    there.add(place)
                    left -= self._bytes_of(save)
            if len({save.address.index for save in lacking}) < least:
                continue
            for save in lacking:
                num_bytes = self._bytes_of(save)
                total, left = total + num_bytes, left - num_bytes
                if left < 0:
                    break
                if not parts or total > _MAX_SAVE_BYTES:
                    parts.append([])
                    total = num_bytes
                parts[-1].append(save)
                there.add((save.address.digest, save.kind))
        cache.release_root(root)
        return parts if at_end else parts[:1]

    def write(self, saves: Sequence[PageSave], contents: Sequence[np.ndarray]) -> None:
        """Has a thread write pages, when it is done with those before.

        Args:
          saves: a part of what `saves` gave.
          contents: of each its pages, of the pool's dtype.
        """
        self.flush()
        self._writing = self._writer.submit(self._write, list(saves), list(contents))

    def flush(self) -> None:
        """Waits until all is written."""
        if self._writing is None:
            return
        error, self._writing = self._writing.exception(), None
        if error is not None:  # such as no memory
            logger.warning("prompts are not saved: %r", error)

    def _write(self, saves: list[PageSave], contents: list[Any]) -> None:
        files = self._files
        pairs = list(zip(saves, contents, strict=True))
        files.make_room(sum(files.file_bytes(s.address, c.nbytes) for s, c in pairs))
        for save, content in pairs:
            # Whatever once went wrong must not be there for ever.
            if np.isfinite(content).all():
                own = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
                if not files.write(save.address, save.kind, own):
                    break
        files.make_room()  # others have written too

    def _note(self, seq: Stream, addresses: Sequence[PageAddress], held: int) -> None:
        """Remembers a request that starts, and what it has in common with those before."""
        if seq.sample_index or seq.num_lost_tokens:
            return  # it started before
        size = self._page_size
        for seen, count in (
            (self._common, held // size),
            (self._recent, seq.num_prompt_tokens // size),
        ):
            if count < self._min_pages:
                continue
            digest = addresses[count - 1].digest
            if digest not in seen:
                seen[digest] = np.asarray(seq.token_ids[: count * size], np.int32)
            seen.move_to_end(digest)
            if len(seen) > _MAX_PROMPTS:
                seen.popitem(last=False)

    def _rows(
        self, known: Sequence[Sequence[int]], addresses: Sequence[PageAddress]
    ) -> list[list[int]]:
        """Of each logical page and kind the bundle in memory, `_ON_DISK` or `NULL_PAGE`."""
        rows: list[list[int]] = []
        nothing = [NULL_PAGE] * len(self._kinds)
        for index, address in enumerate(addresses):
            row = list(known[index] if index < len(known) else nothing)
            for kind, page in enumerate(row):
                if page == NULL_PAGE and self._files.has(address, kind):
                    row[kind] = _ON_DISK
                elif page == NULL_PAGE and self._kinds[kind].window is None:
                    return rows  # nothing behind could be used
            rows.append(row)
        return rows

    def _read(
        self,
        rows: list[list[int]],
        addresses: Sequence[PageAddress],
        held: int,
        free: int,
        pool: PagePool,
    ) -> tuple[int, list[list[int]], dict[tuple[int, int], np.ndarray]] | None:
        """Reads what is needed to start as late as can be, of what turns out to be there.

        Returns:
          Tokens, of each kind the bundles that hold them, `_ON_DISK` where they were read, and by
          kind and index what was; None if it is no more than is held, or has no room.
        """
        size, read = self._page_size, dict[tuple[int, int], np.ndarray]()
        while True:
            prefix = Prefix(self._kinds, size, rows)
            end = prefix.usable_tokens(len(rows) * size)
            if end <= held:
                return None
            pages = prefix.pages(end)
            places = [
                (kind, index)
                for kind, own in enumerate(pages)
                for index, page in enumerate(own)
                if page == _ON_DISK
            ]
            cached = {p for own in pages for p in own if p > 0 and not pool.refcount(p)}
            room = free - sum(len(pool.bundle(page)) for page in cached)
            if sum(self._kinds[kind].num_groups for kind, _ in places) > room:
                return None
            lacking = [place for place in places if place not in read]
            contents = self._readers.map(lambda p: self._read_one(addresses[p[1]], p[0]), lacking)
            failed = False
            for (kind, index), content in zip(lacking, contents, strict=True):
                if content is None:
                    rows[index][kind], failed = NULL_PAGE, True
                else:
                    read[kind, index] = content
            if not failed:
                return end, pages, {place: read[place] for place in places}

    def _read_one(self, address: PageAddress, kind: int) -> np.ndarray | None:
        return self._files.read(address, kind, self._kinds[kind].num_groups * self._page_bytes)

    def _put(
        self,
        cache: PrefixCache,
        pool: PagePool,
        root: int,
        token_ids: Sequence[int],
        pages: list[list[int]],
        contents: dict[tuple[int, int], np.ndarray],
    ) -> tuple[list[list[int]], list[PageLoad]]:
        """Gives what was read pages, and the pages addresses; all are cached, or in use, then.

        Returns:
          Of each kind the bundles, and what must be put into them.
        """
        # Those that are known must not be evicted to make room.
        pinned = [page for own in pages for page in own if page > 0]
        pool.share(pinned)
        loads, new = list[PageLoad](), [[NULL_PAGE] * len(self._kinds) for _ in pages[0]]
        for kind, own in enumerate(pages):
            places = [index for index, page in enumerate(own) if page == _ON_DISK]
            found = pool.allocate(len(places), self._kinds[kind].num_groups)
            for index, page in zip(places, found, strict=True):
                own[index] = new[index][kind] = page
                loads.append(PageLoad(pool.bundle(page), contents[kind, index]))
        node, size = root, self._page_size
        for index, row in enumerate(new):
            node = cache.add(node, tuple(token_ids[index * size : (index + 1) * size]), row)
        for row in reversed(new):
            for page in row:
                if page != NULL_PAGE:
                    pool.release(page)
        for page in reversed(pinned):
            pool.release(page)
        return pages, loads

    def _saves_of(
        self, cache: PrefixCache, pool: PagePool, root: int, tokens: np.ndarray
    ) -> list[PageSave]:
        """Of a prefix, what memory has."""
        token_ids, size = tokens.tolist(), self._page_size
        known = cache.known_pages(root, token_ids, size)
        addresses = page_addresses(self._context, token_ids, size)
        return [
            PageSave(address, kind, pool.bundle(page))
            for address, row in zip(addresses, known, strict=False)
            for kind, page in enumerate(row)
            if page != NULL_PAGE
        ]

    def _bytes_of(self, save: PageSave) -> int:
        return self._files.file_bytes(save.address, len(save.pages) * self._page_bytes)
