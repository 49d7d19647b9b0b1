# SPDX-License-Identifier: Apache-2.0
"""Pages on disk are there whole or not at all, whatever happens to their files."""

import collections
import errno
import hashlib
import logging
import os
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.host import page_files
from jpaged.host.page_files import PageFiles, page_addresses

CONTEXT = bytes(range(32))
TOKENS = [5, 3, 2**30, 0, 7, 7, 1, 9]
ADDRESSES = list(page_addresses(CONTEXT, TOKENS, 4))
SIZE = 24 + 32 + 16 + 40 + 32  # header, digest before, tokens, pages, checksum


def pages_of(seed, num_bytes=40):
    return np.random.default_rng(seed).integers(0, 256, num_bytes).astype(np.uint8)


@pytest.fixture
def files(tmp_path):
    return PageFiles(str(tmp_path / "pages"), 2**20)


def all_files(files):
    return sorted(path for path in files.path.rglob("*") if path.is_file())


def test_addresses_and_a_file_by_hand(files):
    first, second = ADDRESSES
    tokens = struct.pack("<4i", 5, 3, 2**30, 0)
    digest = hashlib.sha256(CONTEXT + tokens).digest()
    assert first == (0, CONTEXT, tokens, digest)
    assert second.before == digest
    assert list(page_addresses(CONTEXT, TOKENS[:7], 4)) == [first]
    assert files.write(first, 1, pages_of(0))
    (path,) = all_files(files)
    assert path.relative_to(files.path).parts == (digest.hex()[:2], f"{digest.hex()}.1.kv")
    body = struct.pack("<8sIIQ", b"JPAGED1\n", 1, 4, 40) + CONTEXT + tokens + pages_of(0).tobytes()
    assert path.read_bytes() == body + hashlib.sha256(body).digest()
    assert files.file_bytes(first, 40) == len(body) + 32 == SIZE


def test_what_is_written_is_read(files):
    for i, (address, kind) in enumerate((a, k) for a in ADDRESSES for k in (0, 1)):
        assert not files.has(address, kind) and files.read(address, kind, 40) is None
        assert not files.touch(address, kind)
        assert files.write(address, kind, pages_of(i))
        assert files.write(address, kind, pages_of(99)), "there is one"
        assert files.has(address, kind) and files.touch(address, kind)
    for i, (address, kind) in enumerate((a, k) for a in ADDRESSES for k in (0, 1)):
        assert (files.read(address, kind, 40) == pages_of(i)).all()


def damages(content):
    """Every byte changed, every length, and what was of another page."""
    for at in range(len(content)):
        yield content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :]
    for length in range(len(content)):
        yield content[:length]
    yield content + b"\0"
    yield bytes(len(content))
    yield b"no page at all"


def test_every_damage_is_a_page_that_is_not_there(files, caplog):
    address, pages = ADDRESSES[1], pages_of(0)
    assert files.write(address, 0, pages)
    (path,) = all_files(files)
    whole = path.read_bytes()
    assert len(whole) == SIZE
    count = 0
    with caplog.at_level(logging.DEBUG):
        for content in damages(whole):
            path.write_bytes(content)
            assert files.read(address, 0, 40) is None
            assert not path.exists(), "it would be in the way for ever"
            count += 1
    assert count == 2 * SIZE + 3
    levels = collections.Counter(record.levelno for record in caplog.records)
    assert levels == {logging.WARNING: 1, logging.DEBUG: count - 1}
    assert f"{path} is damaged, or no such page" in caplog.text
    assert files.write(address, 0, pages)
    assert (files.read(address, 0, 40) == pages).all()


@pytest.mark.parametrize("other", ["tokens", "context", "kind", "size"])
def test_a_whole_page_of_something_else_is_none(files, other):
    address = ADDRESSES[0]
    (tokens,) = page_addresses(CONTEXT, [5, 3, 2**30, 1], 4)
    (context,) = page_addresses(bytes(32), TOKENS[:4], 4)
    source = {"tokens": (tokens, 0), "context": (context, 0)}.get(other, (address, 1))
    assert files.write(*source, pages_of(0, 44 if other == "size" else 40))
    (path,) = all_files(files)
    target = pathlib.Path(files._file(address, 0))
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    assert files.read(address, 0, 40) is None and not target.exists()


def test_what_cannot_be_read_is_none(files, caplog):
    address = ADDRESSES[0]
    pathlib.Path(files._file(address, 0)).mkdir(parents=True)
    assert files.read(address, 0, 40) is None
    assert "cannot be read: Is a directory" in caplog.text


@pytest.mark.parametrize("taken", [0, 1, 30, 100])
def test_a_full_disk_leaves_nothing(files, monkeypatch, caplog, taken):
    room = [taken]

    def full(fd, data):
        count = min(len(data), room[0])
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= count
        return write(fd, data[:count])

    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(page_files.os, "write", full)
        assert not files.write(ADDRESSES[0], 0, pages_of(0))
        assert not files.write(ADDRESSES[1], 0, pages_of(0))
        assert not all_files(files) and files.read(ADDRESSES[0], 0, 40) is None
        # A part at a time, as long as there is room.
        room[0] = SIZE
        assert files.write(ADDRESSES[0], 0, pages_of(0))
    assert (files.read(ADDRESSES[0], 0, 40) == pages_of(0)).all()
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "cannot be written: No space left" in caplog.text


def test_a_writer_that_dies_leaves_no_page(files, monkeypatch):
    def dies(src, dst):
        raise KeyboardInterrupt

    monkeypatch.setattr(page_files.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        files.write(ADDRESSES[0], 0, pages_of(0))
    assert not all_files(files)


# Processes that write the same pages in any order, and read each other's.
RACE = """
import sys, random
import numpy as np
from jpaged.host.page_files import PageFiles, page_addresses
files, seed = PageFiles(sys.argv[1], int(sys.argv[3])), int(sys.argv[2])
addresses = list(page_addresses(bytes(32), range(400), 4))
order = random.Random(seed)
found = 0
for _ in range(6):
    for i in order.sample(range(100), 100):
        pages = np.full(5000, i, np.uint8)
        assert files.write(addresses[i], 0, pages)
        read = files.read(addresses[order.randrange(100)], 0, 5000)
        assert read is None or len(set(read.tolist())) == 1
        found += read is not None
    files.make_room()
print(found, *files._said)
"""


@pytest.mark.parametrize("max_bytes", [2**20, 100_000])
def test_processes_share_a_directory(tmp_path, max_bytes):
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    running = [
        subprocess.Popen([*command, str(seed), str(max_bytes)], stdout=subprocess.PIPE, text=True)
        for seed in range(2)
    ]
    for process in running:
        out, _ = process.communicate(timeout=120)
        count, *said = out.split()
        assert process.returncode == 0 and int(count) > 50 and not said
    files = PageFiles(str(tmp_path), max_bytes)
    files.make_room()
    held = all_files(files)
    assert 0 < sum(path.stat().st_size for path in held) <= max_bytes
    if max_bytes == 2**20:
        assert len(held) == 100
    for i, address in enumerate(page_addresses(bytes(32), range(400), 4)):
        read = files.read(address, 0, 5000)
        assert read is None or (read == i).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("wrtm"), st.integers(0, 9)), max_size=40))
def test_what_was_used_longest_ago_goes(tmp_path_factory, steps):
    """Beside a dict in the order of use."""
    files = PageFiles(str(tmp_path_factory.mktemp("pages")), 4 * SIZE)
    addresses = [next(page_addresses(CONTEXT, [i] * 4, 4)) for i in range(10)]
    used, clock = collections.OrderedDict(), iter(range(10**18, 2 * 10**18, 10**9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_files.time, "time_ns", lambda: next(clock))
        for step, i in steps:
            if step == "w":
                assert files.write(addresses[i], 0, pages_of(i))
                if i not in used:
                    used[i] = None
            elif step == "r":
                read = files.read(addresses[i], 0, 40)
                assert (read is not None) == (i in used)
                if i in used:
                    assert (read == pages_of(i)).all()
                    used.move_to_end(i)
            elif step == "t":
                assert files.touch(addresses[i], 0) == (i in used)
                if i in used:
                    used.move_to_end(i)
            else:
                files.make_room(i % 4 * SIZE)
                while len(used) > 4 - i % 4:
                    used.popitem(last=False)
            assert {i for i in range(10) if files.has(addresses[i], 0)} == set(used)


def test_what_follows_goes_first(files):
    for address in ADDRESSES:
        assert files.write(address, 0, pages_of(0))
    files.read(ADDRESSES[0], 0, 40)
    files.read(ADDRESSES[1], 0, 40)
    files.max_bytes = SIZE
    files.make_room()
    assert files.has(ADDRESSES[0], 0) and not files.has(ADDRESSES[1], 0)


def test_only_pages_are_removed(files):
    assert files.write(ADDRESSES[0], 0, pages_of(0))
    (page,) = all_files(files)
    old = page.with_name(f"{page.name}.0123456789abcdef.part")
    young = page.with_name(f"{page.name}.fedcba9876543210.part")
    others = [page.with_name("notes.kv"), files.path / "readme", files.path / page.name]
    for path in (old, young, *others):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    files.max_bytes = 1
    files.make_room()
    # Who writes just now is not disturbed.
    assert sorted(all_files(files)) == sorted([*others, young])


@pytest.mark.parametrize("where", ["file", "file/below", "\0"])
def test_a_directory_that_cannot_be(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"prompt_cache=.*; name another directory"):
        PageFiles(str(tmp_path / where), 2**20)


def test_a_directory_of_others_is_read(files, monkeypatch, caplog):
    assert files.write(ADDRESSES[0], 0, pages_of(0))

    def refused(path, ns):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(page_files.os, "access", lambda path, mode: False)
    monkeypatch.setattr(page_files.os, "utime", refused)
    others = PageFiles(str(files.path), 2**20)
    assert not others.is_writable and "is not writable: pages are read there" in caplog.text
    assert (others.read(ADDRESSES[0], 0, 40) == pages_of(0)).all()
    assert others.touch(ADDRESSES[0], 0) and not others.touch(ADDRESSES[1], 0)
