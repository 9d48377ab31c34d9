"""The parts of a page, before they become HTML, Markdown or CSV."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from tdc_ray.reporting.text import duration, macs_text, millions_text
from tdc_ray.runs.results import score_text

Kind = Literal[
    "text",
    "number",
    "count",
    "decimal",
    "score",
    "loss",
    "share",
    "macs",
    "millions",
    "power",
    "seconds",
]
"""How a column is formatted for a reader; CSV files have the numbers as they are."""

T = TypeVar("T")
Value = str | int | float | None
"""Value of a cell; None means that it is empty."""

DASH = "–"  # noqa: RUF001  # shown for empty values


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    name: str
    kind: Kind = "text"


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of values; the first column names the row."""

    name: str
    """Of the CSV file; tables of one name, of several runs, share it."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    links: Sequence[str | None] = ()
    """For every row the section of the page that it links to, if any."""

    marked: frozenset[int] = frozenset()
    """Highlighted rows."""

    heat: bool = False
    """Whether the cells behind the first are coloured by their share of the row's largest."""

    note: str = ""


def table_of(
    name: str,
    title: str,
    items: Iterable[T],
    columns: Sequence[tuple[str, Kind, Callable[[T], Value]]],
    *,
    links: Sequence[str | None] = (),
    marked: frozenset[int] = frozenset(),
    note: str = "",
) -> Table:
    """Return a table with a row for each item; a column takes one value of it."""
    return Table(
        name=name,
        title=title,
        columns=[Column(name, kind) for name, kind, _ in columns],
        rows=[tuple(value(item) for _, _, value in columns) for item in items],
        links=links,
        marked=marked,
        note=note,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A picture of lines and text."""

    svg: str
    title: str
    caption: str
    is_wide: bool = False
    """Whether it has the page's width, and scrolls where that is too narrow for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Grids of images side by side."""

    grids: Sequence[tuple[str, str]]
    """Title and ``data:`` URI of each."""

    is_small: bool
    """Whether the pixels are few, and are shown as squares."""

    title: str
    caption: str


@dataclass(frozen=True, slots=True)
class KeyNumbers:
    """The most important numbers: label, number, and what it is compared with."""

    tiles: Sequence[tuple[str, str, str]]


@dataclass(frozen=True, slots=True)
class Lines:
    """Sentences, as a list."""

    lines: Sequence[str]
    is_warning: bool = False


@dataclass(frozen=True, slots=True)
class BlockRow:
    """Blocks side by side where there is room."""

    blocks: Sequence[Table | Plot | Samples]


Block = Table | Plot | Samples | KeyNumbers | Lines | BlockRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page with a title."""

    key: str
    """Its anchor: letters, digits and dashes."""

    title: str
    blocks: Sequence[Block]
    level: Literal[2, 3] = 2
    run: str | None = None
    """The run that it is about; None means all."""

    def flat(self) -> Iterator[Table | Plot | Samples | KeyNumbers | Lines]:
        """Yield all blocks, those of rows too."""
        for block in self.blocks:
            if isinstance(block, BlockRow):
                yield from block.blocks
            else:
                yield block


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A report on runs and sweeps."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def cell_text(value: Value, kind: Kind) -> str:
    """Format a value for a reader."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return DASH if value is None else str(value)
    if isinstance(value, str):
        return value
    match kind:
        case "macs":
            return macs_text(value)
        case "millions":
            return millions_text(value)
        case "score":
            return score_text(value)
        case "share":
            return f"{value:.1%}"
        case "decimal":
            return f"{value:.1f}"
        case "loss":
            return f"{value:#.4g}" if value else "0"
        case "count":
            return f"{value:,.0f}"
        case "power":
            return f"{value:.2e}"
        case "seconds":
            return duration(value)
        case _:
            return f"{value:.4g}" if isinstance(value, float) else str(value)
