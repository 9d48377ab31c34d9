"""The criteria by the names that ``prune.method`` has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tdc_ray.config.prune import ScoreMethod
from tdc_ray.pruning.criteria.diff_pruning import DIFF_PRUNING_BATCH, diff_pruning_scores
from tdc_ray.pruning.criteria.lamp import lamp_scores
from tdc_ray.pruning.criteria.magnitude import magnitude_scores
from tdc_ray.pruning.criteria.random import random_scores
from tdc_ray.pruning.criteria.scores import ScoreInputs, Scores
from tdc_ray.pruning.criteria.taylor import taylor_scores
from tdc_ray.pruning.noised import first_images


@dataclass(frozen=True, slots=True)
class Criterion:
    """One row: how units are scored."""

    score: Callable[[ScoreInputs], tuple[Scores, int]]
    """Returns the scores, and their cost in forward passes of one image; forward and backward
    count three."""

    is_seeded: bool = False
    """Whether scores depend on the seed, and so on the group's index."""


def _taylor(inputs: ScoreInputs) -> tuple[Scores, int]:
    scores = taylor_scores(inputs.network, inputs.units, inputs.batches, inputs.schedule)
    return scores, 3 * inputs.num_images


def _diff_pruning(inputs: ScoreInputs) -> tuple[Scores, int]:
    batch = first_images(inputs.batches, DIFF_PRUNING_BATCH)
    scores, num_timesteps = diff_pruning_scores(
        inputs.network, inputs.units, batch, inputs.timesteps, inputs.schedule
    )
    return scores, 3 * len(batch.x_0) * num_timesteps


CRITERIA: Mapping[ScoreMethod, Criterion] = {
    "random": Criterion(lambda to: (random_scores(to.units, to.seed), 0), is_seeded=True),
    "magnitude": Criterion(lambda to: (magnitude_scores(to.network, to.units), 0)),
    "lamp": Criterion(lambda to: (lamp_scores(to.network, to.units), 0)),
    "taylor": Criterion(_taylor),
    "diff-pruning": Criterion(_diff_pruning),
}
