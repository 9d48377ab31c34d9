"""What was chosen for each sampling step, in a terminal."""

from itertools import groupby

from rich.console import Console
from rich.table import Table

from tdc_ray.runs.step_schedule.measure import Judgement
from tdc_ray.runs.step_schedule.schedule import StepSchedule


def print_step_schedule(console: Console, schedule: StepSchedule) -> None:
    """Print which network takes which steps, and what the schedule is held against."""
    table = Table(title="which network runs at which sampling step")
    for column in ("t", "network", "steps", "macs", "loss against the base's"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for network, run in groupby(schedule.steps, key=lambda step: step.network):
        steps = list(run)
        share = schedule.networks[network] / schedule.macs_base
        loss, of_base = sum(step.loss for step in steps), sum(step.loss_base for step in steps)
        table.add_row(
            " to ".join(dict.fromkeys(str(steps[i].timestep) for i in (0, -1))),
            network,
            str(len(steps)),
            f"{share:.2f} F",
            f"{loss / of_base - 1:+.2%}",
        )
    console.print(table)
    judged = Table(title="on images and noise that no choice has seen")
    for column in ("schedule", "mean macs", "loss against the base's, 95 %"):
        judged.add_column(column, justify="left" if column == "schedule" else "right")
    judged.add_row(*_cells("chosen", schedule.chosen))
    judged.add_row(*_cells("the run's experts", schedule.experts))
    judged.add_row(*_cells("T-Stitch: cheapest first", schedule.stitched))
    console.print(judged)
    if schedule.score is not None:
        console.print(f"{schedule.metric} {schedule.score:.4g} (lower is better)")


def _cells(name: str, judgement: Judgement) -> tuple[str, str, str]:
    excess = f"{judgement.excess:+.2%} ({judgement.low:+.2%} to {judgement.high:+.2%})"
    return name, f"{judgement.mean_macs_share:.4f} F", excess
