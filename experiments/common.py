"""What the experiments share: their flags, a base for several runs, and tables with provenance."""

import csv
import json
import logging
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torchvision.utils import make_grid

from tdc_ray.config import RunConfig
from tdc_ray.distributed.base import train_base_on_ray
from tdc_ray.distributed.cluster import board, connected
from tdc_ray.distributed.pool import Pool
from tdc_ray.environment import machine
from tdc_ray.layout import RunDir
from tdc_ray.presets import preset
from tdc_ray.progress import ProgressView
from tdc_ray.results import Results
from tdc_ray.run import run
from tdc_ray.storage import write_json, write_text

SMOKE_PRESET = "digits-smoke"


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of an experiment."""

    preset: str = "digits"
    """The preset that the experiment varies."""
    smoke: bool = False
    """The same in little: the digits-smoke preset and one seed."""
    storage: Path = Path("runs")
    """Folder of the experiment's runs; the same command goes on where it was cut."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds."""
    data: Path | None = None
    """Where the images are, for presets that need a path."""
    num_actors: int | None = None
    """Most actors that work at once; default: as many as fit on the cluster."""

    def config(self, seed: int) -> RunConfig:
        """Give the preset's settings for one seed."""
        config = replace(preset(self.preset), seed=seed)
        compute = replace(config.compute, num_actors=self.num_actors)
        config = replace(config, compute=compute)
        if self.data is None:
            return config
        return replace(config, data=replace(config.data, path=str(self.data.resolve())))


def parse_flags(description: str | None) -> Flags:
    """Parse the command line and configure logging."""
    flags = tyro.cli(Flags, description=description)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("tdc_ray").setLevel(logging.INFO)
    if flags.smoke:
        return replace(flags, preset=SMOKE_PRESET, seeds=flags.seeds[:1])
    return flags


@contextmanager
def workers(config: RunConfig, folder: Path) -> Iterator[Pool]:
    """Start or join a Ray cluster and give a pool of its actors."""
    with (
        ProgressView(folder / "tensorboard", Console()) as view,
        connected(),
        board(view) as events,
        Pool(config, events, view) as pool,
    ):
        yield pool


def trained_base(config: RunConfig, folder: Path) -> Path:
    """Train a base, or go on, or find it done; give the folder of its UNet.

    Args:
        config: The settings; only those that decide stage 1 matter.
        folder: The experiment's folder for this base.
    """
    run_dir = RunDir(folder.resolve())
    if not run_dir.base_result.exists():
        with (
            ProgressView(run_dir.tensorboard, Console()) as view,
            connected(),
            board(view) as events,
        ):
            train_base_on_ray(run_dir, config, events, view)
    return run_dir.base_unet


def run_once(config: RunConfig, folder: Path, *, base_of: Path | None = None) -> Results:
    """Do one run, or read the results of a finished one.

    Args:
        config: Its settings.
        folder: Its directory.
        base_of: A finished run whose base this one has too, or goes on training from: its
            checkpoints are taken over, and where stage 1 is the same its weights and scores too.
    """
    if base_of is not None and not (folder / "base").exists():
        _share_base(RunDir(base_of), RunDir(folder), config)
    return run(config, folder, Console())


def _share_base(source: RunDir, target: RunDir, config: RunConfig) -> None:
    steps = json.loads(source.base_result.read_text())["train_steps"]
    copied = target.root / "base.copying"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(source.root / "base", copied)
    if steps == config.base.num_steps:  # its images and their features are the same too
        shutil.copytree(source.samples / "base", target.samples / "base", dirs_exist_ok=True)
    else:  # train on from the last checkpoint
        (copied / source.base_result.name).unlink()
        shutil.rmtree(copied / source.base_unet.name)
    copied.rename(target.root / "base")


def mean_and_spread(values: Sequence[float]) -> str:
    """Write mean and sample standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def write_table(
    folder: Path, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Print a table and write it as CSV and Markdown, beside what made it."""
    table = Table(title=name)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    lines = [columns, ["---"] * len(columns), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    write_text(folder / f"{name}.md", text + "\n")


def write_samples(folder: Path, name: str, runs: Mapping[str, Path], num_images: int) -> None:
    """Draw images of several models side by side, image by image from the same noise.

    Args:
        folder: Where the PNG goes.
        name: Its name without the suffix.
        runs: For every title, the folder of samples of a run's evaluation.
        num_images: How many of each.
    """
    figure = Figure(figsize=(1.8 * len(runs) + 0.4, 2.2), layout="constrained")
    for axes, (title, samples) in zip(figure.subplots(1, len(runs)), runs.items(), strict=True):
        images = torch.from_numpy(np.load(sorted(samples.glob("*[0-9].npz"))[0])["arr_0"])
        grid = make_grid(images[:num_images].permute(0, 3, 1, 2), nrow=round(num_images**0.5))
        axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=8)
        axes.axis("off")
    figure.savefig(folder / f"{name}.png", dpi=120)


def write_record(
    folder: Path, name: str, flags: Flags, commits: set[str | None], record: Mapping[str, object]
) -> None:
    """Write the numbers behind a table as JSON, beside command, commits, seeds and machine.

    Args:
        folder: Where the JSON goes.
        name: Its name without the suffix.
        flags: The experiment's flags.
        commits: Commits that the runs were made with.
        record: The numbers.
    """
    made_by = {
        "command": " ".join(["python", *sys.argv]),
        "commits": sorted(str(commit) for commit in commits),
        "seeds": list(flags.seeds),
        "machine": machine(),
    }
    write_json(folder / f"{name}.json", {"made_by": made_by, **record})
