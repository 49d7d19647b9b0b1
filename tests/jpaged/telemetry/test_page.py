# SPDX-License-Identifier: Apache-2.0
"""Pages of records: what stands in them, and what a real browser makes of them."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest

from jpaged.telemetry.page import make_page
from jpaged.telemetry.record import TOTALS, read_record
from tests.jpaged.telemetry.recorded import simulate

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = "</script><script>document.title='taken'</script><!--<b>&amp;"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("record") / "run.jsonl"
    simulate(path)
    return path


class _Reader(html.parser.HTMLParser):
    """Collects tags, attributes, and what stands in scripts."""

    def __init__(self, text):
        super().__init__()
        self.attributes, self.scripts, self.tags = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.tags[-1:] == ["script"]:
            self.scripts.append(data)


def test_it_has_all_in_itself(recorded):
    text = make_page(read_record(recorded), "run.jsonl")
    found = _Reader(text)
    assert not [name for name, _ in found.attributes if name in ("src", "srcset", "action")]
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {*found.tags}
    assert "default-src 'none'" in dict(found.attributes)["content"] or "default-src 'none'" in text
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|innerHTML|eval\(", text)
    assert text.isascii()


def test_whatever_a_record_says_of_itself_is_text(recorded):
    lines = recorded.read_text().splitlines()
    for place, line in enumerate(lines[1:], 1):
        fields = json.loads(line)
        for kind in ("frame", "preemption"):
            if kind == "frame" and kind in fields:
                for own in fields[kind]["sequences"]:
                    own[0] = f"{HOSTILE}#0"
            elif kind in fields:
                fields[kind]["request_id"] = fields[kind]["why"] = HOSTILE
        lines[place] = json.dumps(fields)
    (path := recorded.with_name("hostile.jsonl")).write_text("\n".join(lines) + "\n")
    text = make_page(read_record(path), HOSTILE)
    found = _Reader(text)
    assert found.tags.count("script") == 2 and "b" not in found.tags
    data = json.loads(found.scripts[0])
    assert data["title"] == HOSTILE and data["preemptions"][0]["why"] == HOSTILE
    assert data["frames"][0]["sequences"][0][0] == f"{HOSTILE}#0"


@pytest.mark.slow
def test_a_browser_shows_it(recorded, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    record = read_record(recorded)
    page = tmp_path / "run.html"
    page.write_text(make_page(record, HOSTILE), encoding="ascii")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/u",
            "--virtual-time-budget=20000", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=500, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    shown = re.sub(r"<(script|style).*?</\1>", "", done.stdout, flags=re.DOTALL)
    assert 'data-ready="true"' in shown, done.stderr[-2000:]
    assert "data-error" not in shown
    assert re.search(r'<html[^>]* data-theme="light"', shown)
    title = HOSTILE.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f'<h1 id="title">{title}</h1>' in shown and "<title>taken" not in shown
    totals = record.frames[-1].totals
    utilisation = totals["live_cell_steps"] / totals["allocated_cell_steps"]
    saved = 1 - totals["used_page_steps"] / totals["page_reference_steps"]
    tiles = re.findall(r'<div class="tile"><b>([^<]*)</b>', shown)
    assert tiles[0] == f"{100 * utilisation:.1f} %"
    tokens = sum(own[1] for frame in record.frames for own in frame.sequences)
    places = sum(len(frame.sequences) for frame in record.frames)
    assert tiles[1] == f"{100 * tokens / (40 * places):.1f} %"
    assert tiles[2] == str(max(len(frame.sequences) for frame in record.frames))
    assert tiles[3] == f"{100 * saved:.1f} %" and tiles[4] == str(totals["num_preemptions"])
    assert "23 pages of 4 tokens" in shown
    # The page opens at the fullest of the steps; of those the last.
    (body,) = re.findall(r'<table id="sequences">.*?<tbody>(.*?)</tbody>', shown, re.DOTALL)
    rows = [re.findall(r"<td>([^<]*)</td>", row) for row in re.findall(r"<tr.*?</tr>", body)]
    used, before, best = [], dict.fromkeys(TOTALS, 0), 0
    for frame in record.frames:
        used.append(frame.totals["used_page_steps"] - before["used_page_steps"])
        before = frame.totals
        best = len(used) - 1 if used[-1] >= used[best] else best
    frame = record.frames[best]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        (name, str(tokens), str(count)) for name, tokens, _, count in frame.sequences
    ]
    assert f">{used[best]} of 23 in use" in re.sub(r'id="moment"', "", shown).replace(" >", ">")
    (body,) = re.findall(r'<table id="preemptions">.*?<tbody>(.*?)</tbody>', shown, re.DOTALL)
    assert body.count("<tr") == len(record.preemptions) > 0
    assert record.preemptions[0].why in body
