"""The paper's own numbers, always shown as the paper's."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PaperRow:
    """What the paper prints for TDC with pruning at k = 0.5 and N = 10 (Table I)."""

    macs: float
    """The paper's mean "FLOPs" of the experts over the sampling steps, in macs."""

    fid: float
    num_params: float
    train_steps: float


PAPER: Mapping[str, PaperRow] = {
    "cifar10": PaperRow(6.56e9, 3.76, 48.7e6, 450e3),
    "imagenet64": PaperRow(32.7e9, 19.2, 103e6, 1.3e6),
    "ffhq256-ldm": PaperRow(77.2e9, 4.73, 231.0e6, 550e3),
}
"""The paper's own numbers, by the preset of their setting."""
