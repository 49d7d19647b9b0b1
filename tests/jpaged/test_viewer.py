# SPDX-License-Identifier: Apache-2.0
"""Snapshots against hand-worked ones and a random program; drawings, letter by letter."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged import SamplingParams
from jpaged.host.page_pool import OutOfPagesError, PagePool
from jpaged.host.page_table import PageTable
from jpaged.host.viewer import MIN_WIDTH, PageState, PoolSnapshot, draw
from tests.jpaged.tiny import prompts_of, tiny_engine


def make_table(num_usable_pages=8, page_size=4):
    return PageTable(PagePool(num_usable_pages + 1), page_size, num_usable_pages)


def pages_of(*states, first=1):
    """A pool of pages of 4, given as (owners, fill) or, for free and cached ones, "." and ":"."""
    kinds = {".": ((), 0, False), ":": ((), 4, True)}
    values = [
        kinds[s] if isinstance(s, str) else (tuple(s[0].split()), s[1], False) for s in states
    ]
    pages = [PageState(page, *value) for page, value in enumerate(values, first)]
    return PoolSnapshot(4, tuple(pages))


def lines(*expected):
    return "\n".join(expected)


class TestSnapshot:
    def test_of_forks_that_write(self):
        table = make_table(num_usable_pages=6)
        parent = table.add()
        table.append(parent, 6)
        full, partial = table.pages(parent)
        child = table.fork(parent)
        before = PoolSnapshot.of(table, {parent: "parent", child: "child"})
        ((_, copy),) = table.append(child, 2)
        after = PoolSnapshot.of(table, {parent: "parent", child: "child"})
        assert (full, partial, copy) == (1, 2, 3)
        both, free = ("parent", "child"), [PageState(page, (), 0) for page in (4, 5, 6)]
        assert before == PoolSnapshot(
            4, (PageState(1, both, 4), PageState(2, both, 2), PageState(3, (), 0), *free)
        )
        assert after == PoolSnapshot(
            4,
            (
                PageState(1, both, 4),
                PageState(2, ("parent",), 2),
                PageState(3, ("child",), 4),
                *free,
            ),
        )

    def test_of_a_page_that_is_kept(self):
        table = make_table(num_usable_pages=2)
        seq = table.add()
        table.append(seq, 5)
        table.pool.keep(1)
        used = PoolSnapshot.of(table, {seq: "a"})
        assert used.pages == (PageState(1, ("a",), 4), PageState(2, ("a",), 1))
        table.free(seq)
        cached = PoolSnapshot.of(table, {})
        assert cached.pages == (PageState(1, (), 4, True), PageState(2, (), 0))

    def test_a_sequence_without_a_name_is_noticed(self):
        table = make_table()
        table.append(table.add(), 1)
        with pytest.raises(AssertionError, match="page 1: an owner has no name"):
            PoolSnapshot.of(table, {})


@pytest.fixture(scope="module")
def engine():
    # One shape of step, so that little is compiled.
    return tiny_engine(
        num_pages=24, page_size=4, max_num_seqs=4, max_num_batched_tokens=16, deterministic=True
    )


class TestEngine:
    @pytest.mark.parametrize(
        "params",
        [{}, dict(n=3), dict(beam_width=3, temperature=1)],
        ids=["one", "samples", "beams"],
    )
    def test_it_agrees_with_the_stats_after_each_step(self, engine, params):
        engine.reset_prefix_cache()
        seen, sharers = set(), Counter()

        def look():
            pages, stats = engine.pool_snapshot().pages, engine.stats()
            owners = Counter(len(page.owners) for page in pages)
            assert owners[0] == stats.num_free_pages
            assert owners.total() == stats.num_usable_pages
            assert sum(owners[n] for n in owners if n > 1) == stats.num_shared_pages
            assert sum(n * owners[n] for n in owners) - stats.num_used_pages == (
                stats.num_saved_pages
            )
            assert sum(page.is_cached for page in pages) == stats.num_cached_pages
            live_cells = sum(page.fill for page in pages if page.owners)
            assert live_cells == pytest.approx(stats.utilisation * 4 * stats.num_used_pages)
            seen.update(name for page in pages for name in page.owners)
            sharers.update(owners)

        params = SamplingParams(max_tokens=9, seed=1, ignore_eos=True, **params)
        outputs = engine.generate(prompts_of([10, 11, 12]), params, on_step=look)
        samples = params.beam_width or params.n
        ids = [output.request_id for output in outputs]
        assert seen == {f"{request}#{sample}" for request in ids for sample in range(samples)}
        assert max(sharers) == samples
        pages = engine.pool_snapshot().pages
        assert not any(page.owners for page in pages) and any(page.is_cached for page in pages)

    def test_a_request_has_the_name_that_it_was_given(self, engine):
        engine.reset_prefix_cache()
        engine.add_request(prompts_of([6])[0], SamplingParams(max_tokens=4), "mine")
        engine.step()  # it computes the prompt
        pages = [page for page in engine.pool_snapshot().pages if page.owners]
        assert sorted((page.owners, page.fill) for page in pages) == [
            (("mine#0",), 2),
            (("mine#0",), 4),
        ]
        engine.abort("mine")


# What a random program does: append that many tokens, fork, free, or free and keep full pages.
programs = st.lists(
    st.tuples(st.sampled_from(["add", "fork", "free", "keep"]), st.integers(0, 9))
    | st.tuples(st.just("append"), st.integers(0, 9), st.integers(0, 9)),
    max_size=40,
)


def run_program(program, num_usable_pages, page_size):
    """Returns the table that it leaves, and the sequences in order of age."""
    table, seqs = make_table(num_usable_pages, page_size), []
    for what, number, *count in program:
        if what == "add":
            seqs.append(table.add())
        elif seqs:
            seq = seqs[number % len(seqs)]
            if what == "append":
                try:
                    table.append(seq, *count)
                except (OutOfPagesError, ValueError):
                    pass
            elif what == "fork":
                seqs.append(table.fork(seq))
            else:
                full = table.num_tokens(seq) // page_size if what == "keep" else 0
                for page in table.pages(seq)[:full]:
                    table.pool.keep(page)
                table.free(seq)
                seqs.remove(seq)
    return table, seqs


def read_map(drawing):
    """The characters of the map by page, where no rows are left out."""
    rows = [re.fullmatch(r" {2,}(\d+)  (\S+(?: \S+)*)", row) for row in drawing.splitlines()]
    found = {}
    for row in filter(None, rows):
        if " pages, up to " in row[2]:
            continue
        found |= dict(enumerate(row[2].replace(" ", ""), int(row[1])))
    return found


@settings(deadline=None, max_examples=300)
@given(programs, st.integers(1, 150), st.integers(1, 4), st.integers(MIN_WIDTH, 100))
def test_a_random_program(program, num_usable_pages, page_size, width):
    table, seqs = run_program(program, num_usable_pages, page_size)
    names = {seq: f"{seq}" for seq in seqs}
    snapshot, pool = PoolSnapshot.of(table, names), table.pool
    assert [page.page_id for page in snapshot.pages] == list(range(1, pool.num_pages))
    fills = Counter()
    for seq in seqs:
        for index, page in enumerate(table.pages(seq)):
            held = min(table.num_tokens(seq) - index * page_size, page_size)
            fills[page] = max(fills[page], held)
    for page in snapshot.pages:
        assert page.owners == tuple(
            name for seq, name in names.items() if page.page_id in table.pages(seq)
        )
        assert len(page.owners) == pool.refcount(page.page_id)
        assert page.is_cached == (not page.owners and pool.is_kept(page.page_id))
        assert page.fill == (page_size if page.is_cached else fills[page.page_id])
    assert sum(page.is_cached for page in snapshot.pages) == pool.num_cached_pages
    drawing = draw(snapshot, width)
    assert "\x1b" not in drawing
    assert max(map(len, drawing.splitlines())) <= width
    assert re.sub(r"\x1b\[\d+m", "", draw(snapshot, width, color=True)) == drawing
    marks = read_map(drawing)
    for page in snapshot.pages:
        if " pages, up to " not in drawing:
            assert page.page_id in marks
        mark = marks.get(page.page_id, "")
        if not page.owners:
            assert mark in ("", ":" if page.is_cached else ".")
        elif len(page.owners) > 1:
            sharers = str(len(page.owners)) if len(page.owners) < 10 else "+"
            assert mark in ("", sharers if page.fill == page_size else "%")
        else:
            assert mark == "" or (mark.isupper() if page.fill == page_size else mark.islower())


class TestDrawing:
    def test_every_kind_of_page(self):
        snapshot = pages_of(
            ("0#0 0#1", 4), ("0#0 0#1 10#0 2#0", 4), ("0#0", 4), ("0#1", 3), ("2#0 0#1", 3),
            ":", ".", ("2#0", 0), ("10#0", 1), ("10#0", 4), ".",
        )  # fmt: skip
        assert draw(snapshot) == lines(
            "11 pages of 4 cells: 8 live (3 shared, 71.9% filled), 3 free (1 cached)",
            "   1  24Ab%:._dD .",
            "A-Z one owner, full; a-z one owner, partial; _ one owner, empty; 2-9 so many",
            "  owners, full; % several owners, partial; : cached; . free",
            "  A 0#0 3 pages (2 shared)    B 0#1 4 pages (3 shared)",
            "  C 2#0 3 pages (2 shared)    D 10#0 3 pages (1 shared)",
            "shared: 1 by A B; 2 by A B D C; 5 by C B",
        )

    def test_an_idle_pool(self):
        assert draw(pages_of(".", ".", ":")) == lines(
            "3 pages of 4 cells: 0 live, 3 free (1 cached)",
            "  1  ..:",
            ": cached; . free",
        )

    def test_long_runs_are_counted(self):
        rest = [("1#0", 4)] * 250 + [":"] * 3
        snapshot = pages_of(("0#0", 4), ("0#0", 2), *["."] * 8000, *rest, *["."] * 2000)
        assert draw(snapshot) == lines(
            "10255 pages of 4 cells: 252 live (0 shared, 99.8% filled), 10003 free (3 cached)",
            "      1  Aa........ .......... .......... .......... .......... ..........",
            "     61  ... 7920 free pages, up to 7980",
            "   7981  .......... .......... ..BBBBBBBB BBBBBBBBBB BBBBBBBBBB BBBBBBBBBB",
            "   8041  BBB 180 pages, up to 8220",
            "   8221  BBBBBBBBBB BBBBBBBBBB BBBBBBBBBB BB:::..... .......... ..........",
            "   8281  ... 1975 free pages, up to 10255",
            "A-Z one owner, full; a-z one owner, partial; : cached; . free",
            "  A 0#0 2 pages     B 1#0 250 pages",
        )

    def test_two_equal_rows_are_drawn(self):
        drawing = draw(pages_of(*["."] * 120))
        assert drawing.count("..........") == 12 and "up to" not in drawing

    def test_more_owners_than_a_digit_can_say(self):
        owners = [f"{number}#0" for number in range(10)]
        drawing = draw(pages_of((" ".join(owners[:9]), 4), (" ".join(owners), 4)))
        assert drawing.splitlines()[1:3] == [
            "  1  9+",
            "2-9 so many owners, full; + ten owners or more, full",
        ]

    def test_letters_are_used_again(self):
        owners = [f"{number}#0" for number in range(30)]
        drawing = draw(pages_of(*[(name, 4) for name in owners], (" ".join(owners), 4)), width=64)
        assert drawing.splitlines()[2:6] == [
            "   1  ABCDEFGHIJ KLMNOPQRST UVWXYZABCD +",
            "A-Z one owner, full; + ten owners or more, full",
            "  A 0#0 2 pages (1 shared)    B 1#0 2 pages (1 shared)",
            "  C 2#0 2 pages (1 shared)    D 3#0 2 pages (1 shared)",
        ]
        assert drawing.splitlines()[-3:] == [
            "  Y 24#0 2 pages (1 shared)   Z 25#0 2 pages (1 shared)",
            "  and 4 more, 26#0 to 29#0: again A, B, ...",
            "shared: 31 by A B C D E F G H I J K L and 18 more",
        ]

    def test_many_shared_pages_are_named_by_owners_and_counted(self):
        pairs = [(f"{number}#0 {number}#1", 4) for number in range(10)]
        drawing = draw(pages_of(*pairs, pairs[0], pairs[0], ".", pairs[0], pairs[9]))
        assert drawing.splitlines()[-3:] == [
            "  S 9#0 2 pages (2 shared)   T 9#1 2 pages (2 shared)",
            "shared: 1 11-12 14 by A B; 2 by C D; 3 by E F; 4 by G H; 5 by I J; 6 by K L; 7",
            "  by M N; 8 by O P; and 3 more",
        ]

    def test_colour_is_added_to_what_is_there_without(self):
        snapshot = pages_of(("0#0", 4), ("0#0", 4), ("1#0", 2), ("0#0 1#0", 4), ":", ".")
        colored = draw(snapshot, color=True).splitlines()
        assert colored[1] == "  1  \x1b[32mAA\x1b[0m\x1b[33mb\x1b[0m\x1b[1m2\x1b[0m\x1b[2m:.\x1b[0m"
        assert colored[4].startswith("  \x1b[32mA\x1b[0m 0#0 3 pages")
        plain = draw(snapshot)
        assert re.sub(r"\x1b\[\d+m", "", "\n".join(colored)) == plain
        assert "\x1b" not in plain

    @pytest.mark.parametrize("width", [MIN_WIDTH, 80])
    def test_whatever_requests_are_called(self, width):
        names = ["long" * 30 + "#0", "line\nbreak\x1b[31m#0", "Ünïcödé#0"]
        drawing = draw(pages_of(*[(name, 4) for name in names] * 40), width)
        assert drawing.isascii() and "\x1b" not in drawing
        assert max(map(len, drawing.splitlines())) <= width
        start, end = ("longl", "ng#0") if width == MIN_WIDTH else ("longlongl", "onglong#0")
        assert f"{start}" in drawing and f"{end} 40 pages" in drawing

    def test_too_few_columns_are_refused(self):
        with pytest.raises(ValueError, match=f"width=20 must be at least {MIN_WIDTH} columns"):
            draw(pages_of("."), width=20)
