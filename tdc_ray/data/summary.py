"""Which images were learnt and what was done to them, as results say it; imports no framework."""

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, int, int]
"""``(C, H, W)`` of an image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagesSummary:
    """Which images were taken, and what was done to them; part of ``results.json``."""

    source: str
    """``data.source``"""

    num_images: int
    num_classes: int | None
    """None unless all images have a label."""

    shape: Shape
    """Channels, height and width that they were brought to."""

    hub: str | None = None
    """Name and commit of a data set on the Hugging Face hub."""

    left_out: Mapping[str, int]
    """Files that were not taken, by the reason."""

    num_looked_at: int
    """Images whose headers ``changed`` is counted from: all, or some evenly spread."""

    changed: Mapping[str, int]
    """What was done to how many images before they were learnt."""

    num_unreadable: int
    """How many of the images looked at are unreadable; the next one takes an image's place."""

    unreadable: tuple[str, ...]
    """The first of those."""


def summary_lines(where: str, summary: ImagesSummary) -> list[str]:
    """Write a summary in two lines to four."""
    classes = f" of {summary.num_classes} classes" if summary.num_classes else ""
    left_out = ", ".join(f"{count} {reason}" for reason, count in summary.left_out.items())
    lines = [
        f"{summary.num_images} images{classes} in {summary.hub or where}, read as "
        f"{summary.source}, learnt as {shape_text(summary.shape)}"
    ]
    if left_out:
        lines.append(f"left out: {left_out}")
    some = ""
    if summary.num_looked_at < summary.num_images:
        some = f" of {summary.num_looked_at} that were looked at"
    changed = ", ".join(f"{count} {change}" for change, count in summary.changed.items())
    lines.append(f"changed{some}: {changed or 'none'}")
    if summary.num_unreadable:
        more = ", ..." if summary.num_unreadable > len(summary.unreadable) else ""
        lines.append(
            f"unreadable{some}, the next one takes an image's place: {summary.num_unreadable}, "
            f"{', '.join(summary.unreadable)}{more}"
        )
    return lines


def shape_text(shape: Shape) -> str:
    """Write a shape in words."""
    channels, height, width = shape
    return f"{height}x{width} in {'grey' if channels == 1 else 'colour'}"
