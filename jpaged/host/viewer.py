# SPDX-License-Identifier: Apache-2.0
"""Shows people who owns which page: a reading of the pool as a value, and as a drawing."""

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jpaged.host.page_pool import NULL_PAGE
from jpaged.host.page_table import PageTable
from jpaged.host.sequence import Request

MIN_WIDTH = 48

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_COLOURS = (32, 33, 34, 35, 36, 31, 92, 93, 94, 95, 96, 91)
_PLAIN, _BOLD, _FAINT = 0, 1, 2
# What makes a legend too long to read is counted instead.
_MAX_GROUPS = 8
_MAX_LISTED = 12
# So many equal rows become one line.
_MIN_RUN = 3

# A character and the number of its ANSI style.
_Cell = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class PageState:
    """One page of a `PoolSnapshot`.

    Attributes:
      page_id: the physical page.
      owners: names of the sequences that refer to it: none if it is free, several if they share it.
      fill: cells that hold a token, those included that a step on its way is writing.
      is_cached: whether it is free, but kept for its content.
      group: of the layers for which its owners have it; 0 without an owner.
    """

    page_id: int
    owners: tuple[str, ...]
    fill: int
    is_cached: bool = False
    group: int = 0


@dataclasses.dataclass(frozen=True)
class PoolSnapshot:
    """Who owned which page at one moment.

    `Engine.pool_snapshot` takes one of all live requests; `of`, of any page table.

    Attributes:
      page_size: cells of a page.
      pages: every page that can be handed out, in order of id.
      windows: of each group of layers that has pages of its own, the tokens that a query sees, or
        None for all before it.
    """

    page_size: int
    pages: tuple[PageState, ...]
    windows: tuple[int | None, ...] = (None,)

    @classmethod
    def of(cls, table: PageTable, names: Mapping[int, str]) -> "PoolSnapshot":
        """Reads a page table and its pool. Cost: every page.

        Args:
          table: what to read.
          names: what to call its sequences, all of which are there; owners are in this order.
        """
        pool, size, fills = table.pool, table.page_size, table.cells.of_pages()
        cached = pool.cached_pages()
        owners: list[list[str]] = [[] for _ in fills]
        groups: dict[int, int] = {}
        for seq, name in names.items():
            for group in range(table.num_groups):
                for page in table.pages(seq, group):
                    if page != NULL_PAGE:
                        owners[page].append(name)
                        groups[page] = group
        pages: list[PageState] = []
        for page in range(NULL_PAGE + 1, pool.num_pages):
            # Only full pages are kept.
            fill = size if page in cached else fills[page]
            group = groups.get(page, 0)
            pages.append(PageState(page, tuple(owners[page]), fill, page in cached, group))
            # The first page of a bundle has its count.
            counts = 0, len(owners[page])
            assert pool.refcount(page) in counts, f"page {page}: an owner has no name"
        windows = [kind.window for kind in table.kinds for _ in range(kind.num_groups)]
        return cls(size, tuple(pages), tuple(windows))

    @classmethod
    def of_requests(cls, table: PageTable, requests: Iterable[Request]) -> "PoolSnapshot":
        """Reads a page table, of which all sequences belong to these requests.

        A sequence is called "request_id#sample_index", as in the log; so is a beam.
        """
        names = {
            seq.table_id: f"{request.request_id}#{seq.sample_index}"
            for request in requests
            for seq in request.sequences
            if seq.table_id is not None
        }
        return cls.of(table, names)


def draw(snapshot: PoolSnapshot, width: int = 80, color: bool = False) -> str:
    """Draws the pool with a character a page, and says what the characters mean.

    Colour adds to the drawing, but nothing is told by it alone. Long runs of rows in which all
    pages are alike, free ones mostly, are counted instead of drawn.

    Args:
      snapshot: what to draw.
      width: the most columns that a line takes.
      color: whether to use ANSI colours: one for each owner, bold for shared pages.

    Returns:
      Lines, without a newline after the last.

    Raises:
      ValueError: if there are fewer columns than `MIN_WIDTH`.
    """
    if width < MIN_WIDTH:
        raise ValueError(f"width={width} must be at least {MIN_WIDTH} columns")
    names = sorted({name for page in snapshot.pages for name in page.owners}, key=_natural)
    owners = {
        name: (_LETTERS[index % len(_LETTERS)], _COLOURS[index % len(_COLOURS)])
        for index, name in enumerate(names)
    }
    cells = [_cell(page, snapshot.page_size, owners) for page in snapshot.pages]
    lines = [
        *_fold(_totals(snapshot), width),
        *(_paint(row, color) for row in _map_rows(snapshot, cells, width)),
        *_fold(_meaning({mark for mark, _ in cells}), width),
        *(_paint(row, color) for row in _owner_rows(snapshot, owners, width)),
        *_fold(_sharing(snapshot, owners), width),
        *_fold(_groups(snapshot), width),
    ]
    return "\n".join(lines)


def _totals(snapshot: PoolSnapshot) -> str:
    live = [page for page in snapshot.pages if page.owners]
    num_free = len(snapshot.pages) - len(live)
    num_cached = sum(page.is_cached for page in snapshot.pages)
    what = ""
    if live:
        num_shared = sum(len(page.owners) > 1 for page in live)
        filled = sum(page.fill for page in live) / (len(live) * snapshot.page_size)
        what = f" ({num_shared} shared, {filled:.1%} filled)"
    return (
        f"{_num_pages(len(snapshot.pages))} of {snapshot.page_size} cells: {len(live)} live{what}, "
        f"{num_free} free ({num_cached} cached)"
    )


def _cell(page: PageState, page_size: int, owners: Mapping[str, _Cell]) -> _Cell:
    """What stands for a page."""
    sharers, partial = len(page.owners), page.fill < page_size
    if not sharers:
        return (":", _FAINT) if page.is_cached else (".", _FAINT)
    if sharers > 1:
        return "%" if partial else "+" if sharers > 9 else str(sharers), _BOLD
    letter, colour = owners[page.owners[0]]
    return "_" if not page.fill else letter.lower() if partial else letter, colour


def _meaning(marks: set[str]) -> str:
    """What those characters mean that are on the map."""
    meanings = [
        ("A-Z", _LETTERS, "one owner, full"),
        ("a-z", _LETTERS.lower(), "one owner, partial"),
        ("_", "_", "one owner, empty"),
        ("2-9", "23456789", "so many owners, full"),
        ("+", "+", "ten owners or more, full"),
        ("%", "%", "several owners, partial"),
        (":", ":", "cached"),
        (".", ".", "free"),
    ]
    return "; ".join(f"{name}\xa0{text}" for name, of, text in meanings if marks.intersection(of))


def _map_rows(
    snapshot: PoolSnapshot, cells: Sequence[_Cell], width: int
) -> Iterator[Sequence[_Cell]]:
    """Rows of tens of pages behind the id of the first; runs of equal rows as one line."""
    ids = [page.page_id for page in snapshot.pages]
    digits = len(str(max(ids, default=0)))
    per_row = (width - digits - 3) // 11 * 10
    starts = range(0, len(cells), per_row)
    for alike, group in itertools.groupby(starts, lambda at: _alike(cells[at : at + per_row])):
        run = list(group)
        end = min(run[-1] + per_row, len(cells))
        if alike and len(run) >= _MIN_RUN:
            kind = {".": "free ", ":": "cached "}.get(alike[0], "")
            note = f" {end - run[0]} {kind}pages, up to {ids[end - 1]}"
            yield [*_plain(f"  {ids[run[0]]:>{digits}}  "), *[alike] * 3, *_plain(note)]
            continue
        for start in run:
            row = list(_plain(f"  {ids[start]:>{digits}} "))
            for ten in range(start, min(start + per_row, end), 10):
                row += [(" ", _PLAIN), *cells[ten : min(ten + 10, end)]]
            yield row


def _alike(row: Sequence[_Cell]) -> _Cell | None:
    """The cell of which a row consists, if there is but one."""
    return row[0] if len(set(row)) == 1 else None


def _owner_rows(
    snapshot: PoolSnapshot, owners: Mapping[str, _Cell], width: int
) -> Iterator[Sequence[_Cell]]:
    """What the letters stand for, in columns; only the first ones if letters are used again."""
    total, shared = dict.fromkeys(owners, 0), dict.fromkeys(owners, 0)
    for page in snapshot.pages:
        for name in page.owners:
            total[name] += 1
            shared[name] += len(page.owners) > 1
    shown = [_printable(name, width // 4) for name in owners]
    entries: list[list[_Cell]] = []
    for (name, cell), text in list(zip(owners.items(), shown, strict=True))[: len(_LETTERS)]:
        of_them = f" ({shared[name]} shared)" if shared[name] else ""
        entries.append([cell, *_plain(f" {text} {_num_pages(total[name])}{of_them}")])
    column = max(map(len, entries), default=0) + 3
    per_row = max((width - 2 + 3) // column, 1)
    for start in range(0, len(entries), per_row):
        row = list(_plain("  "))
        for entry in entries[start : start + per_row]:
            row += [*entry, *_plain(" " * (column - len(entry)))]
        while row[-1] == (" ", _PLAIN):
            row.pop()
        yield row
    if rest := shown[len(_LETTERS) :]:
        text = f"  and {len(rest)} more, {rest[0]} to {rest[-1]}: again A, B, ..."
        yield from map(_plain, _fold(text, width))


def _sharing(snapshot: PoolSnapshot, owners: Mapping[str, _Cell]) -> str:
    """Which owners share which pages."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for page in snapshot.pages:
        if len(page.owners) > 1:
            groups.setdefault(page.owners, []).append(page.page_id)
    if not groups:
        return ""
    listed = [
        f"{_some(_ranges(pages))} by {_some([owners[name][0] for name in names])}"
        for names, pages in itertools.islice(groups.items(), _MAX_GROUPS)
    ]
    left = sum(len(pages) for pages in list(groups.values())[_MAX_GROUPS:])
    return "shared: " + "; ".join([*listed, *([f"and {left} more"] if left else [])])


def _groups(snapshot: PoolSnapshot) -> str:
    """How many pages layers have that see equally far, where not all do."""
    if len(snapshot.windows) == 1:
        return ""
    parts: list[str] = []
    for window in dict.fromkeys(snapshot.windows):
        groups = [group for group, own in enumerate(snapshot.windows) if own == window]
        count = sum(page.group in groups for page in snapshot.pages if page.owners)
        sees = "all tokens" if window is None else f"{window} tokens"
        which = f"{len(groups)} groups" if len(groups) > 1 else "a group"
        parts.append(f"{_num_pages(count)} of {which} of layers that see {sees}")
    return "; ".join(parts)


def _ranges(ids: Iterable[int]) -> list[str]:
    """Ascending numbers with neighbours together, such as 1-3, 7."""
    ranges: list[tuple[int, int]] = []
    for number in ids:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = ranges[-1][0], number
        else:
            ranges.append((number, number))
    return [f"{first}-{last}" if first < last else f"{first}" for first, last in ranges]


def _some(words: Sequence[str]) -> str:
    more = len(words) - _MAX_LISTED
    return " ".join([*words[:_MAX_LISTED], *([f"and {more} more"] if more > 0 else [])])


def _num_pages(count: int) -> str:
    return f"{count} page{'s' * (count != 1)}"


def _natural(name: str) -> list[str | int]:
    """Sorts "2#0" before "10#0"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _printable(name: str, limit: int) -> str:
    """A name in ASCII and so short, whatever the user has called the request."""
    name, half = ascii(name)[1:-1], limit // 2 - 1
    return name if len(name) <= limit else f"{name[:half]}..{name[-half:]}"


def _fold(text: str, width: int) -> list[str]:
    """Breaks a text into lines, but not at its no-break spaces."""
    lines = textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]


def _plain(text: str) -> list[_Cell]:
    return [(character, _PLAIN) for character in text]


def _paint(row: Iterable[_Cell], color: bool) -> str:
    text = ""
    for style, group in itertools.groupby(row, lambda cell: cell[1]):
        marks = "".join(mark for mark, _ in group)
        text += f"\x1b[{style}m{marks}\x1b[0m" if color and style != _PLAIN else marks
    return text
