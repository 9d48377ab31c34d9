"""Saved macs and saved time: macs of base and experts against measured times."""

from tdc_ray.reporting.figures import time_over_macs
from tdc_ray.reporting.html.blocks import Block, BlockRow, Column, Plot, Table, Value
from tdc_ray.runs.results import Results, TimesResult


def times_blocks(results: Results, key: str) -> list[Block]:
    """Return the plot and the table; nothing if no time was measured."""
    if results.times is None:
        return []
    times = results.times
    plot = Plot(
        svg=time_over_macs(results, times, f"{key}-times"),
        title="Time against macs",
        caption="Of a forward pass of base (gray) and experts (by group), as shares of the "
        "base's; on the dashed line time goes with macs. " + _measured(times),
    )
    return [BlockRow([plot, times_table(results, times)])]


def times_table(results: Results, times: TimesResult) -> Table:
    """Return macs and time of the base and of every expert."""
    columns = [
        Column("model"),
        Column("macs", "macs"),
        Column("macs / F", "share"),
        Column("ms", "number"),
        Column("time / the base's", "share"),
    ]
    base, note = results.base.macs, _measured(times)
    rows: list[tuple[Value, ...]] = [("base", base, 1.0, times.base_ms, 1.0)]
    for group, ms in zip(results.groups, times.experts_ms, strict=True):
        shares = (group.macs / base, ms, ms / times.base_ms)
        rows.append((f"group {group.index}", float(group.macs), *shares))
    if results.prune.objective == "latency":
        columns += [Column("ms by the table", "number"), Column("limit in ms", "number")]
        limits = [(None, None), *((g.milliseconds, g.milliseconds_limit) for g in results.groups)]
        rows = [(*row, *limit) for row, limit in zip(rows, limits, strict=True)]
        note += " What is limited is the time by the table of what the units took before the run."
    return Table(name="times", title="Macs and time", columns=columns, rows=rows, note=note)


def _measured(times: TimesResult) -> str:
    return (
        f"Measured once, after the fine-tunes, by one worker ({times.device}): a forward pass of "
        f"{times.batch_size} images in float32, base and expert by turns, medians of its steps. "
        "The sampler's own work is not in it."
    )
