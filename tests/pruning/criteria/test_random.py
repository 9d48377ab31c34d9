import torch

from tdc_ray.pruning.criteria.random import random_scores
from tests.pruning.criteria.inputs import UNITS


def test_random_scores_follow_from_the_seed_alone():
    torch.manual_seed(5)
    one = random_scores(UNITS, seed=3)
    torch.manual_seed(6)
    assert random_scores(UNITS, seed=3) == one
    assert random_scores(UNITS, seed=4) != one
