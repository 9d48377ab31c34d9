"""A page's tables as Markdown and as CSV."""

import csv
import io
from collections.abc import Iterator, Mapping

from tdc_ray.reporting.html.blocks import KeyNumbers, Lines, Page, Section, Table, Value, cell_text


def markdown(page: Page) -> str:
    """Return the text of a page: its tables and sentences, without the pictures."""
    lines = [f"# {_cell(page.title)}", "", _cell(page.subtitle)]
    for section in page.sections:
        lines += ["", f"{'#' * section.level} {_cell(section.title)}", *_blocks(section)]
    return "\n".join(lines) + "\n"


def csv_files(page: Page) -> Mapping[str, str]:
    """Return the tables with their numbers as they are, by their names.

    Tables of one name, of several runs, become one file; its first column names the run.
    """
    rows_of: dict[str, list[dict[str, Value]]] = {}
    columns: dict[str, dict[str, None]] = {}
    for section in page.sections:
        for table in (block for block in section.flat() if isinstance(block, Table)):
            about = {} if section.run is None else {"run": section.run}
            names = [column.name for column in table.columns]
            columns.setdefault(table.name, {}).update(dict.fromkeys([*about, *names]))
            rows_of.setdefault(table.name, []).extend(
                {**about, **dict(zip(names, row, strict=True))} for row in table.rows
            )
    return {name: _csv(list(columns[name]), rows) for name, rows in rows_of.items()}


def _csv(columns: list[str], rows: list[dict[str, Value]]) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(map(_plain, columns))
    writer.writerows([_plain(row.get(name)) for name in columns] for row in rows)
    return file.getvalue()


def _plain(value: Value) -> Value:
    """Keep text from being taken for a formula by a spreadsheet."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def _blocks(section: Section) -> Iterator[str]:
    for block in section.flat():
        match block:
            case Table():
                yield from ("", f"**{_cell(block.title)}**", "")
                yield _row(column.name for column in block.columns)
                yield _row("---" for _ in block.columns)
                kinds = [column.kind for column in block.columns]
                for row in block.rows:
                    yield _row(
                        cell_text(value, kind) for value, kind in zip(row, kinds, strict=True)
                    )
                if block.note:
                    yield from ("", _cell(block.note))
            case Lines():
                yield ""
                yield from (f"- {_cell(line)}" for line in block.lines)
            case KeyNumbers():
                yield ""
                yield from (
                    f"- {_cell(label)}: **{_cell(number)}** ({_cell(against)})"
                    for label, number, against in block.tiles
                )
            case _:
                pass


def _row(cells: Iterator[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Keep text from breaking a table, or from being taken for HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
