# SPDX-License-Identifier: Apache-2.0
"""Records, written while requests run and read back, beside `PoolSnapshot`s of the same moments."""

import errno
import gc
import json
import logging
import os

import numpy as np
import pytest

from jpaged import SamplingParams
from jpaged.host.groups import GroupKind
from jpaged.simulation.layers import LayerGroups
from jpaged.telemetry import recorder as recorder_module
from jpaged.telemetry.record import RecordError, RecordHeader, first_line, read_record
from jpaged.telemetry.recorder import Recorder
from tests.jpaged.telemetry.recorded import simulate, snapshot_of
from tests.jpaged.tiny import prompts_of, tiny_engine

WINDOWS = LayerGroups(1, (GroupKind(None, 1), GroupKind(5, 2)), (1, 2))


def pages_of(frame, header):
    """Of each page its owners, and how many of its cells hold a token."""
    owners, fills = [[] for _ in range(header.num_pages)], [0] * header.num_pages
    rest = frame.pages.tolist()
    for _ in header.windows:
        for name, tokens, _, count in frame.sequences:
            for index in range(count):
                page = rest.pop(0)
                if page:
                    owners[page].append(name)
                    held = min(header.page_size, tokens - index * header.page_size)
                    fills[page] = max(fills[page], held)
    assert not rest
    return owners, fills


def read_whole(path):
    """Reads a record whose writer was forgotten."""
    gc.collect()
    record = read_record(path)
    assert record.has_ended
    return record


class TestFrames:
    @pytest.mark.parametrize(
        "options",
        [{}, {"preemption": "swap"}, {"layers": WINDOWS, "num_pages": 60, "num_samples": 1}],
        ids=["samples", "swap", "windows"],
    )
    def test_they_are_what_snapshots_of_the_pool_say(self, tmp_path, monkeypatch, options):
        seen = []

        def look(scheduler):
            seen.append((snapshot_of(scheduler), scheduler.num_waiting))

        simulate(tmp_path / "r", on_look=look, monkeypatch=monkeypatch, **options)
        record = read_whole(tmp_path / "r")
        assert len(record.frames) == len(seen) > 25
        shared = cached = released = 0
        for frame, (snapshot, num_waiting) in zip(record.frames, seen, strict=True):
            owners, fills = pages_of(frame, record.header)
            for page in snapshot.pages:
                assert sorted(owners[page.page_id]) == sorted(page.owners)
                assert (page.page_id in frame.cached.tolist()) == page.is_cached
                if page.owners:
                    assert fills[page.page_id] == page.fill
                shared += len(page.owners) > 1
                cached += page.is_cached
            assert frame.num_waiting == num_waiting
            released += int((frame.pages == 0).sum())
        assert shared and cached and bool(released) == ("layers" in options)
        assert record.header.windows == ((None, 5, 5) if "layers" in options else (None,))

    def test_totals_and_times(self, tmp_path):
        host = simulate(tmp_path / "r")
        frames = read_record(tmp_path / "r").frames
        assert [frame.totals["num_steps"] for frame in frames] == [*range(1, len(frames) + 1)]
        assert frames[-1].totals["num_preemptions"] == host.totals.num_preemptions > 0
        assert frames[-1].totals["live_cell_steps"] == host.totals.live_cell_steps
        assert [frame.time_s for frame in frames[:4]] == [0.0, 0.5, 1.0, 1.5]
        # The first request: a prompt of 13, and 9 tokens; then its first sample's.
        assert frames[0].sequences[0] == ("0#0", 13, 22, 4)
        assert frames[1].sequences[0] == ("0#0", 14, 22, 4)

    def test_preemptions_say_who_and_why(self, tmp_path, caplog):
        caplog.set_level(logging.INFO, logger="jpaged.host.scheduler")
        simulate(tmp_path / "r")
        record = read_record(tmp_path / "r")
        said = [r.getMessage() for r in caplog.records if "preempted" in r.getMessage()]
        assert len(said) == len(record.preemptions) > 1
        for note, text in zip(record.preemptions, said, strict=True):
            assert f"request '{note.request_id}'" in text and text.endswith(f": {note.why}")
            assert f"as request '{note.wanted_by}' needs pages" in text
            assert not note.swap and note.num_tokens > 0
        first, all_lost = record.preemptions[0], record.frames[-1].totals["num_preemptions"]
        # Between the frames before and after it, its sequences have lost their pages.
        at = next(i for i, f in enumerate(record.frames) if f.time_s >= first.time_s)
        name = f"{first.request_id}#0"
        assert name in [s[0] for s in record.frames[at - 1].sequences]
        assert name not in [s[0] for s in record.frames[at].sequences]
        assert sum(note.num_sequences for note in record.preemptions) == all_lost


class TestSize:
    def test_frames_of_a_long_run_are_at_even_distances(self, tmp_path, monkeypatch):
        monkeypatch.setattr(recorder_module, "MAX_FRAMES", 10)
        monkeypatch.setattr(recorder_module, "MAX_PREEMPTIONS", 4)
        totals = simulate(tmp_path / "r", num_requests=30).totals
        record = read_whole(tmp_path / "r")
        steps = [frame.totals["num_steps"] for frame in record.frames]
        (stride,) = set(np.diff(steps).tolist())
        assert steps[0] == 1 and stride in (2, 4, 8, 16, 32, 64) and 5 < len(steps) <= 10
        assert steps[-1] > totals.num_steps - stride
        assert 2 < len(record.preemptions) <= 4
        assert [p.name for p in tmp_path.iterdir()] == ["r"]

    def test_a_large_pool_has_fewer_frames(self, tmp_path, monkeypatch):
        monkeypatch.setattr(recorder_module, "MAX_BYTES", 8000)
        simulate(tmp_path / "r", num_requests=30)
        assert 2000 < (tmp_path / "r").stat().st_size < 8100
        assert len(read_record(tmp_path / "r").frames) > 4

    def test_frames_take_a_hundredth_of_the_time(self, tmp_path, monkeypatch):
        class Clock:
            now = 0.0

        def look_for(self):
            Clock.now += 0.03  # what a frame takes
            return "{}\n"

        monkeypatch.setattr(recorder_module, "as_line", lambda *_: look_for(None))
        monkeypatch.setattr(recorder_module.Frame, "of", lambda *_: _Empty)
        monkeypatch.setattr(recorder_module.time, "perf_counter", lambda: Clock.now)
        recorder = Recorder(
            tmp_path / "r",
            RecordHeader(page_size=4, num_pages=9, max_model_len=8),
            lambda: Clock.now,
        )
        for _ in range(10_000):
            Clock.now += 0.01
            recorder.look(None, None)
        spent = Clock.now - 100
        assert 0.5 + 0.01 * 100 < spent < 0.5 + 0.01 * 100 + 0.1


class _Empty:
    @staticmethod
    def as_fields():
        return {}


class TestFiles:
    def test_a_run_that_was_killed_is_read_up_to_the_kill(self, tmp_path):
        path = tmp_path / "r"
        host = simulate(path, steps=20)  # held, so that it does not end
        text, num_frames = path.read_bytes(), 20
        assert not read_record(path).has_ended  # it is being written
        assert len(read_record(path).frames) == num_frames
        for cut in range(1, len(text) - text.index(b"\n"), 97):
            path.write_bytes(text[:-cut])
            assert len(read_record(path).frames) == text[:-cut].count(b'{"frame"') - (
                not text[:-cut].endswith(b"\n") and b'{"frame"' in text[:-cut].rpartition(b"\n")[2]
            )
        del host

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "no record of a run: make one with --record=FILE"),
            (b"{}\n", "no record"),
            (b"[1]\n", "no record"),
            (b"\x89PNG\r\n\x1a\n", "no record"),
            (b'{"format": "jpaged steps", "version": 1}\n', "no record"),
            (b'{"format": "jpaged record", "version": 1}\n', "no record"),
            (
                b'{"format": "jpaged record", "version": 2, "new": 5}\n',
                "record of version 2, and this jpaged reads version 1",
            ),
        ],
    )
    def test_no_record(self, tmp_path, data, message):
        (tmp_path / "r").write_bytes(data)
        with pytest.raises(RecordError, match=f"r is .*{message}"):
            read_record(tmp_path / "r")

    @pytest.mark.parametrize(
        "line",
        [
            "{}", "[", "[1]", "5", '{"frame": 5}', '{"frame": {}}', '{"more": {}}',
            '{"preemption": {"why": 5}}',
        ],
    )  # fmt: skip
    def test_a_damaged_line_is_named(self, tmp_path, line):
        simulate(tmp_path / "r", steps=5)
        lines = (tmp_path / "r").read_text().splitlines()
        lines[2] = line
        (tmp_path / "r").write_text("\n".join(lines) + "\n")
        with pytest.raises(RecordError, match="r: line 3 of the record is damaged"):
            read_record(tmp_path / "r")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("pages", "eJwDAAAAAAE="), ("pages", "A"), ("pages", "AAAA"), ("cached", "eJxj"),
            ("sequences", [["a", 1, 2]]), ("sequences", [["a", "x", 2, 3]]), ("totals", [1]),
            ("time_s", None),
        ],
    )  # fmt: skip
    def test_a_damaged_frame_is_named(self, tmp_path, field, value):
        simulate(tmp_path / "r", steps=5)
        lines = (tmp_path / "r").read_text().splitlines()
        frame = json.loads(lines[1])
        frame["frame"][field] = value
        (tmp_path / "r").write_text("\n".join([lines[0], json.dumps(frame)]) + "\n")
        with pytest.raises(RecordError, match="r: line 2 of the record is damaged"):
            read_record(tmp_path / "r")

    def test_pages_that_the_pool_does_not_have(self, tmp_path):
        simulate(tmp_path / "r", steps=5)
        lines = (tmp_path / "r").read_text().splitlines()
        lines[0] = lines[0].replace('"num_pages":24', '"num_pages":3')
        (tmp_path / "r").write_text("\n".join(lines) + "\n")
        with pytest.raises(RecordError, match=r"line 2 .*no such page"):
            read_record(tmp_path / "r")

    def test_what_is_no_record_is_not_replaced(self, tmp_path):
        header = RecordHeader(page_size=4, num_pages=9, max_model_len=8)
        path = tmp_path / "prompts.txt"
        path.write_text("Once")
        for taken in (path, tmp_path, "/dev/null"):
            with pytest.raises(ValueError, match=r"record='.*' cannot be written: it is there"):
                Recorder(taken, header)
        assert path.read_text() == "Once"
        with pytest.raises(ValueError, match="cannot be written: No such file or directory"):
            Recorder(tmp_path / "no" / "r", header)
        path.write_text("")
        Recorder(path, header).close()
        Recorder(path, header).close()
        assert path.read_text() == first_line(header) + '{"end":{}}\n'

    def test_a_full_disk_ends_the_record_and_not_the_run(self, tmp_path, monkeypatch, caplog):
        write = recorder_module._File.write

        def full(self, line):
            if self.num_bytes > 2000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(self, line)

        monkeypatch.setattr(recorder_module._File, "write", full)
        assert not simulate(tmp_path / "r").has_unfinished_requests
        (said,) = (r.getMessage() for r in caplog.records if r.levelname == "ERROR")
        assert said.endswith("r: the record ends: No space left on device")
        record = read_record(tmp_path / "r")
        assert record.frames and not record.has_ended


def test_an_engine_records_its_steps(tmp_path):
    engine = tiny_engine(record=str(tmp_path / "r"), num_pages=12, page_size=4)
    engine.generate(prompts_of([5, 9, 14]), SamplingParams(max_tokens=12, temperature=0))
    totals = engine.stats().totals
    record = read_record(tmp_path / "r")
    assert (record.header.num_pages, record.header.page_size) == (12, 4)
    names = {name for frame in record.frames for name, *_ in frame.sequences}
    assert len(names) == 3 and len(record.preemptions) == totals.num_preemptions > 0
