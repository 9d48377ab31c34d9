"""What pipelines hand to their network of a prompt."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Encoding:
    """What pipelines of a kind hand to their network."""

    outputs: Mapping[str, tuple[int, int]]
    """By the network's argument: its place in what ``encode_prompt`` returns, and the place of
    that which guidance leads away from."""

    sizes: tuple[str, ...] = ()
    """Arguments that follow from the images' size (``models.text_encoder``)."""

    states_of: str | None = None
    """The encoder that alone says how wide states are; None means that all do, side by side."""
