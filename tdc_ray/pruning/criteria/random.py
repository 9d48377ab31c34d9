"""Random scores: the baseline of every other criterion."""

import torch

from tdc_ray.models.units import Unit
from tdc_ray.pruning.criteria.scores import Scores


def random_scores(units: tuple[Unit, ...], seed: int) -> Scores:
    """Draw every score from [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return {unit.name: torch.rand(unit.width, generator=generator).tolist() for unit in units}
