"""What saved macs are worth in time: macs of base and experts against what was measured."""

from tdc_ray.reporting.html.blocks import Block, BlockRow, Column, Plot, Table, Value
from tdc_ray.reporting.html.figures import BASE, drawing, svg_of
from tdc_ray.runs.results import Results, TimesResult


def times_blocks(results: Results, key: str) -> list[Block]:
    """Give the plot and the table; nothing where nothing was measured."""
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


def time_over_macs(results: Results, times: TimesResult, name: str) -> str:
    """Draw the share of time over that of macs."""
    with drawing() as (figure, axes):
        axes.axline((0, 0), (1, 1), color=BASE, lw=1.2, ls="--", zorder=1)
        axes.plot(1, 1, "o", color=BASE, ms=7)
        labelled: list[tuple[float, float]] = []
        for group, milliseconds in zip(results.groups, times.experts_ms, strict=True):
            place = (group.macs / results.base.macs, milliseconds / times.base_ms)
            axes.plot(*place, "o", color="tab:blue", ms=6, alpha=0.75)
            if all(max(abs(place[0] - x), abs(place[1] - y)) > 0.03 for x, y in labelled):
                labelled.append(place)
                axes.annotate(
                    str(group.index), place, xytext=(5, 5), textcoords="offset points", fontsize=9
                )
        axes.set(xlabel="macs / the base's", ylabel="time / the base's")
        axes.margins(0.1)
        return svg_of(figure, name)


def times_table(results: Results, times: TimesResult) -> Table:
    """Give macs and time of the base and of every expert."""
    base, is_limited = results.base.macs, results.prune.objective == "latency"
    rows: list[tuple[Value, ...]] = [("base", base, 1.0, times.base_ms, 1.0, None, None)]
    rows += [
        (
            f"group {group.index}",
            float(group.macs),
            group.macs / base,
            milliseconds,
            milliseconds / times.base_ms,
            group.milliseconds,
            group.milliseconds_limit,
        )
        for group, milliseconds in zip(results.groups, times.experts_ms, strict=True)
    ]
    columns = (
        Column("model"),
        Column("macs", "macs"),
        Column("macs / F", "share"),
        Column("ms", "number"),
        Column("time / the base's", "share"),
        Column("ms by the table", "number"),
        Column("limit in ms", "number"),
    )
    shown = len(columns) if is_limited else len(columns) - 2
    return Table(
        name="times",
        title="Macs and time",
        columns=columns[:shown],
        rows=[row[:shown] for row in rows],
        note=_measured(times)
        + " What is limited is the time by the table of what the units took before the run."
        * is_limited,
    )


def _measured(times: TimesResult) -> str:
    return (
        f"Measured once, after the fine-tunes, by one worker ({times.device}): a forward pass of "
        f"{times.batch_size} images in float32, base and expert by turns, medians of its steps. "
        "The sampler's own work is not in it."
    )
