"""Rows of a table for other methods, from images that they released or sampled."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import Flags
from output import mean_and_spread

from tdc_ray.config.run import RunConfig
from tdc_ray.errors import ConfigError
from tdc_ray.runs.score_images import ImageScore, open_images, run_reference, score_images

NUMBER = r"\d+(?:\.\d+)?(?:e\+?\d+)?"
ROW = re.compile(
    rf"(?P<name>[^=]+)=(?P<images>.+),macs=(?P<macs>{NUMBER}),steps=(?P<steps>{NUMBER})"
)


@dataclass(frozen=True, kw_only=True)
class ReleasedFlags(Flags):
    """Flags of an experiment that takes rows for other methods."""

    row: tuple[str, ...] = ()
    """Other methods' rows, from their own images: NAME=IMAGES,macs=MACS,steps=STEPS, such as
    PNDM=pndm.npz,macs=6.06e9,steps=800000; macs of one denoising step and training steps are
    yours to say, and marked as stated."""


@dataclass(frozen=True, slots=True)
class ReleasedRow:
    """What is stated of another method."""

    name: str
    images: Path
    macs: float
    """Of one denoising step."""

    steps: float
    """Training steps."""


def released_row(text: str) -> ReleasedRow:
    """Parse a row of the command line.

    Raises:
        ConfigError: It is malformed.
    """
    found = ROW.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"--row must be NAME=IMAGES,macs=MACS,steps=STEPS, got {text}: such as "
            "PNDM=pndm.npz,macs=6.06e9,steps=800000."
        )
    name, images, macs, steps = found.group("name", "images", "macs", "steps")
    return ReleasedRow(name, Path(images), float(macs), float(steps))


def released_rows(flags: ReleasedFlags, config: RunConfig) -> list[ReleasedRow]:
    """Parse all rows, and check their images before any work.

    Raises:
        ConfigError: A row is malformed, or names no images.
        DataError: Its images are of another size or colours than the training images.
    """
    rows = [released_row(text) for text in flags.row]
    for row in rows:
        open_images(row.images, config.data)
    return rows


def scores_of_rows(rows: Sequence[ReleasedRow], run: Path) -> dict[str, ImageScore]:
    """Score every row's images as a finished run's own."""
    reference = run_reference(str(run))
    assert reference is not None
    return {row.name: score_images(row.images, reference) for row in rows}


def cells_of_row(row: ReleasedRow, score: ImageScore, paper: str) -> list[str]:
    """Return the cells of the main table: parameters, train and search macs are not known."""
    macs, steps = f"{row.macs / 1e6:.2f} M (stated)", f"{row.steps:.0f} (stated)"
    return [row.name, mean_and_spread([score.score]), paper, macs, "-", steps, "-", "-"]
