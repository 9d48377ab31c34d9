"""Writes a report on runs and sweeps into a folder."""

import os
from collections.abc import Sequence
from pathlib import Path

from tdc_ray.reporting.html.load import RunData, SweepData, is_sweep, load_run, load_sweep
from tdc_ray.reporting.html.markdown_csv import csv_files, markdown
from tdc_ray.reporting.html.page import html_of
from tdc_ray.reporting.html.sections import page_of
from tdc_ray.reporting.text import short_names
from tdc_ray.storage.files import write_text
from tdc_ray.storage.object_store import resolve_path

PAGE, TEXT, TABLES = "index.html", "report.md", "tables"
"""Files of the folder: the page, the tables as Markdown, and a folder of them as CSV."""

MAX_SECTIONS = 6
"""Most trials of a sweep that get a section of their own."""


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write a report on runs and sweeps; return its page.

    Args:
        paths: Run directories and folders of sweeps, or their URIs.
        out: Where the report goes; None means ``report`` in the one folder that is named, or below
            the working directory for several.

    Raises:
        StorageError: A folder is neither a run nor a sweep, or a file of it is damaged.
    """
    roots = list(dict.fromkeys(_absolute(path) for path in paths))
    names = short_names(roots)
    runs: list[RunData] = []
    sweeps: list[tuple[SweepData, dict[str, RunData]]] = []
    for root, name in zip(roots, names, strict=True):
        if is_sweep(root):
            sweep = load_sweep(root, name)
            prefix = f"{name}: " if len(roots) > 1 else ""
            chosen = _chosen(sweep)
            sweeps.append(
                (sweep, {trial: load_run(sweep.roots[trial], prefix + trial) for trial in chosen})
            )
        else:
            runs.append(load_run(root, name))
    page = page_of(runs, sweeps)
    folder = resolve_path(out) if out is not None else roots[0] / "report"
    if out is None and len(roots) > 1:
        folder = Path("report")
    write_text(folder / TEXT, markdown(page))
    for name, text in csv_files(page).items():
        write_text(folder / TABLES / f"{name}.csv", text)
    write_text(folder / PAGE, html_of(page))
    return folder / PAGE


def _chosen(sweep: SweepData) -> list[str]:
    """Return the trials that get sections: those of the Pareto front and the best first."""
    done = [row for row in sweep.sweep.rows if row.name in sweep.results]
    done.sort(key=lambda row: (not sweep.is_best(row), sweep.results[row.name].tdc.score))
    return [row.name for row in done[:MAX_SECTIONS]]


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(resolve_path(path)))  # noqa: PTH100  # links stay: their names mean something
