"""What criteria are tested on: the tiny UNet, noised images and one group's inputs."""

import torch

from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import Unit
from tdc_ray.pruning.criteria.scores import ScoreInputs
from tests.small import TINY, random_unet, small_config

UNITS = units_of(TINY)
SCHEDULE = noise_schedule(small_config().diffusion)


def noised(*sizes: int) -> list[NoisedBatch]:
    generator = torch.Generator().manual_seed(1)
    return [
        NoisedBatch(
            torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1,
            torch.randn(size, 1, 8, 8, generator=generator),
            torch.randint(0, 1000, (size,), generator=generator),
        )
        for size in sizes
    ]


def unit_named(name: str) -> Unit:
    return next(unit for unit in UNITS if unit.name == name)


def score_inputs() -> ScoreInputs:
    return ScoreInputs(
        network=random_unet(),
        units=UNITS,
        timesteps=range(500, 503),
        batches=noised(4),
        num_images=4,
        schedule=SCHEDULE,
        seed=0,
    )
