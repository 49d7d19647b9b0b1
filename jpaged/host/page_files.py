# SPDX-License-Identifier: Apache-2.0
"""Pages in a directory: each in a file of its own, named by what it holds, and checked when read.

A file is a header, the bytes of the pages, and the SHA-256 of both. The header is `_HEADER` (magic,
kind of groups, tokens, bytes of the pages), the digest of the page before, and the tokens as
little-endian int32. Who looks for a page knows all of that, so it is compared whole. It is no
safetensors file, as those have no checksum, and a header of which parts are never looked at.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import re
import secrets
import struct
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<8sIIQ")
_MAGIC = b"JPAGED1\n"
_DIGEST_BYTES = 32
# Nothing else in the directory is ever touched.
_PAGE = re.compile(r"[0-9a-f]{64}\.\d+\.kv")
_PART = re.compile(r"[0-9a-f]{64}\.\d+\.kv\.[0-9a-f]{16}\.part")
_NS_PER_PAGE = 10_000_000  # more than between a page and the next that are used together
_STALE_PART_S = 3600  # of a writer that was killed


class PageAddress(NamedTuple):
    """A full logical page by its content: its tokens, and all tokens and the model before.

    Attributes:
      index: which page of its sequence, from 0.
      before: digest of the page before; of the first page, of what computes it.
      tokens: as little-endian int32.
      digest: of the two before.
    """

    index: int
    before: bytes
    tokens: bytes
    digest: bytes


def page_addresses(
    context: bytes, token_ids: Sequence[int], page_size: int
) -> Iterator[PageAddress]:
    """The addresses of all full pages of a sequence, in order.

    Args:
      context: digest of all that the content of pages depends on beside tokens.
      token_ids: of the sequence.
      page_size: tokens a page holds.
    """
    tokens, before = np.asarray(token_ids, "<i4"), context
    for index in range(len(tokens) // page_size):
        own = tokens[index * page_size : (index + 1) * page_size].tobytes()
        digest = hashlib.sha256(before + own).digest()
        yield PageAddress(index, before, own, digest)
        before = digest


class PageFiles:
    """A directory of pages, which any number of processes read and write at once.

    A file appears whole or not at all, and never changes; those that were used longest ago go when
    there are too many. Whatever goes wrong is a page that is not there, and is said once.

    Attributes:
      path: of the directory.
      max_bytes: that all pages in it take at most.
      is_writable: whether `write` has a chance.
    """

    def __init__(self, directory: str, max_bytes: int):
        """Opens a directory, which is made if it is missing.

        Args:
          directory: a path; ~ is the home directory.
          max_bytes: that all pages in it take at most.

        Raises:
          ValueError: if it cannot be made or read.
        """
        self.max_bytes = max_bytes
        try:
            self.path = pathlib.Path(directory).expanduser()
            self.path.mkdir(parents=True, exist_ok=True)
            os.scandir(self.path).close()
        except (OSError, ValueError, RuntimeError) as e:  # RuntimeError: no such home directory
            reason = getattr(e, "strerror", None) or e
            raise ValueError(f"prompt_cache={directory}: {reason}; name another directory") from e
        self._said: set[str] = set()
        self.is_writable = os.access(self.path, os.W_OK | os.X_OK)
        if not self.is_writable:
            self._say("write", f"{self.path} is not writable: pages are read there, none are added")

    def has(self, address: PageAddress, kind: int) -> bool:
        """Whether there is a file for a page; what is in it is looked at by `read`."""
        return os.path.exists(self._file(address, kind))

    def touch(self, address: PageAddress, kind: int) -> bool:
        """As `has`; a file that is there counts as used now.

        Pages count as a little older the further behind they are: what follows goes first.
        """
        now = time.time_ns() - _NS_PER_PAGE * address.index
        try:
            os.utime(self._file(address, kind), ns=(now, now))
        except FileNotFoundError:
            return False
        except OSError:  # of a directory that others write
            return self.has(address, kind)
        return True

    def read(self, address: PageAddress, kind: int, num_bytes: int) -> np.ndarray | None:
        """Reads pages, which count as used now.

        Args:
          address: of the logical page.
          kind: of groups, which the pages are for.
          num_bytes: that they take.

        Returns:
          u8[num_bytes]; None if there is no such file. A file that does not hold exactly what it
          should is removed, and none then.
        """
        path, header = self._file(address, kind), _header(address, kind, num_bytes)
        size = len(header) + num_bytes + _DIGEST_BYTES
        content = np.empty(size + 1, np.uint8)  # one more, to see that there is none
        try:
            with open(path, "rb", buffering=0) as file:
                found = 0
                while count := file.readinto(content.data[found:]):
                    found += count
        except FileNotFoundError:
            return None
        except OSError as e:
            self._say("read", f"{path} cannot be read: {e.strerror}")
            return None
        end = len(header) + num_bytes
        whole = found == size and content[: len(header)].tobytes() == header
        if not whole or hashlib.sha256(content[:end].data).digest() != content[end:size].tobytes():
            self._say("damaged", f"{path} is damaged, or no such page: it is computed again")
            with contextlib.suppress(OSError):
                os.unlink(path)
            return None
        self.touch(address, kind)
        return content[len(header) : end]

    def write(self, address: PageAddress, kind: int, pages: np.ndarray) -> bool:
        """Adds a file, unless there is one.

        Args:
          address: of the logical page.
          kind: of groups, which the pages are for.
          pages: u8[num_bytes], contiguous.

        Returns:
          Whether there is one now; what cannot be written, as on a full disk, leaves nothing.
        """
        path, header = self._file(address, kind), _header(address, kind, pages.nbytes)
        part = f"{path}.{secrets.token_hex(8)}.part"
        try:
            if self.has(address, kind):
                return True
            os.makedirs(os.path.dirname(path), exist_ok=True)
            digest = hashlib.sha256(header)
            digest.update(pages.data)
            try:
                with open(part, "xb", buffering=0) as file:
                    for piece in (header, pages.data, digest.digest()):
                        _write_all(file.fileno(), piece)
                os.replace(part, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(part)
                raise
        except OSError as e:
            self._say("write", f"{path} cannot be written: {e.strerror}")
            return False
        self.touch(address, kind)
        return True

    def file_bytes(self, address: PageAddress, num_bytes: int) -> int:
        """What a file with so many bytes of pages takes."""
        return len(_header(address, 0, num_bytes)) + num_bytes + _DIGEST_BYTES

    def make_room(self, num_bytes: int = 0) -> None:
        """Removes what was used longest ago, until so much more does not exceed the bound."""
        files: list[tuple[int, int, str]] = []
        stale = time.time() - _STALE_PART_S
        try:
            with os.scandir(self.path) as entries:
                folders = [e.path for e in entries if re.fullmatch("[0-9a-f]{2}", e.name)]
            for folder in folders:
                with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                    for entry in entries:
                        files += self._entry(entry, stale)
        except OSError as e:
            self._say("write", f"{self.path} cannot be listed: {e.strerror}")
            return
        total = num_bytes + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                return
            try:
                os.unlink(path)
            except FileNotFoundError:  # another process had the same thought
                pass
            except OSError as e:
                self._say("write", f"{path} cannot be removed: {e.strerror}")
                return
            total -= size

    def _entry(self, entry: os.DirEntry[str], stale: float) -> Iterator[tuple[int, int, str]]:
        """When a page was used, its size and its path; nothing of what is no page."""
        is_part = _PART.fullmatch(entry.name)
        if is_part is None and not _PAGE.fullmatch(entry.name):
            return
        try:
            stat = entry.stat()
            if is_part is None:
                yield stat.st_mtime_ns, stat.st_size, entry.path
            elif stat.st_mtime < stale:
                os.unlink(entry.path)
            else:
                yield time.time_ns(), stat.st_size, entry.path
        except OSError:  # it has gone, or is somebody else's
            return

    def _file(self, address: PageAddress, kind: int) -> str:
        name = address.digest.hex()
        return os.path.join(self.path, name[:2], f"{name}.{kind}.kv")

    def _say(self, what: str, message: str) -> None:
        """Warns the first time; later ones are for who looks closely."""
        logger.log(logging.DEBUG if what in self._said else logging.WARNING, "%s", message)
        self._said.add(what)


def _header(address: PageAddress, kind: int, num_bytes: int) -> bytes:
    fields = _HEADER.pack(_MAGIC, kind, len(address.tokens) // 4, num_bytes)
    return fields + address.before + address.tokens


def _write_all(fd: int, data: bytes | memoryview) -> None:
    """A full disk may take a part first."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view) :]
