"""A page as one HTML file that needs no network and runs no script."""

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files

from tdc_ray.reporting.html.blocks import (
    Block,
    BlockRow,
    KeyNumbers,
    Kind,
    Lines,
    Page,
    Plot,
    Samples,
    Section,
    Table,
    Value,
    cell_text,
)

PAPER_URL = "https://arxiv.org/abs/2312.13307"

LONG = 40
"""Letters from which on a cell's text is broken into lines."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser lets the page do: nothing but what is in it."""


def html_of(page: Page) -> str:
    """Return a page's HTML."""
    style = (files(__package__) / "style.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(page.title)}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{escape(page.title)}</h1>",
            f"<p>{escape(page.subtitle)}</p></header>",
            *_contents(page.sections),
            "<main>",
            *(line for section in page.sections for line in _section(section)),
            "</main>",
            f'<footer>Made by <code>tdc-ray report</code>. The method: <a href="{PAPER_URL}">'
            "arXiv:2312.13307</a>; its numbers stand only where a column says so.</footer>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _contents(sections: Sequence[Section]) -> Iterator[str]:
    yield '<nav aria-label="Contents"><ol>'
    for section in sections:
        level = ' class="below"' if section.level > 2 else ""
        yield f'<li{level}><a href="#{section.key}">{escape(section.title)}</a></li>'
    yield "</ol></nav>"


def _section(section: Section) -> Iterator[str]:
    tag = f"h{section.level}"
    yield f'<section id="{section.key}" aria-labelledby="{section.key}-title">'
    if section.level > 2 and section.run is not None:
        yield f'<p class="kicker">{escape(section.run)}</p>'
    yield f'<{tag} id="{section.key}-title">{escape(section.title)}</{tag}>'
    for index, block in enumerate(section.blocks):
        yield from _block(block, f"{section.key}-{index}", f"h{section.level + 1}")
    yield "</section>"


def _block(block: Block, key: str, heading: str) -> Iterator[str]:
    match block:
        case BlockRow():
            yield '<div class="row">'
            for index, part in enumerate(block.blocks):
                yield "<div>"
                yield from _block(part, f"{key}-{index}", heading)
                yield "</div>"
            yield "</div>"
        case Table():
            yield from _table(block, f"{key}-table", heading)
        case Plot():
            yield from _plot(block, heading)
        case Samples():
            yield from _samples(block, heading)
        case KeyNumbers():
            yield '<dl class="tiles">'
            for label, number, against in block.tiles:
                yield f"<div><dt>{escape(label)}</dt><dd><strong>{escape(number)}</strong>"
                yield f"<span>{escape(against)}</span></dd></div>"
            yield "</dl>"
        case Lines():
            kind = ' class="warning" role="note"' if block.is_warning else ""
            yield f"<ul{kind}>"
            yield from (f"<li>{escape(line)}</li>" for line in block.lines)
            yield "</ul>"


def _plot(plot: Plot, heading: str) -> Iterator[str]:
    kind = "plot wide" if plot.is_wide else "plot"
    scrolls = f' class="scroll" tabindex="0" role="group" aria-label="{escape(plot.title)}"'
    yield f'<figure class="{kind}">{_title(plot.title, heading)}'
    yield f"<div{scrolls}>" if plot.is_wide else "<div>"
    label = escape(f"{plot.title}. {plot.caption}")
    yield plot.svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    yield f"</div><figcaption>{escape(plot.caption)}</figcaption></figure>"


def _samples(samples: Samples, heading: str) -> Iterator[str]:
    kind = "samples small" if samples.is_small else "samples"
    yield f'<figure class="{kind}">{_title(samples.title, heading)}<div>'
    for title, uri in samples.grids:
        alt = escape(f"Grid of images sampled from: {title}")
        yield f'<figure><img src="{escape(uri)}" alt="{alt}">'
        yield f"<figcaption>{escape(title)}</figcaption></figure>"
    yield f"</div><figcaption>{escape(samples.caption)}</figcaption></figure>"


def _table(table: Table, key: str, heading: str) -> Iterator[str]:
    yield _title(table.title, heading, key)
    kind = ' class="heat"' if table.heat else ""
    yield f'<div class="scroll" tabindex="0" role="group" aria-labelledby="{key}">'
    yield f"<table{kind}><thead><tr>"
    for column in table.columns:
        name = escape(column.name)
        yield f'<th scope="col"{_number(column.kind)}><span>{name}</span></th>'
    yield "</tr></thead><tbody>"
    for index, row in enumerate(table.rows):
        yield '<tr class="marked">' if index in table.marked else "<tr>"
        link = table.links[index] if table.links else None
        name = escape(cell_text(row[0], table.columns[0].kind))
        name = name if link is None else f'<a href="#{link}">{name}</a>'
        yield f'<th scope="row"{_number(table.columns[0].kind)}>{name}</th>'
        for value, column in zip(row[1:], table.columns[1:], strict=True):
            heat = _heat(value, row[1:]) if table.heat else ""
            text = escape(cell_text(value, column.kind))
            kind = ' class="long"' if len(text) > LONG else _number(column.kind)
            yield f"<td{kind}{heat}>{text}</td>"
        yield "</tr>"
    yield "</tbody></table></div>"
    if table.note:
        yield f'<p class="note">{escape(table.note)}</p>'


def _title(text: str, heading: str, key: str | None = None) -> str:
    anchor = "" if key is None else f' id="{key}"'
    return f'<{heading} class="title"{anchor}>{escape(text)}</{heading}>'


def _number(kind: Kind) -> str:
    return "" if kind == "text" else ' class="number"'


def _heat(value: Value, row: Sequence[Value]) -> str:
    """Colour a cell by its share of the row's largest."""
    most = max((cell for cell in row if isinstance(cell, int | float)), default=0)
    if not isinstance(value, int | float) or not most:
        return ""
    return f' style="--heat: {100 * value / most:.0f}%"'
